"""`prepare` on shards: the same bytes whoever does the work, nothing done twice, nothing half-true left."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cartilha.config import PrepareConfig
from cartilha.corpus.primer import primer_texts
from cartilha.errors import UnfinishedError, UserError
from cartilha.pipeline import prepare as module
from cartilha.pipeline.prepare import prepare
from cartilha.preparation import shard_work, work_directory
from cartilha.preparation.executors import in_processes
from cartilha.tokens.store import TokenStore
from cartilha.tokens.summary import summarize

PRIMER = [text.text.replace("\n", " ") for text in primer_texts()]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents on 160 lines, five of them twice, one empty."""
    path = tmp_path_factory.mktemp("lines") / "textos.txt"
    path.write_text("\n".join([*PRIMER, "", *PRIMER[3:8], "Fim.", "Mais um </s> fim."]), encoding="utf-8")
    return path


@pytest.fixture
def config(lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
    """Twenty shards, done in this process."""
    monkeypatch.setattr(module, "SHARD_BYTES", 15_000)
    return PrepareConfig(input=(str(lines),), model="random:tiny", output=str(tmp_path / "store"), workers=1)


def contents(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != ".verified.json"
    }


def documents(store: str | Path) -> dict[str, list[str]]:
    """Texts of both sides, in order."""
    opened = TokenStore(store)
    return {split: [d.text for d in opened.read_documents(split)] for split in ("train", "validation")}


def rows(store: str | Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(Path(store) / f"{split}.documents.parquet").to_pylist()


def test_the_same_bytes_whoever_does_the_work_and_however_it_is_cut(config, monkeypatch):
    reference = contents(Path(prepare(config).store))
    assert len(reference) >= 8 and len(documents(config.output)["validation"]) > 5
    monkeypatch.setattr(module, "INLINE_BYTES", 0)
    for number, (workers, shard_bytes) in enumerate([(2, 40_000), (1, 1 << 30)]):
        monkeypatch.setattr(module, "SHARD_BYTES", shard_bytes)
        other = replace(config, output=f"{config.output}-{number}", workers=workers)
        prepare(other)
        assert contents(Path(other.output)) == reference


def test_ray_writes_the_same_bytes(config):
    pytest.importorskip("ray", reason="needs the extra scale")
    reference = contents(Path(prepare(config).store))
    other = replace(config, output=f"{config.output}-ray", executor="ray", workers=2)
    prepare(other)
    assert contents(Path(other.output)) == reference


def test_what_is_in_the_store(config):
    result = prepare(config)
    assert result.dropped["exact_duplicates"] == 5 and result.dropped["empty"] == 1
    both = documents(config.output)
    assert sorted(both["train"] + both["validation"]) == sorted({*PRIMER, "Fim.", "Mais um </s> fim."})
    clusters = [row["cluster"] for split in both for row in rows(config.output, split)]
    assert sorted(clusters) == list(range(152))
    assert not list(Path(config.output).parent.glob(".store*"))  # no work directory, no lock
    info = TokenStore(config.output).info
    assert info["tokenization"]["backend"] == "gigatoken" and info["num_documents_read"] == 158


class Counter:
    """Counts the shards that are done, and stops as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None, error: Any = None) -> None:
        self.numbers: list[int] = []
        real = shard_work.process_shard

        def process(task: Any) -> Any:
            if len(self.numbers) == stop_after:
                raise error
            self.numbers.append(task.shard.number)
            return real(task)

        monkeypatch.setattr("cartilha.preparation.enough.process_shard", process)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_was_done_is_not_done_again(config, monkeypatch, error):
    reference = contents(Path(prepare(replace(config, output=f"{config.output}-whole")).store))
    first = Counter(monkeypatch, 7, error)
    with pytest.raises((KeyboardInterrupt, UnfinishedError)) as caught:
        prepare(config)
    assert not Path(config.output).exists()
    if caught.type is UnfinishedError:
        assert "full" in str(caught.value) and "same command" in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setattr(module, "SHARD_BYTES", 15_000)
    second = Counter(monkeypatch)
    prepare(config)
    assert len(first.numbers) == 7 and sorted(first.numbers + second.numbers) == list(range(len(second.numbers) + 7))
    assert contents(Path(config.output)) == reference


def test_a_shard_that_was_torn_is_done_again(config, monkeypatch):
    Counter(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    work = Path(config.output).with_name(".store.work")
    with (work / "shard-000001" / "tokens.bin").open("ab") as file:
        file.write(b"x")
    monkeypatch.undo()
    monkeypatch.setattr(module, "SHARD_BYTES", 15_000)
    again = Counter(monkeypatch)
    prepare(config)
    assert 1 in again.numbers and 0 not in again.numbers


def test_other_settings_begin_anew(config, monkeypatch, caplog):
    Counter(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    monkeypatch.undo()
    monkeypatch.setattr(module, "SHARD_BYTES", 15_000)
    again = Counter(monkeypatch)
    prepare(replace(config, seed=1))
    assert 0 in again.numbers and "for another input or other settings is removed" in caplog.text


def test_a_mistake_in_the_input_leaves_nothing(config, lines, tmp_path):
    broken = tmp_path / "broken.txt"
    broken.write_bytes(lines.read_bytes() + b"\n\xff\n")
    with pytest.raises(UserError, match="line 159"):
        prepare(replace(config, input=(str(broken),)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.txt"]
    result = prepare(replace(config, input=(str(broken),), on_error="skip"))
    assert result.dropped["invalid_bytes"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_an_input_whose_name_is_not_utf8(config, lines, tmp_path):
    path = tmp_path / "cora\udce7\udce3o.txt"
    path.write_bytes(lines.read_bytes())
    config = replace(config, input=(str(path),))
    assert prepare(config).splits == prepare(replace(config, input=(str(lines),), output=str(tmp_path / "b"))).splits
    assert TokenStore(config.output).info["inputs"][0]["name"] == "cora\ufffd\ufffdo.txt"
    assert prepare(config).was_ready
    with pytest.raises(UserError, match="not valid UTF-8"):
        prepare(replace(config, output=str(tmp_path / "\udce7")))


def test_files_that_a_folder_leaves_out_are_counted_and_named(config, lines, tmp_path, caplog):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.txt").write_bytes(lines.read_bytes())
    (folder / "b.doc").write_text("x")
    (folder / "c.pdf").write_text("x")
    result = prepare(replace(config, input=(str(folder),), weights=("1",)))
    assert result.dropped["files"] == 2 and caplog.text.count("b.doc") == 1
    assert TokenStore(result.store).info["files_left_out"] == {"of a kind that is not read": ["b.doc", "c.pdf"]}


def test_rows_that_quotes_joined_are_counted(config, tmp_path, caplog):
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + "".join(f'{n},"um\ndois {n}"\n' for n in range(9)))
    prepare(replace(config, input=(str(path),)))
    assert "into one row 9 times" in caplog.text and "a.csv, row 1;" in caplog.text


SCRIPT = """
import os, sys
print("begins")
from cartilha.config import PrepareConfig
from cartilha.pipeline import prepare as module
from cartilha.preparation import shard_work
module.SHARD_BYTES, module.INLINE_BYTES = 15_000, 0
real = shard_work.done_result
result = module.prepare(PrepareConfig(input=(sys.argv[1],), model="random:tiny", output=sys.argv[2], workers=2))
print(result.splits["train"].num_documents, [m for m in ("torch", "transformers") if m in sys.modules])
"""


def run_script(tmp_path: Path, *arguments: object) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_plain_script_may_call_it_and_neither_torch_nor_transformers_is_loaded(lines, tmp_path):
    """The script has no `if __name__ == "__main__"`, which processes of the usual kind would ask for."""
    process = run_script(tmp_path, lines, tmp_path / "store")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and output.splitlines()[-1].endswith(" []"), output
    assert output.count("begins") == 1  # no worker runs the script again


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_for_good_it_goes_on(config, lines, tmp_path):
    """The process is killed when some shards are there; its workers end too, and the same call finishes the work."""
    store = tmp_path / "killed"
    process = run_script(tmp_path, lines, store)
    work = store.with_name(".killed.work")
    while process.poll() is None and len(list(work.glob("shard-*[0-9]"))) < 3:
        time.sleep(0.001)  # the one core may be needed for the work
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not store.exists() or list(store.iterdir())
    second = run_script(tmp_path, lines, store)
    output = second.communicate(timeout=300)[0]
    assert second.returncode == 0, output
    assert contents(store) == contents(Path(prepare(config).store))
    assert not work.exists()


@pytest.mark.parametrize("left_by", ["this command", "another command"])
def test_what_was_left_by_a_process_killed_after_the_store_had_appeared_goes(config, monkeypatch, left_by):
    with monkeypatch.context() as patch:  # it is killed before it can tidy up
        patch.setattr(work_directory.shutil, "rmtree", lambda *_, **__: None)
        prepare(config)
    store = Path(config.output)
    store.with_name(".store.lock").touch()
    if left_by == "another command":  # whose work may be gone on with
        (store.with_name(".store.work") / "identity.json").write_text("{}", encoding="utf-8")
    assert prepare(config).was_ready
    left = [path.name for path in store.parent.glob(".store*")]
    assert left == ([] if left_by == "this command" else [".store.work"])


def test_all_workers_begin_even_where_the_first_is_quick(monkeypatch):
    """The pool would start the second when it has work for it, and that one would run the caller's script again."""
    real = ProcessPoolExecutor.submit

    def slowly(self: Any, *rest: Any) -> Any:
        future = real(self, *rest)
        time.sleep(1.5)
        return future

    monkeypatch.setattr(ProcessPoolExecutor, "submit", slowly)
    before = set(multiprocessing.active_children())
    with in_processes(2) as run:
        assert not list(run(_exit, []))  # waits for the start
        assert len(set(multiprocessing.active_children()) - before) == 2


def _exit(number: int) -> int:
    if number == 1:
        os._exit(9)
    return number


def test_a_killed_worker_is_a_sentence():
    with in_processes(2) as run, pytest.raises(UnfinishedError, match="--workers"):
        list(run(_exit, [0, 1, 2]))


def test_a_second_run_does_nothing(config, monkeypatch):
    first = prepare(config)
    counter = Counter(monkeypatch)
    again = prepare(config)
    assert again.was_ready and not counter.numbers and again.splits == first.splits


def test_a_disk_that_is_too_small_is_said_before(config, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(work_directory.shutil, "disk_usage", lambda _: usage(0, 0, 1_000_000))
    with pytest.raises(UserError, match=r"GB are needed .* free"):
        prepare(config)
    assert not Path(config.output).exists()


def test_a_disk_that_fills_while_the_store_is_written(config, monkeypatch):
    def full(*_: object) -> Iterator[None]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_sides", full)
    with pytest.raises(UnfinishedError, match="full"):
        prepare(config)
    assert [path.name for path in Path(config.output).parent.iterdir()] == [".store.work"]


def test_the_first_documents_of_many_shards(config, monkeypatch):
    whole = documents(prepare(config).store)
    limited = replace(config, output=f"{config.output}-limited", limit_documents=70)
    prepare(limited)
    wanted = set(PRIMER[:70])
    assert {split: [text for text in texts if text in wanted] for split, texts in whole.items()} == documents(
        limited.output
    )
    monkeypatch.setattr(module, "INLINE_BYTES", 0)
    two = replace(limited, output=f"{config.output}-two", workers=2)
    prepare(two)
    assert contents(Path(two.output)) == contents(Path(limited.output))


def test_other_ways_to_hold_out(config, tmp_path):
    prepare(replace(config, output=f"{config.output}-n", validation_documents=10))
    assert len(documents(f"{config.output}-n")["validation"]) == 10
    prepare(replace(config, output=f"{config.output}-first", validation_first=4))
    assert documents(f"{config.output}-first")["validation"] == PRIMER[:4]
    given = tmp_path / "given.txt"
    given.write_text(f"{PRIMER[9]}\nUm texto novo.\n", encoding="utf-8")
    prepare(replace(config, output=f"{config.output}-given", validation_input=(str(given),)))
    both = documents(f"{config.output}-given")
    assert both["validation"] == [PRIMER[9], "Um texto novo."] and PRIMER[9] not in both["train"]
    with pytest.raises(UserError, match="not both"):
        prepare(replace(config, validation_input=(str(given),), validation_first=4))


def test_a_long_document_is_cut_for_the_tokenizer_alone(config, monkeypatch, tmp_path):
    """Its tokens, words and characters are those of the whole, a word that has no place to cut included."""
    path = tmp_path / "long.txt"
    texts = [" ".join(PRIMER), "ç" * 9000 + " fim", *PRIMER[:5]]
    path.write_text("\n".join(texts), encoding="utf-8")
    reference = replace(config, input=(str(path),), output=f"{config.output}-whole")
    prepare(reference)
    monkeypatch.setattr(shard_work, "BATCH_CHARS", 1000)
    monkeypatch.setattr(shard_work, "MAX_PIECE_CHARS", 1000)
    real = shard_work.cut
    monkeypatch.setattr(shard_work, "cut", lambda texts: real(texts, 1000))
    pieces = replace(config, input=(str(path),))
    prepare(pieces)
    assert contents(Path(pieces.output)) == contents(Path(reference.output))
    found = {
        row["num_chars"]: row["num_words"] for split in ("train", "validation") for row in rows(config.output, split)
    }
    assert found[len(texts[0])] == len(texts[0].split()) and found[len(texts[1])] == 2


def test_weights_are_shares_of_the_tokens(config, tmp_path):
    english = tmp_path / "english.txt"
    english.write_text("".join(f"A short line, number {i}, of English text.\n" for i in range(400)), encoding="utf-8")
    weighted = replace(config, input=(*config.input, str(english)), weights=("0.9", "0.1"), max_repeats=1)
    result = prepare(weighted)
    tokens = {"textos.txt": 0, "english.txt": 0}
    for split in ("train", "validation"):
        for row in rows(config.output, split):
            tokens[row["source"]] += row["num_tokens"]
    assert tokens["english.txt"] / sum(tokens.values()) == pytest.approx(0.1, abs=0.03)
    assert result.dropped["weights"] > 0
    for weights, part in ((("1",), "1 weight for 2"), (("1", "x"), "numbers"), (("1", "0"), "above 0")):
        with pytest.raises(UserError, match=part):
            prepare(replace(weighted, weights=weights, overwrite=True))


def test_a_small_input_is_repeated_rather_than_others_cut(config, tmp_path, caplog):
    caplog.set_level("INFO", "cartilha")
    small = tmp_path / "small.txt"
    small.write_text("".join(f"A short line, number {i}, of English text.\n" for i in range(200)), encoding="utf-8")
    plain = replace(config, input=(*config.input, str(small)), output=str(tmp_path / "plain"))
    before = prepare(plain)
    weighted = replace(plain, weights=("0.9", "0.1"), max_repeats=100, output=config.output)
    result = prepare(weighted)
    assert result.dropped["weights"] == 0
    assert result.splits["validation"] == before.splits["validation"]  # what is held out is not repeated
    both = documents(result.store)["train"]
    assert set(both) == set(documents(plain.output)["train"]) and len(both) == result.splits["train"].num_documents
    times = {text: both.count(text) for text in both}
    assert {n for text, n in times.items() if "A short line" not in text} == {1}
    found = rows(result.store, "train")
    tokens = {name: sum(r["num_tokens"] for r in found if r["source"] == name) for name in ("textos.txt", "small.txt")}
    assert tokens["small.txt"] / sum(tokens.values()) == pytest.approx(0.1, abs=0.02)
    mixture = TokenStore(result.store).info["mixture"]
    assert [part["num_left_out"] for part in mixture] == [0, 0] and mixture[0]["times"] == pytest.approx(1)
    whole = int(mixture[1]["times"])
    assert {n for text, n in times.items() if "A short line" in text} <= {whole, whole + 1}
    assert "for 10.0% of the training tokens" in caplog.text and "documents are left out" not in caplog.text
    assert summarize(TokenStore(result.store)).clusters == summarize(TokenStore(plain.output)).clusters
    assert prepare(replace(weighted, overwrite=True)).was_ready
    # Where the small one may be repeated less often, the others are cut, and that is said.
    less = prepare(replace(weighted, max_repeats=2, output=str(tmp_path / "less")))
    assert less.dropped["weights"] > 0 and "documents are left out" in caplog.text
    counts = documents(less.store)["train"]
    assert {counts.count(text) for text in counts} == {1, 2}
    with pytest.raises(UserError, match="--max_repeats"):
        prepare(replace(weighted, max_repeats=0, overwrite=True))


def test_near_duplicates_stay_on_one_side(config, tmp_path, caplog):
    pytest.importorskip("rensa", reason="needs the extra text")
    copies = tmp_path / "copies.txt"
    changed = [text.replace(" que ", " qual ", 1) for text in PRIMER if " que " in text and len(text) > 600]
    copies.write_text("\n".join([*PRIMER, *changed]), encoding="utf-8")
    caplog.set_level("INFO", "cartilha")
    result = prepare(replace(config, input=(str(copies),), near_duplicates=True))
    sides = {
        row["doc_id"]: (split, row["cluster"])
        for split in ("train", "validation")
        for row in rows(config.output, split)
    }
    originals = [i for i, text in enumerate(PRIMER) if " que " in text and len(text) > 600]
    pairs = [
        (sides[f"copies.txt:{i + 1}"], sides[f"copies.txt:{len(PRIMER) + k + 1}"]) for k, i in enumerate(originals)
    ]
    assert len(pairs) > 20 and all(one == other for one, other in pairs)
    assert {split for (split, _), _ in pairs} == {"train", "validation"}
    assert result.leaks is not None and result.leaks["leak_rate"] == 0 < result.leaks["plain_leak_rate"]
    assert "near-duplicate in training" in caplog.text


def test_two_at_once_are_refused(config):
    store = Path(config.output)
    with work_directory.work_directory(store, {}):
        code = textwrap.dedent(
            f"""
            from cartilha.config import PrepareConfig
            from cartilha.pipeline.prepare import prepare
            prepare(PrepareConfig(input=({config.input[0]!r},), model="random:tiny", output={config.output!r}))
            """
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "in use by another process" in done.stderr


def test_a_tokenizer_that_cannot_begin_a_text_is_refused(config, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    plain = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": plain, "added_tokens": []}))
    with pytest.raises(UserError, match="neither a bos nor an eos"):
        prepare(replace(config, model=str(folder)))


def test_a_shuffled_limit_takes_documents_from_everywhere(config, lines, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHUFFLED_BYTES", 4_000)
    places = {}
    for name, seed, shuffle in (("head", 0, False), ("zero", 0, True), ("again", 0, True), ("one", 1, True)):
        output = str(tmp_path / name)
        prepare(replace(config, output=output, limit_documents=30, seed=seed, shuffle=shuffle))
        both = documents(output)
        places[name] = sorted(PRIMER.index(text) for text in [*both["train"], *both["validation"]] if text in PRIMER)
    assert places["head"] == list(range(30))
    assert max(places["zero"]) > 60 and places["zero"] == places["again"] != places["one"]
    assert contents(tmp_path / "zero") == contents(tmp_path / "again")
