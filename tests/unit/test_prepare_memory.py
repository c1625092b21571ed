"""What `prepare` decides about documents takes no more memory for more documents: arrays over all of them are files."""

from __future__ import annotations

import gc
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gigatoken import gigatoken_rs
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cartilha.corpus import near_duplicates, pieces
from cartilha.corpus.pieces import each, large_array, large_arrays_in, total, without
from cartilha.corpus.primer import primer_texts
from cartilha.corpus.signatures import NUM_VALUES, save_signatures
from cartilha.corpus.splits import SplitRule
from cartilha.preparation import assembly, selection
from cartilha.preparation import index as index_module
from cartilha.preparation.index import DocumentIndex
from cartilha.preparation.selection import Amount, count_shard
from cartilha.tokens import encoder as encoder_module
from cartilha.tokens import ngrams
from cartilha.tokens.proof import prove
from cartilha.tokens.tokenizer import load_tokenizer

SHARD_DOCUMENTS = 4000
TARGET_DOCUMENTS = 100


def index_of(number: int, folder: Path, generator: np.random.Generator) -> DocumentIndex:
    """Documents in shards that have nothing but signatures: one in ten is a near-duplicate of another one."""
    tasks = []
    for begin in range(0, number, SHARD_DOCUMENTS):
        directory = folder / f"{begin}"
        directory.mkdir()
        values = generator.integers(0, 2**16, (SHARD_DOCUMENTS, NUM_VALUES)).astype(np.uint16)
        values[::10] = values[1::10]
        save_signatures(directory / "signatures.npy", values)
        tasks.append(SimpleNamespace(directory=directory, shard=SimpleNamespace(number=len(tasks))))
    columns: dict[str, np.ndarray] = {
        "hashes": generator.integers(0, 2**64, (number, 2), np.uint64),
        "positions": generator.random(number),
        "num_tokens": generator.integers(5, 50, number),
        "sources": (np.arange(number) >= TARGET_DOCUMENTS).astype(np.int32),
    }
    arrays = {name: large_array(values.shape, values.dtype) for name, values in columns.items()}
    for name, values in columns.items():
        arrays[name][:] = values
    return DocumentIndex(tasks, np.arange(0, number + 1, SHARD_DOCUMENTS), **arrays)


def executor(function: Any, tasks: Any) -> Any:
    """Shards without tokens: counts and weights as if there were some."""
    for task in tasks:
        generator = np.random.default_rng(task.task.shard.number)
        if function is count_shard:
            yield generator.integers(100, 200, (3, ngrams.NUM_BUCKETS))
        else:
            sums = generator.integers(-9, 9, len(task.num_tokens)) * ngrams.FIXED_POINT
            yield task.task.shard.number, np.stack([sums, sums + 1])


def memory_of_decision(number: int, folder: Path, near: bool) -> np.ndarray:
    """Bytes of Python and numpy while it is decided where so many documents go: at most, and held at the end."""
    asked: Any = SimpleNamespace(num_held_out=0, num_targets=1, mixture=None, amount=Amount(0.2), rule=SplitRule())
    folder.mkdir()
    with large_arrays_in(folder):
        index = index_of(number, folder, np.random.default_rng(0))
        tracemalloc.start()
        sides = assembly.decide(index, asked, executor, near_duplicates=near)
        gc.collect()
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert sides.train.sum() > number // 10 and sides.validation.sum() > 10
    return np.array([peak, held])


@pytest.mark.parametrize("near", [False, True])
def test_memory_does_not_grow_with_the_number_of_documents(near, tmp_path, monkeypatch):
    for module, name, value in (
        (pieces, "PIECE", 2000),
        (pieces, "IN_MEMORY_BYTES", 0),
        (selection, "PIECE", 2000),
        (index_module, "SORTED_DOCUMENTS", 2000),
        (near_duplicates, "KEYS_AT_ONCE", 4000),
        (near_duplicates, "PAIRS_AT_ONCE", 500),
        (ngrams, "NUM_BUCKETS", 64),
    ):
        monkeypatch.setattr(module, name, value)
    sizes = (4000, 12_000, 28_000)  # the first one fills the caches of numpy and others
    _, small, large = (memory_of_decision(number, tmp_path / f"{number}", near) for number in sizes)
    assert ((large - small) / 16_000 < 0.8).all(), "bytes per document: a mask takes 1"


@given(arrays.arrays(np.int32, st.integers(1, 30)), st.data())
def test_what_is_computed_piece_by_piece_is_what_numpy_gives(values, data):
    masks = [data.draw(arrays.arrays(bool, len(values))) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder, large_arrays_in(Path(folder)):
        patch.setattr(pieces, "PIECE", 7)
        patch.setattr(pieces, "IN_MEMORY_BYTES", 0)
        assert without(*masks).tolist() == (masks[0] & ~masks[1] & ~masks[2]).tolist()
        assert (
            each(np.where, *masks[:1], values, -values, dtype=np.int32).tolist()
            == np.where(masks[0], values, -values).tolist()
        )
        assert total(values, masks[0]) == int(values[masks[0]].astype(np.int64).sum())


def test_the_fast_tokenizer_forgets_the_words_that_it_has_met(monkeypatch):
    texts = [one.text.encode("utf-8") for one in primer_texts()[:40]]
    encoder = prove(load_tokenizer("random:tiny"), ["Bom dia."])
    assert encoder.proof.backend == "gigatoken"
    whole = encoder.encode(texts)[0]
    made, load = [], gigatoken_rs.load_hf_json
    monkeypatch.setattr(gigatoken_rs, "load_hf_json", lambda text: made.append(text) or load(text))
    monkeypatch.setattr(encoder_module, "RENEWED_AFTER_BYTES", sum(map(len, texts)) // 4)
    fresh = replace(encoder)
    assert np.concatenate([fresh.encode([text])[0] for text in texts]).tolist() == whole.tolist()
    assert 4 <= len(made) <= 6
