"""Intervals, p-values and lists of a comparison: figures by hand, and how often intervals hold the truth."""

from __future__ import annotations

import itertools
import json
import math
import tracemalloc
from dataclasses import asdict, replace

import numpy as np
import pytest

from cartilha.errors import UserError
from cartilha.evaluation import bootstrap
from cartilha.evaluation.bootstrap import FEW_DOCUMENTS, MAX_RESAMPLED_DOCUMENTS, Interval, bootstrap_interval
from cartilha.evaluation.compare import (
    MAX_EXACT_DOCUMENTS,
    Comparison,
    compare_documents,
    shared_documents,
    sign_flip_p_value,
)
from cartilha.evaluation.saved import SavedEvaluation
from cartilha.storage import to_json
from cartilha.terminal.measures import comparison

LN2 = math.log(2)


def web_corpus(num_documents: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Bits, bytes and the true bits per byte: long documents are rare, and harder."""
    slope, sigma, spread = 0.1, 1.0, 0.25
    log_length = generator.normal(0, sigma, num_documents)
    num_bytes = 2500 * np.exp(log_length)
    bits_per_byte = np.exp(slope * log_length + generator.normal(0, spread, num_documents))
    truth = math.exp(((1 + slope) ** 2 - 1) * sigma**2 / 2 + spread**2 / 2)
    return bits_per_byte * num_bytes, num_bytes, truth


def two_models(num_documents: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Differences in bits, bytes and the true difference: the second model gains most in short documents."""
    log_length = generator.normal(0, 1, num_documents)
    num_bytes = 2500 * np.exp(log_length)
    difference = -0.05 + 0.01 * log_length + 0.05 * generator.standard_t(5, num_documents)
    return difference * num_bytes, num_bytes, -0.05 + 0.01


def percentile_interval(numerator: np.ndarray, denominator: np.ndarray, seed: int) -> Interval:
    draws = np.random.default_rng(seed).integers(0, len(numerator), (400, len(numerator)))
    low, high = np.quantile(numerator[draws].sum(1) / denominator[draws].sum(1), [0.025, 0.975])
    return Interval(low, high)


def evaluation(nll, num_bytes, domains=None) -> SavedEvaluation:
    names = [f"texto-{i}" for i in range(len(nll))]
    ones = np.ones(len(nll), np.int64)
    kept = ones.astype(bool)
    return SavedEvaluation({}, names, domains or names, names, np.array(nll), ones, np.array(num_bytes), kept)


def compare(nll_a, nll_b, num_bytes, domains=None, **options) -> Comparison:
    first, second = evaluation(nll_a, num_bytes, domains), evaluation(nll_b, num_bytes, domains)
    return compare_documents(first, second, shared_documents(first, second), **options)


# Intervals


@pytest.mark.parametrize(("corpus", "num_documents"), [(web_corpus, 100), (web_corpus, 400), (two_models, 100)])
def test_intervals_hold_the_truth_as_often_as_they_say(corpus, num_documents):
    generator = np.random.default_rng(8)
    num_trials, ours, plain = 800, 0, 0
    for trial in range(num_trials):
        numerator, denominator, truth = corpus(num_documents, generator)
        interval = bootstrap_interval(numerator, denominator, num_resamples=400, seed=trial)
        ours += interval.low <= truth <= interval.high
        if (corpus, num_documents) == (web_corpus, 100):
            interval = percentile_interval(numerator, denominator, trial)
            plain += interval.low <= truth <= interval.high
    assert 0.92 <= ours / num_trials <= 0.98
    assert plain / num_trials < 0.92, "a simulation that the percentile interval passes would prove little"


def test_large_corpora_take_no_resampling_and_hold_the_truth_too(monkeypatch):
    def refuse(*_):
        raise AssertionError("resampled")

    monkeypatch.setattr(bootstrap, "_resampled_t", refuse)
    generator = np.random.default_rng(3)
    num_trials, held = 400, 0
    for _ in range(num_trials):
        numerator, denominator, truth = web_corpus(MAX_RESAMPLED_DOCUMENTS + 1, generator)
        interval = bootstrap_interval(numerator, denominator)
        held += interval.low <= truth <= interval.high
    assert 0.92 <= held / num_trials <= 0.98
    with pytest.raises(AssertionError, match="resampled"):
        bootstrap_interval(numerator[:-1], denominator[:-1])


def test_resampling_and_the_normal_approximation_agree_where_they_meet(monkeypatch):
    numerator, denominator, _ = web_corpus(2000, np.random.default_rng(1))
    resampled = bootstrap_interval(numerator, denominator)
    monkeypatch.setattr(bootstrap, "MAX_RESAMPLED_DOCUMENTS", 1999)
    approximate = bootstrap_interval(numerator, denominator)
    assert resampled != approximate
    width = approximate.high - approximate.low
    assert resampled == pytest.approx(approximate, abs=0.1 * width)


def test_documents_of_one_size_give_students_interval():
    # The mean of normal numbers: half-width t(0.975; 99) s / sqrt(n), t = 1.984.
    values = np.random.default_rng(2).normal(1, 0.3, 100)
    interval = bootstrap_interval(values * 7, np.full(100, 7), num_resamples=20_000)
    half = 1.984 * values.std(ddof=1) / 10
    assert interval == pytest.approx([values.mean() - half, values.mean() + half], abs=0.06 * half)


def test_an_interval_scales_with_its_units_and_forgets_the_order():
    numerator, denominator, _ = web_corpus(300, np.random.default_rng(4))
    interval = bootstrap_interval(numerator, denominator)
    scaled = bootstrap_interval(numerator * 3, denominator * 1000)
    assert [bound * 1000 / 3 for bound in scaled] == pytest.approx(interval)
    assert bootstrap_interval(-numerator, denominator) == pytest.approx([-interval.high, -interval.low])
    assert bootstrap_interval(numerator, denominator, seed=1) != interval
    assert bootstrap_interval(numerator, denominator) == interval
    ratio = numerator.sum() / denominator.sum()
    assert interval.low < ratio < interval.high


def test_a_higher_level_and_a_smaller_corpus_make_it_wider():
    numerator, denominator, _ = web_corpus(400, np.random.default_rng(4))

    def width(**options) -> float:
        interval = bootstrap_interval(numerator[: options.pop("size", 400)], denominator[: len(numerator)], **options)
        return interval.high - interval.low

    assert width(level=0.8) < width(level=0.95) < width(level=0.99)
    few = bootstrap_interval(numerator[:60], denominator[:60])
    assert few.high - few.low > 1.5 * width()


def test_chunks_do_not_change_an_interval(monkeypatch):
    numerator, denominator, _ = web_corpus(200, np.random.default_rng(4))
    whole = bootstrap_interval(numerator, denominator, num_resamples=501)
    monkeypatch.setattr(bootstrap, "DRAWS_A_CHUNK", 200 * 7)
    assert bootstrap_interval(numerator, denominator, num_resamples=501) == pytest.approx(whole)


def test_documents_that_are_all_alike_leave_no_doubt():
    num_bytes = np.arange(1, 101)
    for bits_per_byte in (0.3, 8.0, 0.0):
        interval = bootstrap_interval(num_bytes * bits_per_byte, num_bytes)
        assert interval == pytest.approx([bits_per_byte] * 2, abs=1e-12)


def test_one_document_that_differs_gives_a_finite_interval_around_zero():
    differences = np.zeros(100)
    differences[3] = 5.0
    interval = bootstrap_interval(differences, np.full(100, 50))
    assert -0.1 < interval.low < 0 < interval.high < 0.1


def test_one_document_says_nothing_about_its_spread():
    assert bootstrap_interval(np.array([5.0]), np.array([3])) is None
    # A second document without bytes does not help; two with bytes do.
    assert bootstrap_interval(np.array([5.0, 0.1]), np.array([3, 0])) is None
    assert all(map(math.isfinite, bootstrap_interval(np.array([5.0, 4.0]), np.array([3, 3]))))


def test_documents_without_bytes_are_allowed():
    numerator, denominator, _ = web_corpus(80, np.random.default_rng(5))
    denominator[::2] = 0
    assert all(map(math.isfinite, bootstrap_interval(numerator, denominator)))


@pytest.mark.parametrize(
    ("numerator", "denominator", "level", "message"),
    [
        ([1.0, 2.0], [1], 0.95, "one number per document"),
        ([], [], 0.95, "sum to zero"),
        ([1.0, math.nan], [1, 1], 0.95, "finite"),
        ([1.0, 1.0], [0, 0], 0.95, "sum to zero"),
        ([1.0, 1.0], [3, -1], 0.95, "not negative"),
        ([1.0, 1.0], [3, 1], 95, "between 0 and 1"),
    ],
)
def test_what_has_no_interval_is_refused(numerator, denominator, level, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(np.array(numerator), np.array(denominator), level=level)


@pytest.mark.parametrize("num_documents", [MAX_RESAMPLED_DOCUMENTS, 250_000])
def test_an_interval_takes_little_memory(num_documents):
    numerator, denominator, _ = web_corpus(num_documents, np.random.default_rng(6))
    tracemalloc.start()
    bootstrap_interval(numerator, denominator, num_resamples=500)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6


# The sign-flip test


def test_a_p_value_by_hand():
    # Sums of +-1 +-2 +-4: 7, 5, 3, 1 and their negatives; 1 + 2 - 4 = -1 is reached by all eight.
    assert sign_flip_p_value(np.array([1.0, 2.0, 4.0])) == 2 / 8
    assert sign_flip_p_value(np.array([-1.0, 2.0, 4.0])) == 4 / 8
    assert sign_flip_p_value(np.array([1.0, -2.0, 4.0])) == 6 / 8
    assert sign_flip_p_value(np.array([1.0, 2.0, -4.0])) == 1


def test_documents_that_do_not_differ_change_nothing():
    assert sign_flip_p_value(np.zeros(40)) == 1
    assert sign_flip_p_value(np.array([1.0, 2.0, 4.0] + [0.0] * 40)) == 2 / 8


@pytest.mark.parametrize("num_documents", [5, MAX_EXACT_DOCUMENTS])
def test_few_documents_are_enumerated(num_documents):
    differences = np.random.default_rng(num_documents).normal(0.3, 1, num_documents)
    signs = np.array(list(itertools.product((1, -1), repeat=num_documents)))
    sums = np.abs(signs @ differences)
    assert sign_flip_p_value(differences) == np.mean(sums >= sums[0] - 1e-9)


def test_patterns_with_the_same_sum_count_although_rounded_differently():
    # 0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1: without a tolerance the observed pattern can miss itself.
    assert sign_flip_p_value(np.array([0.1, 0.2, 0.3])) == sign_flip_p_value(np.array([0.3, 0.2, 0.1])) == 2 / 8
    equal = np.full(MAX_EXACT_DOCUMENTS + 1, 0.1)  # drawn: each sum is a multiple of 0.1
    assert sign_flip_p_value(np.append(equal, -0.1 * 17)) == 1


def test_many_documents_are_drawn_and_agree_with_all_patterns():
    differences = np.random.default_rng(7).normal(0.35, 1, MAX_EXACT_DOCUMENTS + 1)
    halves = np.zeros(1)
    for value in differences:
        halves = np.concatenate([halves + value, halves - value])
    exact = np.mean(np.abs(halves) >= abs(differences.sum()) - 1e-9)
    assert 0.01 < exact < 0.6
    drawn = sign_flip_p_value(differences, num_flips=40_000)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 40_000))
    assert drawn != exact
    assert sign_flip_p_value(differences, seed=1) == sign_flip_p_value(differences, seed=1)
    assert sign_flip_p_value(-differences, seed=1) == sign_flip_p_value(differences, seed=1)


