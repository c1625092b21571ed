"""`prepare --max_perplexity`, `--classifier` and `--dry_run`: which documents a network keeps out of the training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from cartilha.config import PrepareConfig
from cartilha.corpus.primer import primer_texts
from cartilha.errors import UnfinishedError, UserError
from cartilha.evaluation import text_quality
from cartilha.evaluation.text_quality import scorer_of
from cartilha.pipeline import prepare as module
from cartilha.pipeline.prepare import prepare
from cartilha.terminal.results import DISPLAYS
from cartilha.tokens.store import TokenStore
from cartilha.tokens.tokenizer import byte_tokenizer, load_tokenizer

TEXTS = [text.text.replace("\n", " ")[:100] for text in primer_texts()][:60]
NOISE = ["".join(chr(0x4E00 + (37 * i * (n + 3)) % 5000) for i in range(60)) for n in range(6)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with fresh weights, of one output, over bytes."""
    folder = tmp_path_factory.mktemp("classifier")
    backend = byte_tokenizer().backend
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>").save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    shape = BertConfig(vocab_size=512, num_labels=1, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    BertForSequenceClassification(shape).save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
    monkeypatch.setattr(module, "SHARD_BYTES", 2_000)
    monkeypatch.chdir(tmp_path)
    lines = [line for n, noise in enumerate(NOISE) for line in (*TEXTS[9 * n : 9 * n + 9], noise)]
    Path("pool.txt").write_text("\n".join(lines), encoding="utf-8")
    return PrepareConfig(input="pool.txt", model="random:tiny", output="store", validation_first=5, workers=1)


def train_texts(store: str) -> list[str]:
    return list(TokenStore(store).texts("train"))


def scores_by_hand(texts: list[str]) -> np.ndarray:
    tokenizer = load_tokenizer("random:tiny")
    return scorer_of("perplexity", "random:tiny", tokenizer)([ids[:512] for ids in tokenizer.encode(texts)])


def test_documents_beyond_a_perplexity_are_left_out_counted_and_listed(config):
    everything = replace(config, output="all")
    prepare(everything)
    pool = train_texts("all")
    scores = scores_by_hand(pool)
    low, high = np.quantile(scores, [0.1, 0.8]).tolist()
    limits = {"min_perplexity": f"{low:.6f}", "max_perplexity": f"{high:.6f}"}
    result = prepare(replace(config, **limits, rejects="out.jsonl"))
    kept = [text for text, score in zip(pool, scores, strict=True) if low <= score <= high]
    assert train_texts("store") == kept
    assert list(TokenStore("store").texts("validation")) == list(TokenStore("all").texts("validation"))
    assert result.dropped["perplexity:low"] == (scores < low).sum()
    assert result.dropped["perplexity:high"] == (scores > high).sum()
    rows = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == [text for text in pool if text not in kept]
    assert {row["reason"] for row in rows} == {"perplexity:low", "perplexity:high"}
    facts = TokenStore("store").info["quality"][0]
    assert facts["num_scored"] == len(pool) and facts["highest"][0]["score"] == pytest.approx(scores.max(), rel=1e-5)
    shown = "\n".join(map(str, DISPLAYS["prepare"](result.to_dict())))
    assert f"Perplexity of {len(pool)} documents under random:tiny: 5% below" in shown
    assert prepare(replace(config, **limits)).was_ready
    with pytest.raises(UserError, match="another model"):
        prepare(replace(config, **limits, model="random:tiny-opt"))


def test_a_share_stands_for_so_many_documents_and_a_perplexity_is_that_of_the_model(config):
    result = prepare(replace(config, max_perplexity="25%"))
    num_pool = result.dropped["perplexity:high"] + result.splits["train"].num_documents
    assert result.dropped["perplexity:high"] == pytest.approx(num_pool / 4, abs=1)
    assert scores_by_hand([TEXTS[0]])[0] == pytest.approx(259, rel=0.5)  # fresh weights over bytes know nothing


