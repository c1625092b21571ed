"""Proves on hard cases and real text that gigatoken gives the same ids as `tokenizers` for a tokenizer."""

from __future__ import annotations

import importlib.metadata
import json
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from cartilha.errors import counted, first_line, log
from cartilha.tokens.byte_level import BYTE_CHARACTERS
from cartilha.tokens.encoder import Encoder, Proof, cut
from cartilha.tokens.text_counts import ranges
from cartilha.tokens.tokenizer import TextTokenizer

MAX_SAMPLE_BYTES = 300_000  # tokenizers encodes about 2 MB/s on a core
MAX_SLOW_CODE_POINTS = 1000  # if more differ, the two are not the same tokenizer

HARD_CASES = (
    "Era uma vez, na fazenda São João, a irmã do Zé: «pão-de-ló, água e açúcar».",
    "d'água l'été don't DON'T can't we'LL I'M they've 's 't 're 've 'm 'll 'd '' '",
    "  dois  espaços \t e tabulação\n\n\n linhas \r\n fim   ",
    "\x00\x01\x02\x04\x05\x0b\x0c\x1c\x1d\x1e\x1f\x7f\x80\x85\x9f\xa0\xad fim",
    "1234567890 12,5 % 1.000.000,00 R$ 3²½Ⅷ٣४五 20.º 1ª 007 0x1F a1b2c3",
    "👩‍👩‍👧‍👦 👍🏽 🇧🇷🇵🇹 ☺️ ❤️‍🔥 🫠 ✂︎ \U0001f9d1\U0001f3fe‍🚀",
    "a\u0303o e\u0301 c\u0327 \u0301 \u0303a\u0302\u0301 nu\u0308 Z\u0351\u036b\u0343\u036a",
    "Привет, мир! Γειά σου, Κόσμε. שָׁלוֹם עוֹלָם. مَرْحَبًا بِالعَالَم. नमस्ते दुनिया। สวัสดีชาวโลก",
    "你好，世界。こんにちは、世界！ カタカナ ﾊﾝｶｸ 안녕하세요 세계 \u1112\u1161\u11ab\u1100\u1173\u11af ไทย ລາວ ខ្មែរ",
    "\ufeffBOM \ufffd \u200b\u200c\u200d\u200e\u200f \u2028 \u2029 \u202f \u3000 \ue000 \uffff \U0010ffff \U000e0067",
    "ǅ ǈ ﬁ ﬂ ß ẞ İ ı Ⓐ ª º µ Ω K Å ℃ ™ © ® … — – ‘’ “” ‹› ¿¡ ×÷ ∑∫√ ←→ █▓ ♪",
    "https://exemplo.com.br/a?b=c&d=%20#e foo@bar.pt C:\\pasta\\ficheiro.txt <b>x</b> {\"a\": [1, 2]} a_b __init__",
    "a" * 3000 + " " * 3000 + "!" * 300 + "9" * 300 + "ã" * 300 + "\n" * 300 + "b",
    "palavraMuitoComprida" * 40 + "\u00a0\u00a0 \u00a0x",
)  # fmt: skip


def prove(tokenizer: TextTokenizer, documents: Sequence[str]) -> Encoder:
    """The encoder for a tokenizer: the fast one if the whole sample agrees, else `tokenizers` and a line that says why.

    The sample has as many of the corpus's first documents as there is room for.
    """
    whole_json, num_ids = tokenizer.backend.to_str(), tokenizer.num_ids
    sample = [*HARD_CASES, *_with_literal_tokens(tokenizer), *_of_every_kind(), *_first(documents)]
    num_bytes, texts = sum(len(text.encode("utf-8")) for text in sample), counted(len(sample), "text")

    def slow(reason: str) -> Encoder:
        log.warning("Tokenizing with tokenizers, at about a twentieth of the speed, since gigatoken %s.", reason)
        can_cut = _may_be_cut(right, sample)
        right.proof = Proof("tokenizers", reason, len(sample), num_bytes, (), can_cut)
        return right

    right = Encoder(whole_json, None, num_ids, Proof("tokenizers", "", 0, 0), slow=tokenizer)
    try:
        fast_json, split_numbers = for_fast_path(whole_json, num_ids)
        fast = Encoder(whole_json, fast_json, num_ids, Proof("gigatoken", "", 0, 0), split_numbers, tokenizer)
        # gigatoken raises a RuntimeError for what it cannot read, and panics on a fault of its own.
        expected = _ids(right, sample)
        differing = _differing(fast, sample, expected)
    except ImportError as error:
        return slow(f"cannot be loaded ({error})")
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        return slow(f"does not take this tokenizer ({first_line(error)})")
    rare: tuple[tuple[int, int], ...] = ()
    if differing:
        rare = _characters_that_differ(right, fast, [sample[i] for i in differing])
        fast.proof = Proof("gigatoken", "", 0, 0, rare)
        if not rare or _differing(fast, sample, expected):
            begins = sample[differing[0]][:40]
            return slow(f"gives other ids for {len(differing)} of {texts}, such as {begins!r}")
    can_cut = _may_be_cut(fast, sample)
    fast.proof = Proof("gigatoken", "equal ids on the sample", len(sample), num_bytes, rare, can_cut)
    log.info(
        "Tokenizing with gigatoken %s: equal ids to tokenizers on a sample of %s (%.1f MB).",
        *(importlib.metadata.version("gigatoken"), texts, num_bytes / 1e6),
    )
    return fast


