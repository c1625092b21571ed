"""Baselines: figures by hand, and that a compressor's window reaches back over the whole prime."""

from __future__ import annotations

import bz2
import hashlib
import lzma
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cartilha.corpus.primer import primer_texts
from cartilha.evaluation import baselines, compressed
from cartilha.evaluation.baselines import (
    UnigramCollector,
    token_counts,
    uniform,
    unigram_log_probabilities,
    unigram_nll,
)
from cartilha.evaluation.compressed import COMPRESSED_SIZE, MAX_PRIME_BYTES, CompressedText
from cartilha.evaluation.documents import ScoredDocuments
from cartilha.evaluation.sums import Sums


def bits_per_byte(name: str, text: bytes, prime: bytes | None = None) -> float:
    key = None if prime is None else hashlib.sha256(prime).hexdigest()
    figures = CompressedText(text, key, lambda: prime or b"").figures()
    return figures[name if prime is None else f"{name}_primed"]["bits_per_byte"]


COMPRESSORS = [partial(bits_per_byte, name) for name in COMPRESSED_SIZE]


def unigram(counts: np.ndarray, ids: list[np.ndarray], num_bytes: int = 1) -> dict[str, float | None]:
    """Figures of documents that each have so many bytes, from a training text of these counts."""
    collector = UnigramCollector(np.repeat(np.arange(len(counts)), counts), len(counts))
    ones = np.ones(len(ids), np.int64)
    num_tokens = np.array([len(own) for own in ids])
    names = ["" for _ in ids]
    collector.observe(
        ScoredDocuments(ids, num_tokens, num_bytes * ones, ones, ones, ones.astype(bool), names, names, names)
    )
    return collector.figures().get("unigram", {})


def noise(num_bytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(num_bytes)


# Uniform


def test_the_uniform_model_has_the_number_of_rows_as_perplexity():
    assert uniform(256, Sums(num_tokens=30, num_bytes=60)) == pytest.approx({"perplexity": 256, "bits_per_byte": 4})


# Unigram


def test_a_unigram_model_by_hand():
    # 6 tokens, 3 distinct, 6 rows: p = (c + 1/2) / 9.
    counts = np.array([3, 2, 1, 0, 0, 0])
    probabilities = np.exp(unigram_log_probabilities(counts))
    assert probabilities == pytest.approx(np.array([7, 5, 3, 1, 1, 1]) / 18)
    ids = [np.array([0, 5], np.uint16), np.array([], np.uint16), np.array([2], np.uint16)]
    nll = -math.log(7 / 18 * 1 / 18 * 3 / 18)
    assert unigram_nll(counts, ids) == pytest.approx([-math.log(7 / 18 * 1 / 18), 0, -math.log(3 / 18)])
    expected = {"perplexity": math.exp(nll / 3), "bits_per_byte": nll / 30 / math.log(2)}
    assert unigram(counts, ids, num_bytes=10) == pytest.approx(expected)


@pytest.mark.parametrize("counts", [[3, 0, 0], [0, 0, 0], [1, 1, 1], [10**12, 1, 0], [5]])
def test_unigram_probabilities_sum_to_one_and_none_is_zero(counts):
    probabilities = np.exp(unigram_log_probabilities(np.array(counts)))
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert (probabilities > 0).all()


def test_without_training_text_the_unigram_model_is_the_uniform_one():
    ids = [np.array([1, 2, 2])]
    expected = uniform(50, Sums(num_tokens=3, num_bytes=7))
    assert unigram(np.zeros(50, np.int64), ids, num_bytes=7) == pytest.approx(expected)


def test_few_training_tokens_do_not_make_it_nearly_uniform():
    # Add-one would give the 50,000 rows that never occur most of the mass.
    generator = np.random.default_rng(1)
    draw = generator.zipf(1.5, 4000) % 50_000
    counts, ids = np.bincount(draw[:3000], minlength=50_000), [draw[3000:]]
    add_one = math.exp(-np.log((counts + 1) / (3000 + 50_000))[draw[3000:]].mean())
    assert unigram(counts, ids)["perplexity"] < add_one / 2


def test_what_a_unigram_model_cannot_score_is_refused():
    counts = np.ones(4, np.int64)
    with pytest.raises(ValueError, match="beyond the 4 rows"):
        unigram_nll(counts, [np.array([1]), np.array([4])])
    assert unigram(counts, [np.array([], np.int64)]) == {}
    with pytest.raises(ValueError, match="one count for each row"):
        unigram_log_probabilities(np.array([1, -1]))


# Counts


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_tokens_are_counted_chunk_by_chunk(tmp_path: Path, monkeypatch, dtype):
    ids = np.random.default_rng(2).integers(0, 90, 1003).astype(dtype)
    ids.tofile(tmp_path / "train.tokens")
    tokens = np.memmap(tmp_path / "train.tokens", dtype=dtype, mode="r")
    monkeypatch.setattr(baselines, "TOKENS_A_CHUNK", 100)
    counts = token_counts(tokens, 100)
    assert counts.dtype == np.int64
    assert counts.tolist() == [int((ids == i).sum()) for i in range(100)]
    assert counts.sum() == 1003
    sizes = []
    count = np.bincount
    monkeypatch.setattr(np, "bincount", lambda chunk, **options: (sizes.append(len(chunk)), count(chunk, **options))[1])
    token_counts(tokens, 100)
    assert sizes == [100] * 10 + [3], "the whole file at once would be eight bytes a token in memory"


def test_an_empty_text_has_no_counts_and_ids_beyond_the_rows_are_refused():
    assert token_counts(np.zeros(0, np.uint16), 3).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="the token 7, but the model only 7 rows"):
        token_counts(np.array([1, 7], np.uint16), 7)


