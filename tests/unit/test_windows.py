"""Windows by hand, lm-eval's rolling windows, and protocols: names, limits and hashes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cartilha.errors import UserError
from cartilha.evaluation.windows import Protocol, Window, document_windows, first_tokens, make_protocol

PREFIX = -1  # how an input that is the prefix is written below


def seen(num_tokens: int, window: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """Input and scored token indices of each window; the prefix is -1."""
    return [
        (list(range(w.first_input, w.past - 1)), list(range(w.first_target, w.past)))
        for w in document_windows(num_tokens, window, stride)
    ]


def lm_eval_windows(num_tokens: int, window: int) -> list[tuple[list[int], list[int]]]:
    """lm-evaluation-harness' rolling windows (context_len 1), retold: what the model is given, and what is scored.

    The first window predicts as much as fits; each later one the next `window` tokens or what is left of them, given
    the `window` tokens before the last one predicted, of which those that are predicted themselves are fed as such.
    """
    tokens = list(range(num_tokens))
    first = min(window, num_tokens)
    found = [([PREFIX, *tokens[: first - 1]], tokens[:first])] if tokens else []
    predicted = first
    while predicted < num_tokens:
        count = min(num_tokens - predicted, window)
        end = predicted + count
        rolling, scored = tokens[end - window - 1 : end - 1], tokens[end - count : end]
        context = rolling[: len(rolling) - (count - 1)]  # made disjoint from what is scored
        found.append((context + scored[:-1], scored))
        predicted = end
    return found


def test_a_document_that_fits_is_one_window():
    assert seen(1, 4, 2) == [([PREFIX], [0])]
    assert seen(3, 4, 2) == [([PREFIX, 0, 1], [0, 1, 2])]
    assert seen(4, 4, 2) == [([PREFIX, 0, 1, 2], [0, 1, 2, 3])]


def test_nothing_to_score_is_no_window():
    assert seen(0, 4, 2) == []


def test_later_windows_keep_the_context_that_fits():
    assert seen(9, 4, 2) == [
        ([PREFIX, 0, 1, 2], [0, 1, 2, 3]),
        ([1, 2, 3, 4], [4, 5]),
        ([3, 4, 5, 6], [6, 7]),
        ([4, 5, 6, 7], [8]),  # one is left; its context is as long as ever
    ]


def test_a_stride_of_one_gives_every_later_token_the_longest_context():
    assert seen(6, 4, 1) == [
        ([PREFIX, 0, 1, 2], [0, 1, 2, 3]),
        ([0, 1, 2, 3], [4]),
        ([1, 2, 3, 4], [5]),
    ]


def test_a_window_of_one_sees_one_token():
    assert seen(3, 1, 1) == [([PREFIX], [0]), ([0], [1]), ([1], [2])]


def test_stride_equal_to_the_window_by_hand():
    assert seen(10, 4, 4) == [
        ([PREFIX, 0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [4, 5, 6, 7]),  # a middle window: one token of context
        ([5, 6, 7, 8], [8, 9]),  # the last one keeps what fits
    ]


@pytest.mark.parametrize("window", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 4, 5, 8, 9, 29])
def test_stride_equal_to_the_window_is_lm_evals_rolling_log_likelihood(num_tokens, window):
    assert seen(num_tokens, window, window) == lm_eval_windows(num_tokens, window)


def test_a_smaller_stride_is_not_lm_evals():
    assert seen(9, 4, 2) != lm_eval_windows(9, 4)


def test_counts_of_a_window():
    assert Window(-1, 0, 4).num_inputs == Window(-1, 0, 4).num_scored == 4
    assert Window(1, 4, 6).num_inputs == 4 and Window(1, 4, 6).num_scored == 2


# Protocols

PROTOCOL = Protocol("full", 512, 256, 2, "float32")


def make(name: str = "full", window: int | None = None, stride: int | None = None, context: int = 1024) -> Protocol:
    return make_protocol(name, window, stride, prefix_id=2, dtype="float32", context_length=context)


@pytest.mark.parametrize(("name", "expected"), [("full", None), ("first-1", 1), ("first-512", 512)])
def test_first_tokens(name, expected):
    assert first_tokens(name) == expected
    assert replace(PROTOCOL, name=name).first_tokens == expected


@pytest.mark.parametrize(
    "name", ["", "Full", "full ", "first", "first-", "first-0", "first-05", "first--5", "first-5x", "first-٣", "last-5"]
)
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match=r"first-512"):
        first_tokens(name)
    with pytest.raises(UserError):
        make(name)


def test_defaults():
    assert make(context=1024) == Protocol("full", 1024, 512, 2, "float32")
    assert make(context=8192) == Protocol("full", 2048, 1024, 2, "float32")
    assert make(window=7) == Protocol("full", 7, 3, 2, "float32")
    assert make(window=1) == Protocol("full", 1, 1, 2, "float32")
    assert make(context=8192, window=4096).window == 4096
    assert make(window=8, stride=8).stride == 8


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"window": 1025}, "1025"),
        ({"window": 0}, "window of 0"),
        ({"window": -3}, "window of -3"),
        ({"stride": 0}, "stride"),
        ({"window": 8, "stride": 9}, r"stride .*\(8\), not 9"),
        ({"name": "first-1025"}, "first-1024"),
    ],
)
def test_impossible_protocols_are_refused_with_the_remedy(arguments, named):
    with pytest.raises(UserError, match=named) as caught:
        make(**arguments)
    assert str(caught.value).endswith(".")


def test_what_lies_at_the_limit_is_allowed():
    assert make("first-1024").first_tokens == make(window=1024).window == 1024


@pytest.mark.parametrize(
    "change", [{"name": "first-512"}, {"window": 511}, {"stride": 255}, {"prefix_id": 0}, {"dtype": "bfloat16"}]
)
def test_the_hash_changes_with_every_field(change):
    changed = replace(PROTOCOL, **change)
    assert changed.hash != PROTOCOL.hash
    assert changed.hash in changed.describe() and changed.name in changed.describe()


def test_the_hash_is_the_same_for_the_same_protocol_and_never_changes():
    assert len(PROTOCOL.hash) == 12 and int(PROTOCOL.hash, 16)
    assert Protocol("full", 512, 256, 2, "float32").hash == PROTOCOL.hash
    # Golden: results on disk are compared by it.
    assert PROTOCOL.hash == "4dbe7019d2cd"
    # Fields are not run together: 51 and 2256 are not 512 and 256.
    assert Protocol("full", 51, 2256, 2, "float32").hash != PROTOCOL.hash
