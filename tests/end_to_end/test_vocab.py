"""`cartilha vocab`: figures that can be counted by hand, an extension that trains on, advice, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cartilha.config import CompareConfig, PrepareConfig, TrainConfig, VocabConfig
from cartilha.corpus.english import english_sample
from cartilha.corpus.primer import primer_texts
from cartilha.pipeline.compare import compare
from cartilha.pipeline.prepare import prepare
from cartilha.pipeline.train import train
from cartilha.pipeline.vocab import vocab
from cartilha.pipeline.vocab_advice import recommend
from cartilha.tokens.store import TokenStore
from cartilha.tokens.tokenizer import load_tokenizer
from cartilha.training.optimizer import resolve_lr


@pytest.fixture(scope="module")
def extended(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """random:tiny with thirty tokens more; not to be changed by a test."""
    path = tmp_path_factory.mktemp("vocab") / "extended"
    vocab(VocabConfig(model="random:tiny", input=(str(corpus),), extend=30, output=str(path)))
    return path


def test_the_report_counts_what_can_be_counted_by_hand(cartilha, tmp_path: Path):
    texts = tmp_path / "a.txt"
    texts.write_text("olá mundo\nação e pão, já 12\n", encoding="utf-8")
    outcome = cartilha("vocab", "--model", "random:tiny", "--input", texts, "--json")
    assert outcome.code == 0
    report = json.loads(outcome.out)["report"]
    # Every byte is a token of this tokenizer; words of letters cost their bytes and the space before.
    assert report["total"]["num_bytes"] == report["total"]["num_tokens"] == 10 + 21
    assert report["total"]["num_words"] == 2 + 5
    assert report["total"]["tokens_per_word"] == pytest.approx(31 / 7)
    assert report["total"]["share_in_pieces"] == pytest.approx(5 / 6)  # all but "e", of two
    assert report["domains"]["a"] == report["total"]
    assert [row["word"] for row in report["words"]][:2] == ["ação", "mundo"]
    assert report["words"][0] == {"word": "ação", "count": 1, "pieces": [" ", "a", *"��", *"��", "o"]}
    letters = {row["letter"]: row for row in report["letters"]}
    assert {name: row["count"] for name, row in letters.items()} == {"á": 2, "ç": 1, "ã": 2}
    assert all(row["share_apart"] == 1 for row in letters.values())
    assert letters["ç"]["tokens_per_word"] == 7
    assert letters["á"]["tokens_per_word"] == (5 + 4) / 2
    assert (report["num_ids"], report["num_rows"], report["num_spare_rows"]) == (259, 259, 0)
    english = report["english"]
    assert english["num_tokens"] == sum(len(text.encode()) for text in english_sample())


def test_of_a_line_without_spaces_a_person_reads_the_beginning(cartilha, tmp_path: Path):
    texts = tmp_path / "a.txt"
    texts.write_text("a" * 5000 + "\n", encoding="utf-8")
    outcome = cartilha("vocab", "--model", "random:tiny", "--input", texts)
    assert "a|a|... (1)" in outcome.out and max(map(len, outcome.out.splitlines())) < 200


def test_the_sizes_are_reckoned_on_documents_that_nothing_was_learnt_on(corpus: Path, monkeypatch):
    monkeypatch.setattr("cartilha.pipeline.vocab.SIZES", (10, 30, 10_000))
    report = vocab(VocabConfig(model="random:tiny", input=(str(corpus),))).report
    assert report is not None
    rows = report["sizes"]
    assert [row["num_new"] for row in rows] == [10, 30]  # ten thousand cannot be learnt from twenty lines
    shares = [row["share_of_tokens"] for row in rows]
    assert 1 > shares[0] > shares[1] > 0
    # 64 numbers a row, tied, of 16 bytes in training; the time falls less than the tokens do, as the head has grown.
    assert rows[1]["new_parameters"] == 30 * 64 and rows[1]["training_bytes"] == 30 * 64 * 16
    assert shares[1] < rows[1]["share_of_time"] < 1
    assert rows[1]["words_in_context"] == pytest.approx(1024 / rows[1]["tokens_per_word"])


def test_an_extension_keeps_the_model_and_takes_fewer_tokens(extended: Path, corpus: Path):
    record = json.loads((extended / "extension.json").read_text())
    assert (record["first_id"], record["num_ids"], record["num_new"]) == (259, 289, 30)
    assert record["num_rows"] == 296 and record["num_parameters"] - record["num_parameters_before"] == 37 * 64
    lines = corpus.read_text(encoding="utf-8").splitlines()
    assert (
        sum(map(len, load_tokenizer(str(extended)).encode(lines))) == record["tokens_after"] < record["tokens_before"]
    )


def test_it_trains_with_the_embeddings_first_and_compares_by_bits_per_byte(
    extended: Path, corpus: Path, store: Path, tmp_path: Path
):
    prepared = prepare(PrepareConfig(input=(str(corpus),), model=str(extended), output=str(tmp_path / "store")))
    few, many = TokenStore(prepared.store), TokenStore(store)
    for split in ("train", "validation"):
        assert few.counts[split].num_tokens < many.counts[split].num_tokens
        assert few.counts[split].corpus_hash == many.counts[split].corpus_hash
    config = TrainConfig(
        model=str(extended),
        store=prepared.store,
        output=str(tmp_path / "run"),
        block_size=64,
        batch_tokens=128,
        max_steps=3,
        embeddings_first="30%",
    )
    assert train(config).results["status"] == "finished"
    models = ("random:tiny", str(tmp_path / "run/model"))
    result = compare(CompareConfig(models=models, store=str(store))).to_dict()
    assert result["num_documents"] == few.counts["validation"].num_documents
    assert result["evaluations"][0]["num_bytes"] == result["evaluations"][1]["num_bytes"]
    assert result["evaluations"][0]["num_tokens"] > result["evaluations"][1]["num_tokens"]


def test_an_extension_is_extended_again(cartilha, extended: Path, corpus: Path, tmp_path: Path):
    arguments = ["--model", extended, "--input", corpus, "--extend", 5, "--output", tmp_path / "again"]
    assert cartilha("vocab", *arguments).code == 0
    old, new = (load_tokenizer(str(path)).backend.get_vocab() for path in (extended, tmp_path / "again"))
    assert old.items() < new.items() and max(new.values()) == 288 + 5
    assert json.loads((tmp_path / "again/extension.json").read_text())["num_rows"] == 296  # spare rows were there


def test_a_folder_without_weights_gets_its_tokenizer_extended(cartilha, extended: Path, corpus: Path, tmp_path: Path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(extended / name, bare / name)
    outcome = cartilha("vocab", "--model", bare, "--input", corpus, "--extend", 5, "--output", tmp_path / "new")
    assert outcome.code == 0 and "only the tokenizer is extended" in outcome.err
    assert load_tokenizer(str(tmp_path / "new")).num_ids == 294
    assert not (tmp_path / "new/config.json").exists()


def test_mistakes_are_refused_in_one_sentence(refused, extended: Path, corpus: Path, tmp_path: Path):
    given = ["vocab", "--model", "random:tiny", "--input", corpus]
    new = ["--output", tmp_path / "new"]
    assert "--input is missing" in refused("vocab", "--model", "random:tiny")
    assert "1 or more, not 0" in refused(*given, "--extend", 0, *new)
    assert "name a directory with --output" in refused(*given, "--extend", 5)
    assert "choose another --output" in refused(*given, "--extend", 5, "--output", extended)
    assert "leave out either" in refused(*given, "--extend", 5, "--advise", *new)
    assert "A time is written like" in refused(*given, "--advise", "--time_budget", "soon")
    sentence = refused(*given, "--extend", 5000, *new)
    number = int(sentence.split("--extend ")[1].split(",")[0])
    assert f"only {number:,} pairs" in sentence and not (tmp_path / "new").exists()
    vocab(VocabConfig(model="random:tiny", input=(str(corpus),), extend=number, output=str(tmp_path / "new")))


def test_a_tokenizer_of_another_kind_is_refused_but_reported_on(refused, cartilha, corpus: Path, tmp_path: Path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [(f"▁{c}" if mark else c, -2.0) for c in "abcdefghijklmnopqrstuvwxyz" for mark in (0, 1)]
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *words], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    given = ["vocab", "--model", tmp_path, "--input", corpus]
    sentence = refused(*given, "--extend", 5, "--output", tmp_path / "new")
    assert "of the kind Unigram" in sentence and "byte-level BPE (OPT, GPT-2, Llama 3" in sentence
    outcome = cartilha(*given)
    assert outcome.code == 0 and "of the kind Unigram" in outcome.out and "(English)" in outcome.out


def test_advice_trains_each_for_its_share_of_the_time(cartilha, refused, corpus: Path, tmp_path: Path, monkeypatch):
    given = ["vocab", "--model", "random:tiny", "--advise", "--time_budget", "1.5s"]
    assert "1 document would be held out" in refused(*given, "--input", corpus)
    monkeypatch.setattr("cartilha.pipeline.vocab_advice.TRIED", (20, 60))
    monkeypatch.setattr("cartilha.pipeline.vocab_advice.BLOCK_SIZE", 64)
    monkeypatch.setattr("cartilha.pipeline.vocab_advice.BATCH_TOKENS", 128)
    clock = SimpleNamespace(perf_counter=itertools.count(step=1 / 16).__next__)  # asked twice a step
    monkeypatch.setattr("cartilha.training.loop.time", clock)
    work = tmp_path / "work"
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(t.text[:80].replace("\n", " ") + "\n" for t in primer_texts()), encoding="utf-8")
    outcome = cartilha(*given, "--input", texts, "--output", work, "--json")
    assert outcome.code == 0, outcome.err
    advice = json.loads(outcome.out)["advice"]
    assert advice["seconds_each"] == 0.5 and len(advice["sentences"]) == 2
    assert [row["num_new"] for row in advice["tried"]] == [20, 60]
    seconds, rates, sizes = {}, {}, {}
    for name in ("keep", "plus-20", "plus-60"):
        results = json.loads((work / name / "run/results.json").read_text())
        seconds[name] = results["seconds"]
        assert results["settings"]["embeddings_first"] == (0 if name == "keep" else 0.05)
        rates[name] = results["settings"]["lr"]
        sizes[name] = results["settings"]["num_parameters"]
    assert rates == dict.fromkeys(
        rates, resolve_lr("auto", sizes["keep"], 128, is_fresh=True)
    )  # the base's, whatever is added
    assert seconds == dict.fromkeys(seconds, 0.5)
    # The held-out documents are nobody's teachers: the extension was learnt on the training side alone.
    train_side = [document.text for document in TokenStore(work / "keep/store").read_documents("train")]
    record = json.loads((work / "plus-60/model/extension.json").read_text())
    assert record["tokens_before"] == sum(map(len, load_tokenizer("random:tiny").encode(train_side)))


def row(num_new: int, difference: float, low: float | None, high: float | None) -> dict:
    return {
        "num_new": num_new,
        "difference": difference,
        "interval": [low, high],
        "num_documents": 60,
        "share_of_tokens": 0.7,
        "difference_english": 0.01,
    }


@pytest.mark.parametrize(
    ("rows", "expected", "begins"),
    [
        ([row(4000, -0.2, -0.3, -0.1), row(8000, -0.1, -0.2, -0.01)], 4000, "Extend by 4,000 tokens: after 7 min"),
        ([row(4000, -0.2, -0.3, -0.1), row(8000, -0.3, -0.4, -0.2)], 8000, "Extend by 8,000 tokens"),
        ([row(4000, -0.1, -0.3, 0.1)], 0, "Keep the vocabulary, for want of a clear difference"),
        ([row(4000, 0.2, 0.1, 0.3), row(8000, 0.3, 0.2, 0.4)], 0, "Keep the vocabulary: "),
        ([row(4000, -0.2, None, None)], 0, "Keep the vocabulary, for want of a clear difference"),
    ],
)
def test_only_a_difference_that_is_no_chance_is_recommended(rows, expected, begins):
    recommended, sentences = recommend(rows, 400.0)
    assert recommended == expected and len(sentences) == 2
    assert sentences[0].startswith(begins) and all(sentence.endswith(".") for sentence in sentences)
