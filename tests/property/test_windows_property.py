"""Windows of any document under any window and stride: every token once, and the context that the definition gives."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from cartilha.evaluation.windows import document_windows

CASES = st.integers(1, 60).flatmap(
    lambda window: st.tuples(st.integers(0, 12 * window), st.just(window), st.integers(1, window))
)


@given(CASES)
@example((0, 1, 1))
@example((601, 60, 60))
def test_every_token_is_scored_exactly_once_in_order(case):
    windows = list(document_windows(*case))
    scored = [token for w in windows for token in range(w.first_target, w.past)]
    assert scored == list(range(case[0]))
    assert all(w.num_scored > 0 for w in windows)


@given(CASES)
def test_inputs_fit_the_window_and_end_just_before_the_last_token_scored(case):
    num_tokens, window, stride = case
    for number, w in enumerate(document_windows(*case)):
        inputs = range(w.first_input, w.past - 1)
        assert len(inputs) == w.num_inputs
        # Before the first token scored there is at least one input, which is never that token or a later one.
        assert w.first_input < w.first_target
        if number == 0:
            # The prefix stands at -1; it is an input of the first window and of no other.
            assert (w.first_input, w.first_target) == (-1, 0)
            assert w.num_inputs == w.num_scored == min(window, num_tokens)
        else:
            assert w.first_input >= 0
            assert w.num_inputs == window
            assert w.num_scored == min(stride, num_tokens - w.first_target)


@given(CASES)
def test_later_tokens_have_at_least_window_minus_stride_tokens_of_context(case):
    _, window, stride = case
    for w in list(document_windows(*case))[1:]:
        assert w.first_target - w.first_input >= window - stride + 1