def test_a_classifier_keeps_what_it_scores_highest_whatever_the_batches(config, classifier, monkeypatch):
    prepare(replace(config, output="all"))
    pool = train_texts("all")
    tokenizer = load_tokenizer("random:tiny")
    ids = [own[:512] for own in tokenizer.encode(pool)]
    scores = scorer_of("score", str(classifier), tokenizer)(ids)
    model, encode = text_quality.load_classifier(str(classifier))
    with torch.inference_mode():
        batches = [encode(text, truncation=True, max_length=64, return_tensors="pt") for text in pool]
        alone = [float(model(**batch).logits) for batch in batches]
    assert scores == pytest.approx(alone, abs=1e-5)
    least = float(np.median(scores)) + 1e-4
    result = prepare(replace(config, classifier=str(classifier), min_score=str(least)))
    assert train_texts("store") == [text for text, score in zip(pool, scores, strict=True) if score >= least]
    assert result.dropped["score:low"] == (scores < least).sum()


def test_a_dry_run_writes_no_store_and_the_real_one_reads_and_scores_nothing_anew(config, classifier, monkeypatch):
    asked = replace(config, classifier=str(classifier), max_perplexity="20%", dry_run=True, rejects="dry.jsonl")
    dry = prepare(asked)
    assert dry.store == "" and not Path("store").exists() and Path("dry.jsonl").is_file()
    assert [facts["num_scored"] for facts in dry.quality] == [55, 44]  # what one has left out, the other does not see
    prepare(replace(config, max_perplexity="20%", output="fresh"))

    def nothing(*_: object) -> None:
        pytest.fail("done again")

    monkeypatch.setattr("cartilha.preparation.enough.process_shard", nothing)
    monkeypatch.setattr(text_quality, "score_documents", nothing)
    real = prepare(replace(asked, dry_run=False, min_score="-99"))
    assert real.dropped == dry.dropped and not list(Path().glob(".store*"))
    assert {k: (v.num_documents, v.num_words) for k, v in real.splits.items()} == {
        k: (v.num_documents, v.num_words) for k, v in dry.splits.items()
    }
    assert train_texts("store") == train_texts("fresh")


def test_a_selection_looks_only_at_what_it_would_take(config, monkeypatch):
    chosen = prepare(replace(config, select_tokens="700", max_perplexity="40%"))
    plain = prepare(replace(config, select_tokens="100%", output="plain"))
    assert 700 <= chosen.splits["train"].num_tokens < 900
    limit = chosen.quality[0]["kept"][1]
    assert (scores_by_hand(train_texts("store")) <= limit * (1 + 1e-6)).all()
    assert chosen.quality[0]["num_scored"] < plain.splits["train"].num_documents
    assert chosen.dropped["perplexity:high"] > 0
    again = prepare(replace(config, select_tokens="700", max_perplexity=str(limit), output="again"))
    assert train_texts("again") == train_texts("store") and again.dropped == chosen.dropped
    with pytest.raises(UnfinishedError, match="tokens of documents that are good enough"):
        prepare(replace(config, select_tokens="4500", max_perplexity="40%", output="too-many"))


BAD = {
    ("--max_perplexity", "many"): "--max_perplexity is a number, or a share of the documents such as 10%, not 'many'.",
    ("--max_perplexity", "100%"): "--max_perplexity is a number, or a share of the documents such as 10%, not '100%'.",
    ("--max_perplexity", "0.5"): "A perplexity is 1 or more",
    ("--max_perplexity", "5", "--min_perplexity", "9"): "A perplexity is 1 or more, and --min_perplexity is below",
    (
        "--max_perplexity",
        "50%",
        "--min_perplexity",
        "60%",
    ): "--min_perplexity and --max_perplexity leave out everything",
    ("--min_score", "3"): "--min_score is for the scores of a classifier",
    ("--classifier", "any/thing"): "--classifier needs to know which documents are kept; add --min_score",
    ("--classifier", "random:tiny", "--min_score", "3"): "--classifier takes a hub id or a directory",
    ("--classifier", "{model}", "--min_score", "3"): "{model} is no classifier of texts: it has no weights for",
    ("--max_perplexity", "1.0001"): "No document is good enough to train on; give wider limits",
}


@pytest.fixture(scope="module")
def plain_model(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an encoder that was never trained to classify."""
    folder = tmp_path_factory.mktemp("plain")
    model = BertForSequenceClassification.from_pretrained(classifier).bert
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((classifier / name).read_bytes())
    return folder


@pytest.mark.parametrize("options", BAD)
def test_what_cannot_be_judged_by_is_refused(config, refused, plain_model, options):
    given = [part.format(model=plain_model) for part in options]
    said = refused("prepare", "--input", "pool.txt", "--model", "random:tiny", "--output", "store", *given)
    assert said.startswith(BAD[options].format(model=plain_model)), said
    assert not Path("store").exists()
