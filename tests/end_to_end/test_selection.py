"""`prepare --select_tokens`, with and without a target: what is taken, held out, recorded and said."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cartilha.config import InspectConfig, PrepareConfig
from cartilha.corpus import pieces
from cartilha.corpus.primer import primer_texts
from cartilha.errors import UnfinishedError, UserError
from cartilha.pipeline import prepare as module
from cartilha.pipeline.inspect import inspect
from cartilha.pipeline.prepare import prepare
from cartilha.preparation import enough, index, selection, shard_work
from cartilha.preparation.selection_report import WEIGHTS_FILE
from cartilha.terminal.results import DISPLAYS
from cartilha.tokens import ngrams
from cartilha.tokens.store import TokenStore

PROSE = [text.text.replace("\n", " ") for text in primer_texts()]


def report_line(number: int) -> str:
    return f"Lote {number}: pressão {number % 7}, vazão {number % 11}, temperatura {number % 13} graus, fim do turno."


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
    """A pool in which one document in ten is prose, in several shards, and a target of other prose."""
    monkeypatch.setattr(module, "SHARD_BYTES", 8_000)
    other = [report_line(number) for number in range(900)]
    pool = [line for place, text in enumerate(PROSE[:90]) for line in (*other[10 * place : 10 * place + 10], text)]
    (tmp_path / "pool.txt").write_text("\n".join(pool), encoding="utf-8")
    (tmp_path / "target.txt").write_text("\n".join(PROSE[90:]), encoding="utf-8")
    return PrepareConfig(
        input=(str(tmp_path / "pool.txt"),),
        like=(str(tmp_path / "target.txt"),),
        select_tokens="15000",
        model="random:tiny",
        output=str(tmp_path / "store"),
        workers=1,
    )


def texts(store: str, split: str = "train") -> list[str]:
    return list(TokenStore(store).texts(split))


def test_what_reads_like_the_target_is_taken_and_some_of_the_target_is_held_out(config, caplog):
    caplog.set_level("INFO", "cartilha")
    result = prepare(config)
    taken, held_out = texts(config.output), texts(config.output, "validation")
    assert set(taken) <= set(PROSE[:90]) and set(held_out) < set(PROSE[90:])
    assert 15_000 <= result.splits["train"].num_tokens < 15_000 + max(map(len, map(str.encode, taken)))
    facts = TokenStore(config.output).info["selection"]
    assert facts["divergence"]["chosen"] < facts["divergence"]["random"] and "nats per n-gram" in caplog.text
    assert facts["target_documents"] + len(held_out) == len(PROSE[90:]) == 60
    assert result.dropped["target"] == facts["target_documents"] <= 50  # which is little, and is said
    assert f"The target has {facts['target_documents']} documents; a few hundred tell more" in caplog.text
    assert facts["highest"][0]["chosen"] and not any(row["chosen"] for row in facts["lowest"])
    assert "pressão" in {row["word"] for row in facts["words"]["lost"]}
    assert sum(facts["histogram"]["pool"]) == facts["pool_documents"] == 990
    assert sum(facts["histogram"]["chosen"]) == len(taken) == facts["num_documents"]
    weights = pq.read_table(Path(config.output) / WEIGHTS_FILE)
    assert len(weights) == 990 and weights["chosen"].to_numpy().sum() == len(taken)
    assert prepare(config).was_ready and result.selection == prepare(config).selection


def test_the_same_documents_whatever_the_shards_and_pieces(config, tmp_path, monkeypatch):
    prepare(config)
    monkeypatch.setattr(module, "SHARD_BYTES", 1 << 20)
    monkeypatch.setattr(selection, "PIECE_TOKENS", 5000)  # all documents are shorter
    again = replace(config, output=str(tmp_path / "again"))
    prepare(again)
    first, second = (TokenStore(store).info for store in (config.output, again.output))
    assert first["files"]["train.tokens"] == second["files"]["train.tokens"]
    assert first["selection"] == second["selection"]


def test_the_same_documents_where_arrays_are_files_and_read_in_pieces(config, tmp_path, monkeypatch):
    with Path(config.input[0]).open("a", encoding="utf-8") as file:
        file.write("\n" + "\n".join(report_line(number) for number in range(0, 900, 7)))  # known texts
    config = replace(config, near_duplicates=find_spec("rensa") is not None)
    prepare(config)
    monkeypatch.setattr(pieces, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(index, "SORTED_DOCUMENTS", 100)
    monkeypatch.setattr(pieces, "PIECE", 90)
    again = replace(config, output=str(tmp_path / "again"))
    prepare(again)
    first, second = (TokenStore(store).info for store in (config.output, again.output))
    for name in ("train.tokens", "train.documents.parquet", "validation.tokens", "validation.documents.parquet"):
        assert first["files"][name] == second["files"][name]
    assert first["dropped"] == second["dropped"] and first["dropped"]["exact_duplicates"] > 100
    assert second["selection"]["reliability"] == pytest.approx(first["selection"]["reliability"], rel=1e-9)
    assert not list(tmp_path.glob(".again*"))


def test_reading_ends_when_the_best_of_a_sample_hold_enough(config, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(enough, "SAMPLE_DOCUMENTS", 300)
    monkeypatch.setattr(shard_work, "BATCH_DOCUMENTS", 20)
    caplog.set_level("INFO", "cartilha")
    config = replace(config, stream_best="30%", select_tokens="6000")
    prepare(config)
    info = TokenStore(config.output).info
    assert 0 < info["num_documents_read"] - 60 < 700 and set(texts(config.output)) <= set(PROSE[:90])
    assert info["selection"]["pool_documents"] == info["num_documents_read"] - 60
    assert re.search(r"Reading ended after \d+ documents, when those as good as the best 30 % of a first", caplog.text)
    again = replace(config, output=str(tmp_path / "again"), workers=3)  # so many shards at once
    prepare(again)
    assert info["files"] == TokenStore(again.output).info["files"]
    prepare(replace(config, output=str(tmp_path / "random"), like=()))
    assert TokenStore(tmp_path / "random").info["num_documents_read"] < 700
    prepare(replace(config, output=str(tmp_path / "all"), stream_best="1%", select_tokens="40000"))
    assert (
        "The whole input was read (990 documents): those as good as the best 1 % of a first sample hold" in caplog.text
    )
    for wrong, sentence in (
        ({"stream_best": "5"}, "--stream_best is a share of the text, such as 5%"),
        ({"select_tokens": "20%"}, "say how much with --select_tokens, such as 50m"),
        ({"limit_documents": 9}, "--limit_documents does not go with it"),
    ):
        with refused(sentence):
            prepare(replace(config, output=str(tmp_path / "wrong"), **wrong))


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_processes_choose_the_same_documents(config, tmp_path, monkeypatch, executor):
    if executor == "ray":
        pytest.importorskip("ray", reason="needs the extra scale")
    prepare(config)
    monkeypatch.setattr(module, "INLINE_BYTES", 0)
    other = replace(config, output=str(tmp_path / executor), executor=executor, workers=2)
    prepare(other)
    first, second = (TokenStore(store).info for store in (config.output, other.output))
    assert first["files"] == second["files"] and first["selection"] == second["selection"]


def test_on_a_pool_that_is_all_like_the_target_the_draw_is_random(config, tmp_path, caplog):
    lines = [report_line(number) for number in range(2_000)]
    (tmp_path / "target.txt").write_text("\n".join(lines[:200]), encoding="utf-8")
    (tmp_path / "pool.txt").write_text("\n".join(lines[200:]), encoding="utf-8")
    result = prepare(config)
    assert result.selection["reliability"] < 0.2 and "drawn nearly at random" in caplog.text
    held_out = tmp_path / "held.txt"  # so that the same documents are left to draw from
    held_out.write_text("\n".join(texts(config.output, "validation")), encoding="utf-8")
    at_random = replace(config, like=(), validation_input=(str(held_out),), output=str(tmp_path / "random"))
    prepare(at_random)
    taken, drawn = set(texts(config.output)), set(texts(at_random.output))
    assert len(taken & drawn) > 0.8 * len(drawn)


def test_a_part_of_a_large_pool_tells_what_it_is_like(config, monkeypatch):
    counted = []
    monkeypatch.setattr(selection, "POOL_TOKENS", 6000)
    monkeypatch.setattr(ngrams, "log_ratios", lambda *c, own=ngrams.log_ratios: counted.append(c[1].sum()) or own(*c))
    result = prepare(config)
    assert 6000 < counted[0] < 0.5 * 2 * result.selection["pool_tokens"]  # tokens and pairs
    assert len(set(texts(config.output)) & set(PROSE)) > 0.9 * len(texts(config.output))


def test_a_long_document_is_weighed_in_pieces(config, tmp_path, monkeypatch):
    prepare(config)
    monkeypatch.setattr(selection, "PIECE_TOKENS", 64)
    pieces = replace(config, output=str(tmp_path / "pieces"))
    prepare(pieces)
    whole, cut = (pq.read_table(Path(store) / WEIGHTS_FILE) for store in (config.output, pieces.output))
    assert np.corrcoef(whole["weight"].to_numpy(), cut["weight"].to_numpy())[0, 1] > 0.995
    assert whole["num_tokens"].equals(cut["num_tokens"])


def test_without_a_target_documents_are_drawn_by_the_seed(config, tmp_path):
    plain = replace(config, like=(), select_tokens="20%")
    result = prepare(plain)
    facts = result.selection
    assert facts["num_tokens"] == pytest.approx(0.2 * facts["pool_tokens"], abs=3000) and "divergence" not in facts
    pool = replace(plain, select_tokens=None, output=str(tmp_path / "pool"))
    prepare(pool)
    assert texts(pool.output, "validation") == texts(plain.output, "validation")  # drawn before the selection
    everything = texts(pool.output)
    taken = [place for place, text in enumerate(everything) if text in set(texts(plain.output))]
    assert 0.3 < np.mean(taken) / len(everything) < 0.7  # from everywhere
    other = replace(plain, seed=1, output=str(tmp_path / "other"))
    prepare(other)
    assert set(texts(other.output)) != set(texts(plain.output))
    # A larger amount takes the same documents and more.
    more = replace(plain, select_tokens="30%", output=str(tmp_path / "more"))
    prepare(more)
    assert set(texts(plain.output)) < set(texts(more.output))


def test_texts_of_the_target_are_not_trained_on_and_given_ones_are_held_out(config, tmp_path):
    with Path(config.input[0]).open("a", encoding="utf-8") as file:
        file.write("\n" + "\n".join(PROSE[90:100]))
    held_out = tmp_path / "held.txt"
    held_out.write_text("\n".join(PROSE[:5]), encoding="utf-8")
    result = prepare(replace(config, validation_input=(str(held_out),)))
    assert texts(config.output, "validation") == PROSE[:5]
    assert not set(texts(config.output)) & {*PROSE[:5], *PROSE[90:]} and result.dropped["exact_duplicates"] == 15


def test_another_amount_reads_nothing_anew_where_the_pool_was_kept(config, monkeypatch, tmp_path):
    kept = replace(config, keep_pool=True)
    prepare(kept)
    fresh = replace(config, select_tokens="20000", output=str(tmp_path / "fresh"))
    prepare(fresh)
    monkeypatch.setattr("cartilha.preparation.enough.process_shard", lambda task: pytest.fail("a shard was read again"))
    prepare(replace(kept, select_tokens="20000", overwrite=True))
    assert texts(config.output) == texts(fresh.output)


def test_a_document_is_explained(config):
    prepare(config)
    chosen = inspect(InspectConfig(what=config.output, document="1", weights=True)).document["weight"]
    facts = TokenStore(config.output).info["selection"]
    assert chosen["chosen"] and chosen["above"] > 0.85
    assert chosen["raised"][0]["nats"] > chosen["raised"][-1]["nats"] > 0 > chosen["lowered"][0]["nats"]
    weights = pq.read_table(Path(config.output) / WEIGHTS_FILE)
    first = inspect(InspectConfig(what=config.output, document="1")).document
    row = weights.filter(np.array(weights["text_hash"].to_pylist()) == first["text_hash"])
    assert row["weight"].to_pylist() == pytest.approx([chosen["weight"]], rel=1e-5)
    held_out = inspect(InspectConfig(what=config.output, document="1", split="validation", weights=True)).document
    assert not held_out["weight"]["chosen"] and facts["lowest"][0]["weight"] < held_out["weight"]["weight"]
    lowest = inspect(InspectConfig(what=config.output, document=facts["lowest"][0]["doc_id"], weights=True))
    shown = {"weight": pytest.approx(facts["lowest"][0]["weight"], rel=1e-5), "above": 0.0, "chosen": False}
    assert lowest.document["weight"] == shown
    assert "the store does not hold what was not chosen" in next(iter(DISPLAYS["inspect"](lowest.to_dict())))
    for what in ("primer", "random:tiny"):
        with pytest.raises(UserError, match="no documents and blocks"):
            inspect(InspectConfig(what=what, weights=True))
    shown = "\n".join(map(str, DISPLAYS["inspect"](inspect(InspectConfig(what=config.output)).to_dict())))
    assert "Chosen: " in shown and "Divergence from the target" in shown
    with pytest.raises(UserError, match="name it with --document"):
        inspect(InspectConfig(what=config.output, weights=True))


def test_a_time_is_turned_into_tokens_by_the_measured_speed(config, tmp_path, caplog):
    caplog.set_level("INFO", "cartilha")
    result = prepare(replace(config, select_tokens=None, select_for="1s"))
    found = re.search(r"At ([\d,]+) tokens/s, 1s are ([\d,]+) tokens", caplog.text)
    tokens = int(found[2].replace(",", ""))
    assert min(tokens, result.selection["pool_tokens"]) <= result.selection["num_tokens"] < tokens + 10_000
    everything = prepare(replace(config, select_tokens=None, select_for="99h", output=str(tmp_path / "all")))
    assert everything.selection["num_documents"] == everything.selection["pool_documents"]


@contextmanager
def refused(message: str, kind: type[UserError] = UserError) -> Iterator[None]:
    with pytest.raises(kind, match=message) as error:
        yield
    assert "\n" not in str(error.value)


def test_what_cannot_be_chosen_is_refused_in_a_sentence(config, tmp_path):
    english = tmp_path / "english.txt"
    english.write_text(
        "\n".join(f"The engine was started {n} times before the ship left the harbour." for n in range(99))
    )
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "one.txt").write_text(PROSE[0])
    with refused("is more than the .* tokens that there are to choose from", UnfinishedError):
        prepare(replace(config, select_tokens="9m"))
    for amount in ("0", "-3", "many", "120%", "0%", "1.5", "3x"):
        with refused("is a number of tokens such as 2000000 or 2m, or a share such as 20%"):
            prepare(replace(config, select_tokens=amount))
    with refused("add --select_tokens"):
        prepare(replace(config, select_tokens=None))
    with refused("give one of them"):
        prepare(replace(config, select_for="1h"))
    with refused("A time is written like 50m"):
        prepare(replace(config, select_tokens=None, select_for="soon"))
    with refused("--keep_pool needs to know how much"):
        prepare(replace(config, select_tokens=None, like=(), keep_pool=True))
    with refused("A selection and --weights do not go together"):
        prepare(replace(config, weights=("1",)))
    with refused("--like names pool.txt, which is also a text of --input; give other texts"):
        prepare(replace(config, like=config.input))
    with refused("--like names target.txt, which is also a text of --validation_input"):
        prepare(replace(config, validation_input=config.like))
    with refused("--decontaminate names target.txt, which is also a text of --like; name a benchmark"):
        prepare(replace(config, decontaminate=config.like))
    with refused("--rejects takes what --clean, --decontaminate, --max_perplexity"):
        prepare(replace(config, rejects=str(tmp_path / "out.jsonl")))
    with refused("hold no document"):
        prepare(replace(config, like=(str(tmp_path / "empty.txt"),)))
    with refused("fewer than two documents"):
        prepare(replace(config, like=(str(tmp_path / "one.txt"),)))
    pytest.importorskip("py3langid")
    with refused(r"in another language \(en\) than the input"):
        prepare(replace(config, like=(str(english),)))


def test_near_duplicates_of_the_target_are_taken_once(config):
    pytest.importorskip("rensa")
    changed = [f"{PROSE[120]} {word}." for word in ("Fim", "Acabou", "Pronto")]
    with Path(config.input[0]).open("a", encoding="utf-8") as file:
        file.write("\n" + "\n".join(changed))
    prepare(replace(config, near_duplicates=True, select_tokens="100%"))
    taken, held_out = texts(config.output), texts(config.output, "validation")
    assert len([text for text in changed if text in taken]) == (0 if PROSE[120] in held_out else 1)


def test_a_copy_of_the_target_leaves_nothing_to_choose_from(config, tmp_path):
    (tmp_path / "copy.txt").write_bytes((tmp_path / "target.txt").read_bytes())
    with refused("is left to choose from"):
        prepare(replace(config, input=(str(tmp_path / "copy.txt"),), select_tokens="20%"))


def test_a_limit_counts_documents_of_the_input_alone(config):
    result = prepare(replace(config, limit_documents=50, select_tokens="100%"))
    assert result.selection["pool_documents"] == 50


def test_the_outermost_bins_reach_the_outermost_weights(config, recwarn):
    facts = prepare(replace(config, seed=7)).selection
    edges = facts["histogram"]["edges"]
    assert edges[0] <= facts["lowest"][0]["weight"] and facts["highest"][0]["weight"] <= edges[-1]
    assert edges == sorted(edges) and not [warning for warning in recwarn if "overflow" in str(warning.message)]


@pytest.mark.parametrize("first", range(90, 98))
def test_a_target_of_three_documents_has_two_halves(config, tmp_path, first):
    (tmp_path / "target.txt").write_text("\n".join(PROSE[first : first + 3]), encoding="utf-8")
    facts = prepare(replace(config, validation_documents=1)).selection
    assert facts["target_documents"] == 2 and 0 <= facts["reliability"] < 1
    assert np.isfinite([row["weight"] for row in facts["highest"] + facts["lowest"]]).all()


def test_one_document_to_aim_at_is_refused(config, tmp_path):
    (tmp_path / "target.txt").write_text("\n".join(PROSE[90:92]), encoding="utf-8")
    with refused("fewer than two documents to aim at"):
        prepare(config)