def test_a_drawn_p_value_is_never_zero():
    assert sign_flip_p_value(np.full(1000, 1.0), num_flips=999) == 1 / 1000


@pytest.mark.parametrize("num_documents", [10, 60])
def test_no_difference_is_found_as_often_as_the_p_value_says(num_documents):
    generator = np.random.default_rng(9)
    p_values = np.array([sign_flip_p_value(generator.standard_t(3, num_documents), num_flips=400) for _ in range(2000)])
    for level in (0.05, 0.2, 0.5):
        assert np.mean(p_values <= level) == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 2000))


# Comparisons


def test_a_comparison_by_hand():
    # Bits: 10, 20, 40, 8 under the first; 8, 24, 20, 8 under the second; over 10, 10, 20, 8 bytes.
    first, second = [10 * LN2, 20 * LN2, 40 * LN2, 8 * LN2], [8 * LN2, 24 * LN2, 20 * LN2, 8 * LN2]
    comparison = compare(first, second, [10, 10, 20, 8], domains=["x", "x", "y", "y"])
    assert comparison.bits_per_byte_first == pytest.approx(78 / 48)
    assert comparison.bits_per_byte_second == pytest.approx(60 / 48)
    assert comparison.bits_per_byte_difference == pytest.approx(-18 / 48)
    assert comparison.share_improved == (2 + 1 / 2) / 4
    assert comparison.num_documents == 4
    assert comparison.p_value == 6 / 8  # -2 +4 -20 = -18: reached by 18, 22, 26 and their opposites
    low, high = comparison.bits_per_byte_difference_interval
    assert low < -18 / 48 < high
    assert [change.doc_id for change in comparison.gained_most] == ["texto-2", "texto-0"]
    assert comparison.gained_most[0].bits_per_byte_first == pytest.approx(2)
    assert comparison.gained_most[0].bits_per_byte_second == pytest.approx(1)
    assert [change.doc_id for change in comparison.lost_most] == ["texto-1"]
    assert list(comparison.domains) == ["x", "y"]
    x, y = comparison.domains.values()
    assert [(d.num_documents, d.num_bytes, d.share_improved) for d in (x, y)] == [(2, 20, 0.5), (2, 28, 0.75)]
    assert (x.bits_per_byte_first, x.bits_per_byte_second) == pytest.approx((30 / 20, 32 / 20))
    assert (y.bits_per_byte_first, y.bits_per_byte_second) == pytest.approx((48 / 28, 28 / 28))


