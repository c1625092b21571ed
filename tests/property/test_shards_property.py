"""However a file is cut into shards, the same documents come out, in the same order and with the same ids."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cartilha.corpus import plain_text
from cartilha.corpus.readers import ReadCounts, read_documents
from cartilha.corpus.records import ReadSettings
from cartilha.corpus.shards import shards, shuffled
from cartilha.corpus.sources import resolve_inputs
from reading import read_shard

LINES = st.lists(st.sampled_from(["", "a", "ção", "é\r", "\u2028", "um texto mais longo do que os outros", "\0"]))


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=LINES, target=st.integers(1, 60), count_bytes=st.integers(1, 50), ends=st.booleans())
def test_shards_give_what_the_whole_gives(tmp_path: Path, monkeypatch, kind, texts, target, count_bytes, ends):
    monkeypatch.setattr(plain_text, "COUNT_BYTES", count_bytes)
    path = tmp_path / f"a{kind}"
    if kind == ".parquet":
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=2)
    else:
        lines = texts if kind == ".txt" else [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        path.write_bytes(("\n".join(lines) + "\n" * ends).encode("utf-8"))
    whole, parts = ReadCounts(), ReadCounts()
    expected = list(read_documents([str(path)], counts=whole))
    cut = shards(resolve_inputs([str(path)]), ReadSettings(), target)
    found = []
    for shard in pickle.loads(pickle.dumps(cut)):
        counts = ReadCounts()
        found += read_shard(shard, ReadSettings(), counts)
        parts.add(counts)
    assert found == expected and parts == whole
    assert [shard.number for shard in cut] == list(range(len(cut)))
    if kind != ".parquet":
        assert sum(shard.num_bytes for shard in cut) == path.stat().st_size
        longest = max(map(len, path.read_bytes().split(b"\n")), default=0) + 1
        assert all(shard.num_bytes <= target + longest for shard in cut)  # not vacuous: it is cut where it can be


def test_small_files_share_a_shard_and_large_ones_are_cut(tmp_path):
    for name, size in (("a", 3), ("b", 3), ("c", 40), ("d", 1)):
        (tmp_path / f"{name}.txt").write_text("x\n" * size, encoding="utf-8", newline="")
    cut = shards(resolve_inputs([str(tmp_path)]), ReadSettings(), 20)
    names = [[(part.source.stem, part.span.begin) for part in shard.parts] for shard in cut]
    assert names == [
        [("a", 0), ("b", 0)],
        [("c", 0)],
        [("c", 20)],
        [("c", 40)],
        [("c", 60)],
        [("d", 0)],
    ]
    again = shuffled(cut, 1)
    assert again != cut and sorted(again, key=lambda shard: cut[0].parts != shard.parts)[0].parts == cut[0].parts
    assert {shard.parts for shard in again} == {shard.parts for shard in cut}
    assert again == shuffled(cut, 1) != shuffled(cut, 2)
