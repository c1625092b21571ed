"""What results stand beside: guessing, counting tokens, and general compressors.

A model that has learnt nothing of the language still has a perplexity. The uniform model guesses among all rows; the
unigram model knows how often each token occurs, and no context; a compressor knows only what it has read so far, which
primed is the training text, too. A figure near one of these says what the model is worth.

The text of compressors is the documents joined by one line break, in the order of the corpus; its bits are divided by
its bytes.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from cartilha.evaluation.perplexity import perplexity

TOKENS_A_CHUNK = 1 << 22  # counted at a time: 32 MB as the 64-bit integers that numpy counts

# Primed figures cost two compressions of the prime more, at about 1 s/MB, and the repetitions that help most are in any
# few MB: 4 MiB is a million tokens.
MAX_PRIME_BYTES = 4 << 20
# xz needs about 11.5 times its dictionary in memory: 740 MB at this one (its own preset 9).
MAX_XZ_DICTIONARY_BYTES = 64 << 20
MIN_XZ_DICTIONARY_BYTES = 8 << 20  # preset 6
# Its window is 128 MiB; at level 19, the highest without `--ultra`, it is 8 MiB, which a prime and a text soon fill.
# The window, and the memory with it, is cut to the input.
ZSTD_LEVEL = 22


@dataclass(frozen=True)
class Baseline:
    """A model without context.

    Attributes:
        perplexity: exp(S / N), of tokens.
        bits_per_byte: S / (B ln 2); None where byte figures are refused.
    """

    perplexity: float
    bits_per_byte: float | None

    def to_dict(self) -> dict[str, float | None]:
        """The record below `baselines`."""
        return asdict(self)


def uniform(num_rows: int, num_tokens: int, num_bytes: int | None) -> Baseline:
    """The model that gives every row of the vocabulary the same probability: its perplexity is the number of rows.

    Args:
        num_rows: Rows of the head, those included that no token uses.
        num_tokens: Tokens of the text.
        num_bytes: Its UTF-8 bytes; None where byte figures are refused.
    """
    if num_rows < 1:
        raise ValueError(f"A vocabulary has one row or more, not {num_rows}.")
    return Baseline(float(num_rows), _bits_per_byte(num_tokens * math.log(num_rows), num_bytes))


def token_counts(tokens: np.ndarray, num_rows: int) -> np.ndarray:
    """How often each id occurs: int64, shape (num_rows,).

    Args:
        tokens: Ids, shape (num_tokens,); a memory-mapped store is read once, a few MB at a time.
        num_rows: Rows of the head.

    Raises:
        ValueError: An id is beyond the rows.
    """
    counts = np.zeros(num_rows, np.int64)
    for begin in range(0, len(tokens), TOKENS_A_CHUNK):
        chunk = np.bincount(tokens[begin : begin + TOKENS_A_CHUNK], minlength=num_rows)
        if len(chunk) > num_rows:
            raise ValueError(f"The text has the token {len(chunk) - 1}, but the model only {num_rows} rows.")
        counts += chunk
    return counts


def unigram_log_probabilities(train_counts: np.ndarray) -> np.ndarray:
    """Logarithms of each row's probability under the unigram model of the training text: shape (num_rows,).

    Smoothing: Witten and Bell's (1991, "The zero-frequency problem", method C), interpolated with the uniform model:
    p = (c + T / V) / (N + T), for c occurrences of a token among N, of T distinct ones, and V rows. It is additive
    smoothing with T / V in place of 1, so it needs no held-out text, and the probabilities of all rows sum to one.
    Add-one gives rows that never occur V / (N + V) of the mass: of 3,047 tokens of Portuguese under OPT's 50,272 rows
    it makes a perplexity of 5,843, where this makes 791; of 770,475 tokens 511 and 490. Absolute discounting is
    better by 0 to 2 % there, and needs rules for texts without tokens that occur once or twice.

    Args:
        train_counts: Occurrences of each row, shape (num_rows,); all zero gives the uniform model.
    """
    counts = np.asarray(train_counts, np.float64)
    if counts.ndim != 1 or not len(counts) or (counts < 0).any():
        raise ValueError("A unigram model needs one count for each row, none below zero.")
    total, distinct, rows = counts.sum(), np.count_nonzero(counts), len(counts)
    if not total:
        return np.full(rows, -math.log(rows))
    log_probabilities: np.ndarray = np.log(counts + distinct / rows) - math.log(total + distinct)
    return log_probabilities


def unigram_nll(train_counts: np.ndarray, evaluation_ids: Sequence[np.ndarray]) -> np.ndarray:
    """Nats of each document under the unigram model: float64, shape (num_documents,).

    Args:
        train_counts: Of the training text alone; see `unigram_log_probabilities`.
        evaluation_ids: Token ids of each document.

    Raises:
        ValueError: An id is beyond the rows.
    """
    surprisal = -unigram_log_probabilities(train_counts)
    if any(len(ids) and int(ids.max()) >= len(surprisal) for ids in evaluation_ids):
        raise ValueError(f"The text has tokens beyond the {len(surprisal)} rows that were counted.")
    return np.array([surprisal[ids].sum() for ids in evaluation_ids], np.float64)


def unigram(train_counts: np.ndarray, evaluation_ids: Sequence[np.ndarray], num_bytes: int | None) -> Baseline:
    """The unigram model of the training text, on the evaluation text.

    Args:
        train_counts: Of the training text alone, shape (num_rows,).
        evaluation_ids: Token ids of each document, one token or more in all; no prefix, no eos.
        num_bytes: UTF-8 bytes of those documents; None where byte figures are refused.
    """
    num_tokens = sum(len(ids) for ids in evaluation_ids)
    if not num_tokens:
        raise ValueError("There is nothing to score: the documents have no tokens.")
    nll = math.fsum(unigram_nll(train_counts, evaluation_ids))
    return Baseline(perplexity(nll / num_tokens), _bits_per_byte(nll, num_bytes))


def xz_bits_per_byte(text: bytes, prime: bytes | None = None) -> float:
    """What xz makes of a text: bits of its compressed form for each byte.

    LZMA2 as `xz -6` does it, without the container's some 70 bytes. The dictionary grows with the input up to 64 MiB,
    so every repetition within that distance is found; beyond, text further back is forgotten. Takes about 1 s/MB.

    Args:
        text: UTF-8, one byte or more.
        prime: Text that was read before and costs nothing: the figure is that of size(prime + text) - size(prime).
            Of a longer one the last `MAX_PRIME_BYTES` count.
    """
    return _compressed_bits_per_byte(_xz_size, text, prime)


def zstd_bits_per_byte(text: bytes, prime: bytes | None = None) -> float:
    """What zstd makes of a text: bits of its compressed form for each byte.

    Level 22, whose window of 128 MiB spans prime and text; beyond, text further back is forgotten. About 1 s/MB.

    Args:
        text: UTF-8, one byte or more.
        prime: Text that was read before and costs nothing: the figure is that of size(prime + text) - size(prime).
            Of a longer one the last `MAX_PRIME_BYTES` count.
    """
    return _compressed_bits_per_byte(_zstd_size, text, prime)


def _compressed_bits_per_byte(size: Callable[[bytes], int], text: bytes, prime: bytes | None) -> float:
    if not text:
        raise ValueError("There is nothing to compress: the text is empty.")
    primer = prime[-MAX_PRIME_BYTES:] if prime else b""
    return 8 * (size(primer + text) - (size(primer) if primer else 0)) / len(text)


def _xz_size(data: bytes) -> int:
    dictionary = min(MAX_XZ_DICTIONARY_BYTES, max(MIN_XZ_DICTIONARY_BYTES, 1 << (len(data) - 1).bit_length()))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": dictionary}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))


def _zstd_size(data: bytes) -> int:
    return int(pa.Codec("zstd", compression_level=ZSTD_LEVEL).compress(data).size)


# The compressors by name: bytes of the compressed form. Both release Python's lock while they work.
COMPRESSED_SIZE: dict[str, Callable[[bytes], int]] = {"xz": _xz_size, "zstd": _zstd_size}


def _bits_per_byte(nll: float, num_bytes: int | None) -> float | None:
    return nll / (num_bytes * math.log(2)) if num_bytes else None