def test_swapping_the_models_turns_the_signs():
    generator = np.random.default_rng(10)
    num_bytes = generator.integers(300, 4000, 120)
    first = num_bytes * generator.normal(0.7, 0.1, 120)
    second = first - num_bytes * generator.normal(0.01, 0.05, 120)
    one, other = compare(first, second, num_bytes), compare(second, first, num_bytes)
    assert one.bits_per_byte_difference == pytest.approx(-other.bits_per_byte_difference)
    turned = [-bound for bound in other.bits_per_byte_difference_interval[::-1]]
    assert one.bits_per_byte_difference_interval == pytest.approx(turned)
    assert one.p_value == other.p_value
    assert one.share_improved == pytest.approx(1 - other.share_improved)
    assert [d.doc_id for d in one.gained_most] == [d.doc_id for d in other.lost_most]
    assert len(one.gained_most) == len(one.lost_most) == 10


def test_pairs_say_more_than_two_intervals():
    generator = np.random.default_rng(11)
    num_bytes = generator.integers(300, 4000, 200)
    first = num_bytes * generator.normal(0.7, 0.2, 200)
    second = first - num_bytes * generator.normal(0.01, 0.02, 200)
    comparison = compare(first, second, num_bytes)
    alone = [bootstrap_interval(nll / LN2, num_bytes) for nll in (first, second)]
    low, high = comparison.bits_per_byte_difference_interval
    assert high < 0 and comparison.p_value < 0.01
    assert high - low < 0.3 * (alone[0].high - alone[0].low)
    assert alone[1].high > alone[0].low, "the two intervals overlap"


