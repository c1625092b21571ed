"""What longer trainings would bring, from the losses of short ones."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cartilha.training.power_law import expected_losses

TOKENS = (8_000, 16_000, 32_000)
LATER = (32_000, 320_000, 30_000_000)


def law(start: float, floor: float, scale: float, exponent: float, tokens: float) -> float:
    return floor + (start - floor) * (1 + tokens / scale) ** -exponent


laws = st.tuples(st.floats(1.5, 8), st.floats(0.2, 0.7), st.floats(3e3, 3e5), st.floats(0.1, 0.6))


@settings(max_examples=30)
@given(laws)
def test_the_interval_of_an_exact_law_holds_its_values(drawn):
    start, share, scale, exponent = drawn
    losses = [law(start, share * start, scale, exponent, tokens) for tokens in TOKENS]
    found = expected_losses(start, TOKENS, losses, LATER)
    for tokens, (low, median, high) in zip(LATER, found, strict=True):
        assert low <= law(start, share * start, scale, exponent, tokens) <= high
        assert low <= median <= high
    medians, widths = [one.median for one in found], [one.high - one.low for one in found]
    assert medians == sorted(medians, reverse=True) and widths == sorted(widths)


def test_losses_that_follow_no_law_widen_the_interval():
    straight = expected_losses(2.0, TOKENS, [1.8, 1.7, 1.6], [10**6])[0]
    crooked = expected_losses(2.0, TOKENS, [1.6, 1.8, 1.6], [10**6])[0]
    assert crooked.high - crooked.low > straight.high - straight.low