def for_fast_path(whole_json: str, num_ids: int) -> tuple[str, bool]:
    """The tokenizer as the fast path takes it, and whether numbers have to be split off before it.

    Special tokens are left out, since a literal one is text. gigatoken refuses a vocabulary that lacks bytes: ids from
    `num_ids` on stand for these, and mark the documents that need `tokenizers`.
    """
    whole: dict[str, Any] = json.loads(whole_json)
    whole["added_tokens"] = [token for token in whole["added_tokens"] if not token["special"]]
    whole["post_processor"] = None
    model = whole["model"]
    if model.get("type") == "BPE" and not model.get("byte_fallback") and isinstance(model["vocab"], dict):
        lacking = [character for character in BYTE_CHARACTERS if character not in model["vocab"]]
        model["vocab"].update({character: num_ids + i for i, character in enumerate(lacking)})
    steps = (whole["pre_tokenizer"] or {}).get("pretokenizers", [])
    split_numbers = [step["type"] for step in steps] == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]
    # A splitter that puts a space before its text would put one before each piece.
    split_numbers = bool(split_numbers and not steps[1]["add_prefix_space"] and whole["normalizer"] is None)
    if split_numbers:
        whole["pre_tokenizer"] = steps[1]
    return json.dumps(whole), split_numbers


def _with_literal_tokens(tokenizer: TextTokenizer) -> list[str]:
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    return [f"{token} e {token}texto{token} <{token}>" for token in added[:64]]


def _of_every_kind() -> list[str]:
    """Characters of every block, and all marks, numbers and separators, which splitters class in different ways."""
    categories = ((code_point, unicodedata.category(chr(code_point))) for code_point in range(0x80, 0x20000))
    known = ((code_point, category) for code_point, category in categories if category not in ("Cn", "Cs"))
    chosen = [code_point for code_point, category in known if category[0] in "MNZ" or code_point % 64 == 0]
    parts = [_in_context(code_point) for code_point in chosen]
    return ["".join(parts[i : i + 64]) for i in range(0, len(parts), 64)]


def _in_context(code_point: int) -> str:
    character = chr(code_point)
    return f"a{character}b{character}1 {character}.{character}"


def _first(documents: Sequence[str]) -> list[str]:
    """The first documents as far as the sample has room, the last one cut."""
    chosen: list[str] = []
    left = MAX_SAMPLE_BYTES
    for document in documents:
        if left <= 0:
            break
        chosen.append(document[:left])
        left -= len(chosen[-1].encode("utf-8"))
    return chosen


def _differing(encoder: Encoder, texts: Sequence[str], expected: list[np.ndarray]) -> list[int]:
    """The numbers of the texts to which the encoder gives other ids."""
    pairs = zip(_ids(encoder, texts), expected, strict=True)
    return [i for i, (one, other) in enumerate(pairs) if not np.array_equal(one, other)]


def _ids(encoder: Encoder, texts: Sequence[str]) -> list[np.ndarray]:
    flat, num_tokens, _ = encoder.encode([text.encode("utf-8", "replace") for text in texts])
    return np.split(flat, np.cumsum(num_tokens)[:-1])


def _characters_that_differ(right: Encoder, fast: Encoder, texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Ranges of the characters that each make a difference; none if there are too many."""
    code_points = sorted({ord(character) for text in texts for character in text if ord(character) >= 0x80})
    in_context = [_in_context(code_point) for code_point in code_points]
    differing = _differing(fast, in_context, _ids(right, in_context))
    return ranges(code_points[i] for i in differing) if len(differing) <= MAX_SLOW_CODE_POINTS else ()


def _may_be_cut(encoder: Encoder, sample: Sequence[str]) -> bool:
    """Whether pieces give the ids of the whole text, for all texts of the sample that can be cut."""
    any_cut = False
    for text in sample:
        pieces = list(cut(text, 200))
        if len(pieces) > 1 and all(a[-1].isalpha() and b[0] == " " and b[1:2].isalpha() for a, b in pairwise(pieces)):
            whole, parts = (encoder.encode([p.encode("utf-8") for p in part])[0] for part in ([text], pieces))
            if not np.array_equal(whole, parts):
                return False
            any_cut = True
    return any_cut
