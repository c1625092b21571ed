"""What the pages' commands find in their folder: texts, a tiny OPT under the names that pages use, a store, a run."""

import os
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2TokenizerFast, OPTConfig, OPTForCausalLM

import cartilha
from cartilha.corpus.primer import read_primer

TEXTS = ("corpus.txt", "text.txt", "texto.txt", "held-out.txt", "validacao.txt")
MODELS = ("facebook/opt-125m", "M", "A", "B")
RUNS = ("RUN", "TREINO")
STORES = ("pt", "en", "code", "codigo")  # of different texts, with the domains wiki and news
FOLDERS = ("crawl", "coleta"), ("good-texts", "textos-bons")

texts = [document.text for document in read_primer()]
for page in sorted(Path(__file__).parents[1].glob("pt/*.md")):  # more of the same language
    texts += page.read_text(encoding="utf-8").split("\n\n")
lines = [" ".join(text.split()) + "\n" for text in texts if len(text) > 80]
for name in TEXTS:
    Path(name).write_text("".join(lines), encoding="utf-8")
trained = ByteLevelBPETokenizer()
trained.train("corpus.txt", vocab_size=600, special_tokens=["<pad>", "</s>"], show_progress=False)
tokenizer = GPT2TokenizerFast(tokenizer_object=trained, bos_token="</s>", eos_token="</s>", pad_token="<pad>")
shape = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
model = OPTForCausalLM(OPTConfig(vocab_size=608, max_position_embeddings=2048, **shape, **ends))
for name in MODELS:
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)
for number, folders in enumerate(FOLDERS):
    for folder in folders:
        os.mkdir(folder)
        Path(folder, "text.txt").write_text("".join(lines[:100] if number == 0 else lines[100:]), encoding="utf-8")
for number, name in enumerate(STORES):
    for domain, text in (("wiki", lines[number::8]), ("news", lines[number + 4 :: 8])):
        Path(f"text-{name}", domain).mkdir(parents=True)
        Path(f"text-{name}", domain, "text.txt").write_text("".join(text), encoding="utf-8")
    cartilha.prepare(cartilha.PrepareConfig(input=f"text-{name}", model="M", output=name))
cartilha.prepare(cartilha.PrepareConfig(input="primer", model="M", output="STORE"))
for name in RUNS:
    cartilha.train(cartilha.TrainConfig(model="M", store="STORE", output=name, max_steps=2, skip_english=True))