def test_a_model_against_itself():
    nll = np.random.default_rng(12).normal(500, 50, 90)
    comparison = compare(nll, nll, np.full(90, 700))
    assert comparison.bits_per_byte_difference == 0
    assert comparison.bits_per_byte_difference_interval == [0, 0]
    assert (comparison.p_value, comparison.share_improved) == (1, 0.5)
    assert comparison.gained_most == comparison.lost_most == []


def test_lists_are_by_bits_per_byte_and_leave_out_texts_of_a_few_words():
    # texto-0 changes most for each byte but is short; texto-5 most in all but less for each byte than texto-4.
    num_bytes = [5, 400, 400, 400, 400, 4000]
    first = np.array([1.0] * 6) * num_bytes
    second = first - np.array([0.9, -0.1, 0.1, 0.2, 0.3, 0.05]) * num_bytes
    comparison = compare(first, second, num_bytes, num_listed=3)
    assert [change.doc_id for change in comparison.gained_most] == ["texto-4", "texto-3", "texto-2"]
    assert [change.doc_id for change in comparison.lost_most] == ["texto-1"]
    short = compare(first[:1], second[:1], num_bytes[:1])
    assert [change.doc_id for change in short.gained_most] == ["texto-0"], "where all are short, they are what there is"


def test_a_document_without_bytes_is_not_listed():
    comparison = compare([3.0, 4.0, 5.0], [2.0, 5.0, 4.0], [0, 0, 8], domains=["x", "x", "y"])
    assert [change.doc_id for change in comparison.gained_most] == ["texto-2"]
    assert comparison.lost_most == []
    assert list(comparison.domains) == ["y"]