# Compressors


@pytest.mark.parametrize("compress", COMPRESSORS)
def test_noise_takes_eight_bits_and_repetition_nearly_none(compress):
    assert compress(noise(100_000)) == pytest.approx(8, abs=0.02)
    assert compress(b"cartilha " * 10_000) < 0.02


@pytest.mark.parametrize("compress", COMPRESSORS)
def test_known_text_is_nearly_free_and_unrelated_text_no_help(compress):
    text = noise(50_000)
    assert compress(text, noise(100_000, seed=1)) == pytest.approx(8, abs=0.05)
    assert compress(text, text) < 0.3
    assert compress(text, b"") == pytest.approx(compress(text), abs=0.01)


@pytest.mark.parametrize("compress", COMPRESSORS)
def test_portuguese_lies_where_general_compressors_put_it(compress):
    text = "\n".join(text.text for text in primer_texts()).encode("utf-8")
    half = len(text) // 2
    plain, primed = compress(text[half:]), compress(text[half:], text[:half])
    assert plain == pytest.approx(8 * len(bz2.compress(text[half:])) / len(text[half:]), rel=0.25)
    assert primed < 0.95 * plain


def test_xz_is_what_the_command_makes_of_it():
    text = b"".join(b"%d palavras\n" % (i * i) for i in range(20_000))
    assert 8 * len(lzma.compress(text)) / len(text) == pytest.approx(bits_per_byte("xz", text), abs=0.01)


@pytest.mark.parametrize("compress", COMPRESSORS)
def test_the_window_reaches_over_the_longest_prime_and_a_long_text(compress):
    # What is known lies at the very beginning of the longest prime, and again at the end of 8 MB more.
    known = noise(20_000)
    prime = known + bytes(MAX_PRIME_BYTES - len(known))
    text = bytes(8_000_000) + known
    free = compress(text, prime) * len(text) / 8
    assert free < 2_000
    unknown = compress(text, bytes(MAX_PRIME_BYTES)) * len(text) / 8
    assert unknown > 19_000, "the same without the known part would prove nothing"


@pytest.mark.parametrize("compress", COMPRESSORS)
def test_of_a_longer_prime_the_end_counts(compress, monkeypatch):
    monkeypatch.setattr(compressed, "MAX_PRIME_BYTES", 30_000)
    text, other = noise(20_000), noise(30_000, seed=1)
    assert compress(text, other + text) < 0.3
    assert compress(text, text + other) > 7.9


def test_a_text_is_compressed_beside_the_scoring_once_and_then_known(monkeypatch):
    text, prime = b"o rato roeu a roupa do rei de roma " * 99, b"a rainha roeu o resto " * 50
    asked: list[str] = []

    def read() -> bytes:
        asked.append("prime")
        return prime

    found = CompressedText(text, "a store", read).figures()
    for name, size in COMPRESSED_SIZE.items():
        assert found[name] == {"bits_per_byte": 8 * size(text) / len(text), "num_bytes": len(text)}
        primed = 8 * (size(prime + text) - size(prime)) / len(text)
        assert found[f"{name}_primed"] == {"bits_per_byte": primed, "num_bytes": len(text)}
    for name in ("xz", "zstd"):
        monkeypatch.setitem(COMPRESSED_SIZE, name, lambda data: pytest.fail("it is compressed again"))
    assert CompressedText(text, "a store", read).figures() == found and asked == ["prime"]
    assert CompressedText(text, None, read).figures() == {name: found[name] for name in ("xz", "zstd")}
    assert CompressedText(b"", "a store", read).figures() == {}


def test_compressors_need_no_cache_and_their_faults_are_raised(tmp_path: Path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the cache's folder would be")
    monkeypatch.setenv("CARTILHA_CACHE", str(tmp_path / "cache"))
    assert CompressedText(b"abc" * 99, None, bytes).figures()["xz"]["num_bytes"] == 297

    def gone() -> bytes:
        raise OSError("the store is gone")

    with pytest.raises(OSError, match="gone"):
        CompressedText(b"abc", "a store", gone).figures()


def test_of_an_empty_text_there_are_no_figures():
    assert CompressedText(b"", None, bytes).figures() == CompressedText(b"", "a store", lambda: b"abc").figures() == {}
