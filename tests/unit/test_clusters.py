"""Near-duplicates are found within a corpus of any size: signatures, bands, pairs, clusters."""

from __future__ import annotations

import random
import re
import sys
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cartilha.corpus import near_duplicates as module
from cartilha.corpus import pieces
from cartilha.corpus.near_duplicates import cluster
from cartilha.corpus.primer import primer_texts
from cartilha.corpus.signatures import NUM_VALUES, save_signatures, signatures
from cartilha.errors import UserError

pytest.importorskip("rensa", reason="the extra `text` is not installed")
TEXTS = [text.text for text in primer_texts()]
WORDS = [word for text in TEXTS for word in text.split()]


def shingles(text: str) -> set[str]:
    """Its word trigrams."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + 3]) for i in range(len(words) - 2)}


def with_changes(text: str, share: float, generator: random.Random) -> str:
    """The text with this share of its words replaced by others of the primer."""
    words = text.split()
    for i in generator.sample(range(len(words)), round(share * len(words))):
        words[i] = generator.choice(WORDS)
    return " ".join(words)


def clusters_of(texts: list[str], folder: Path, parts: int = 1) -> np.ndarray:
    files = []
    for number, rows in enumerate(np.array_split(np.arange(len(texts)), parts)):
        files.append(folder / f"{number}.npy")
        save_signatures(files[-1], signatures([texts[row] for row in rows]))
    return cluster(files)


def test_agreement_estimates_the_jaccard_similarity():
    generator = random.Random(1)
    changed = [with_changes(text, share, generator) for text in TEXTS for share in (0.05, 0.15)]
    exact = [
        len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))
        for a, b in zip([text for text in TEXTS for _ in range(2)], changed, strict=True)
    ]
    own, other = signatures([text for text in TEXTS for _ in range(2)]), signatures(changed)
    error = (own == other).mean(axis=1) - exact
    deviation = np.sqrt(np.mean(np.array(exact) * (1 - np.array(exact)))) / np.sqrt(NUM_VALUES)
    assert abs(error.mean()) < 4 * deviation / np.sqrt(len(error))
    assert error.std() < 1.1 * deviation


def test_signatures_depend_on_the_words_alone():
    text = "O Moleiro subiu, com a escada, ao TELHADO da institucionalização."
    same = "o moleiro subiu com a ESCADA ao telhado... da Institucionalização"
    other = "o moleiro subiu com a escada ao telhado da institucionalidade e"
    values = signatures([text, same, other, "", "?!", "Olá", "olá mundo", "mundo olá!"])
    assert values.dtype == np.uint16 and values.shape == (8, NUM_VALUES)
    assert (values[0] == values[1]).all() and (values[0] == values[2]).mean() < 0.9
    quoted = '"O Moleiro" subiu - com a escada - ao telhado... da institucionalização.'
    typeset = unicodedata.normalize("NFD", "“O Moleiro” subiu – com a escada – ao\xa0telhado… da institucionalização.")
    assert (signatures([quoted, typeset, unicodedata.normalize("NFD", text)]) == values[0]).all()
    assert not values[3:5].any() and values[5].any()
    assert (values[5] != values[6]).mean() > 0.9
    alone = np.concatenate([signatures([t]) for t in [text, same, other, "", "?!", "Olá", "olá mundo"]])
    assert (values[:7] == alone).all()  # whatever else is in the batch


def test_words_that_differ_late_or_in_length_differ():
    long = "a" * 30
    values = signatures([f"{long} {long}b", f"{long} {long}", "ab abc abcd", "ab abc abcde", "x y z w", "x y z"])
    assert (values[0] != values[1]).mean() > 0.9
    assert (values[2] != values[3]).mean() > 0.9
    assert 0.2 < (values[4] == values[5]).mean() < 0.8  # one of two trigrams


def test_big_texts_and_many_texts_are_the_same_by_themselves():
    big = " ".join(TEXTS * 3)
    assert (signatures([big, TEXTS[0]])[0] == signatures([big])[0]).all()
    assert (signatures(TEXTS)[-1] == signatures(TEXTS[-1:])[0]).all()


@pytest.mark.parametrize("parts", [1, 4])
def test_planted_near_duplicates_are_found_and_nothing_else(tmp_path, parts):
    generator = random.Random(0)
    shares = (0.05, 0.10, 0.15)
    planted = [with_changes(text, shares[i % 3], generator) for i, text in enumerate(TEXTS)]
    found = clusters_of(TEXTS + planted, tmp_path, parts)
    assert (found[: len(TEXTS)] == np.arange(len(TEXTS))).all()  # no two texts of the primer are alike
    partners = found[len(TEXTS) :]
    right = partners == np.arange(len(TEXTS))
    assert right.mean() >= 0.95
    assert (partners[~right] == np.flatnonzero(~right) + len(TEXTS)).all()  # not found, rather than wrong


def test_clusters_are_joined_through_their_members(tmp_path):
    generator = random.Random(3)
    chain = [TEXTS[0]]
    for _ in range(6):
        chain.append(with_changes(chain[-1], 0.08, generator))
    found = clusters_of([TEXTS[1], *chain[::-1], "", TEXTS[2], ""], tmp_path, 3)
    assert found.tolist() == [0, *[1] * 7, 8, 9, 10]  # texts without words are alone
    assert not len(shingles(chain[0]) & shingles(chain[-1])) / len(shingles(chain[0]) | shingles(chain[-1])) > 0.3


def plain_clusters(values: np.ndarray) -> list[int]:
    """As `cluster` finds them, all at once: for each band, each document is compared with the first of its key."""
    numbers = list(range(len(values)))
    for band in range(module.NUM_BANDS):
        firsts: dict[bytes, int] = {}
        for document, own in enumerate(values[:, band * module.BAND_VALUES : (band + 1) * module.BAND_VALUES]):
            first = firsts.setdefault(own.tobytes(), document)
            if own.any() and (values[first] == values[document]).mean() >= module.MIN_SIMILARITY:
                old, new = sorted([numbers[first], numbers[document]], reverse=True)
                numbers = [new if number == old else number for number in numbers]
    return numbers


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(1, 4), st.integers(1, 12))
def test_arrays_in_files_and_small_chunks_give_the_same(seed, num_documents, parts, at_once):
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 3, (1 + num_documents // 8, NUM_VALUES)).astype(np.uint16)
    values = values[generator.integers(0, len(values), num_documents)]
    changed = generator.random(values.shape) < generator.random((num_documents, 1))
    values[changed] = generator.integers(0, 9, changed.sum())
    values[: num_documents // 9] = 0  # without words
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{part}.npy" for part in range(parts)]
        for file, own in zip(files, np.array_split(values, parts), strict=True):
            save_signatures(file, own)
        patch.setattr(pieces, "PIECE", 7)
        patch.setattr(pieces, "IN_MEMORY_BYTES", 0)
        patch.setattr(module, "KEYS_AT_ONCE", at_once)
        patch.setattr(module, "PAIRS_AT_ONCE", 2 * at_once)
        with pieces.large_arrays_in(Path(folder)):
            assert cluster(files).tolist() == plain_clusters(values)


def test_no_documents(tmp_path):
    assert clusters_of([], tmp_path).tolist() == []
    assert clusters_of(["a"], tmp_path, 3).tolist() == [0]


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UserError, match="extra `text`"):
        signatures(["a"])


def test_documents_that_share_a_part_are_proposed_and_not_taken(tmp_path, monkeypatch):
    notice = " ".join(TEXTS[0].split()[:60])
    texts = [f"{notice} {' '.join(text.split()[:200])}" for text in TEXTS[1:61]]
    assert (clusters_of(texts, tmp_path) == np.arange(len(texts))).all()
    monkeypatch.setattr(module, "MIN_SIMILARITY", 0.0)
    assert len(set(clusters_of(texts, tmp_path).tolist())) < len(texts)  # not vacuous: some share a band