def test_only_domains_of_enough_documents_have_an_interval():
    names = ["b"] * FEW_DOCUMENTS + ["a"] * (FEW_DOCUMENTS - 1)
    nll = np.random.default_rng(13).normal(500, 50, (2, len(names)))
    domains = compare(*nll, np.full(len(names), 700), domains=names).domains
    assert list(domains) == ["a", "b"] and domains["a"].bits_per_byte_difference_interval is None
    alone = bootstrap_interval((nll[1] - nll[0])[:FEW_DOCUMENTS] / LN2, np.full(FEW_DOCUMENTS, 700))
    assert domains["b"].bits_per_byte_difference_interval == pytest.approx(alone)


def test_a_comparison_of_one_document_has_no_interval_and_says_so():
    values = asdict(compare([700.0], [600.0], [300]))
    assert values["bits_per_byte_difference_interval"] is None
    protocol = {"name": "full", "window": 8, "stride": 4, "dtype": "float32", "hash": "ab"}
    shown = list(comparison({**values, "models": ["a", "b"], "protocols": [protocol] * 2}))
    assert "bits per byte, no interval with one document, p = 1;" in shown[1]


def test_the_record_of_a_comparison():
    nll = np.random.default_rng(14).normal(500, 50, (2, 60))
    comparison = compare(*nll, np.full(60, 700), domains=["x"] * 60, num_listed=2)
    record = json.loads(to_json(asdict(comparison)))
    assert record["bits_per_byte_difference"] == comparison.bits_per_byte_difference
    assert record["bits_per_byte_difference_interval"] == comparison.bits_per_byte_difference_interval
    assert record["interval_level"] == 0.95
    assert (record["p_value"], record["share_improved"]) == (comparison.p_value, comparison.share_improved)
    assert record["num_documents"] == 60
    assert len(record["gained_most"]) == len(record["lost_most"]) == 2
    assert record["gained_most"][0].keys() == {
        "doc_id", "num_bytes", "bits_per_byte_first", "bits_per_byte_second",
    }  # fmt: skip
    assert record["domains"]["x"]["bits_per_byte_difference"] == pytest.approx(record["bits_per_byte_difference"])
    assert record["domains"]["x"]["bits_per_byte_difference_interval"] == record["bits_per_byte_difference_interval"]
    one = json.loads(to_json(asdict(compare([1.0], [2.0], [3]))))
    assert one["bits_per_byte_difference_interval"] is None


def test_other_documents_are_refused():
    with pytest.raises(UserError, match="different documents"):
        shared_documents(evaluation([1.0, 2.0], [3, 3]), evaluation([1.0], [3]))
    renamed = replace(evaluation([1.0, 2.0], [3, 3]), text_hashes=["a", "b"])
    with pytest.raises(UserError, match="different documents"):
        shared_documents(evaluation([1.0, 2.0], [3, 3]), renamed)
    with pytest.raises(ValueError, match="finite"):
        compare([1.0, math.inf], [1.0, 2.0], [3, 3])
