"""How often 95 % intervals hold the truth: methods x sizes of simulated corpora.

    python benchmarks/interval_coverage.py [--trials 1000] [--resamples 600] [--seed 1]

A document has a log-normal number of bytes (the log's standard deviation is `sigma`; about 1 in web text, up to 0.65 in
the handbook, GNOME and LibreOffice texts that the tests use), and bits per byte that vary from document to document and
with its length (`slope`, a unit of log length), so that the truth has a closed form. `one model` is bits per byte,
`difference` the paired difference of two models, of either sign. `largest` is the mean share of the bytes that the
largest document has: what makes intervals hard. Each trial draws a corpus; the corpora are the same for all methods.
"""

from __future__ import annotations

import argparse
import math
import time
from statistics import NormalDist

import numpy as np

from cartilha.evaluation.bootstrap import bootstrap_interval

NORMAL = NormalDist()
Z = NORMAL.inv_cdf(0.975)
METHODS = ("normal", "percentile", "BCa", "t", "t of log", "cartilha")
SCENARIOS = (
    ("one model", 0.6, -0.1),
    ("one model", 1.0, -0.1),
    ("one model", 1.0, 0.1),
    ("one model", 1.2, -0.1),
    ("difference", 1.0, -0.1),
    ("difference", 1.2, 0.1),
    # Beyond what any of these methods holds in small corpora: most of the bytes lie in documents too rare to be seen.
    ("one model", 1.2, 0.1),
    ("one model", 1.5, -0.1),
)
TRIALS_PER_SIZE = {100: 1.0, 300: 0.6, 1000: 0.3, 10_000: 0.5, 20_000: 0.5}  # shares of --trials
RESAMPLED = 1000  # larger corpora show only what does not resample, as cartilha does not above 10,000


def corpus(
    kind: str, sigma: float, slope: float, num_documents: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, float]:
    """Bits and bytes of each document, and the true ratio."""
    log_length = generator.normal(0, sigma, num_documents)
    num_bytes = 2500 * np.exp(log_length)
    within = generator.normal(size=num_documents) / np.sqrt(num_bytes)
    if kind == "one model":
        bits_per_byte = np.exp(slope * log_length + generator.normal(0, 0.25, num_documents)) + within
        truth = math.exp(((1 + slope) ** 2 - 1) * sigma**2 / 2 + 0.25**2 / 2)
    else:
        bits_per_byte = -0.05 + slope * 0.1 * log_length + 0.05 * generator.standard_t(5, num_documents) + within / 4
        truth = -0.05 + slope * 0.1 * sigma**2
    return bits_per_byte * num_bytes, num_bytes, truth


def other_intervals(
    x: np.ndarray, y: np.ndarray, num_resamples: int, generator: np.random.Generator
) -> dict[str, tuple[float, float]]:
    n, ratio = len(x), x.sum() / y.sum()
    e, u = (x - ratio * y) / y.mean(), y / y.mean()
    left_out = -e / (n - u)
    error = math.sqrt(((left_out - left_out.mean()) ** 2).sum() * (n - 1) / n)
    found = {"normal": (ratio - Z * error, ratio + Z * error)}
    if n > RESAMPLED:
        return found
    draws = generator.integers(0, n, (num_resamples, n))
    e_drawn, u_drawn = e[draws], u[draws]
    shift = e_drawn.sum(1) / u_drawn.sum(1)
    errors = np.sqrt(((e_drawn - shift[:, None] * u_drawn) ** 2).sum(1)) / u_drawn.sum(1)
    linear = math.sqrt((e**2).sum()) / n
    low, high = np.quantile(shift, [0.025, 0.975])
    found["percentile"] = (ratio + low, ratio + high)
    bias = NORMAL.inv_cdf(min(max(float((shift < 0).mean()), 1 / num_resamples), 1 - 1 / num_resamples))
    influence = left_out.mean() - left_out
    acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    levels = [NORMAL.cdf(bias + (bias + z) / (1 - acceleration * (bias + z))) for z in (-Z, Z)]
    low, high = np.quantile(shift, levels)
    found["BCa"] = (ratio + low, ratio + high)
    low, high = np.quantile(shift / errors, [0.025, 0.975])
    found["t"] = (ratio - high * linear, ratio - low * linear)
    if ratio + shift.min() > 0:
        low, high = np.quantile(np.log1p(shift / ratio) * (ratio + shift) / errors, [0.025, 0.975])
        found["t of log"] = (ratio * math.exp(-high * linear / ratio), ratio * math.exp(-low * linear / ratio))
    return found


def coverage(
    scenario: tuple[str, float, float], num_documents: int, num_trials: int, num_resamples: int, seed: int
) -> tuple[dict[str, float], float, float]:
    """Share of trials in which each method's interval holds the truth; its mean width (ours); the largest's share."""
    generator = np.random.default_rng([seed, num_documents])
    hits: dict[str, int] = {}
    width = largest = 0.0
    for trial in range(num_trials):
        x, y, truth = corpus(*scenario, num_documents, generator)
        found = other_intervals(x, y, num_resamples, generator)
        if num_documents <= RESAMPLED or num_documents > 10_000:
            ours = bootstrap_interval(x, y, num_resamples=num_resamples, seed=trial)
            found["cartilha"] = (ours.low, ours.high)
            width += (ours.high - ours.low) / num_trials
        largest += y.max() / y.sum() / num_trials
        for method, (low, high) in found.items():
            hits[method] = hits.get(method, 0) + (low <= truth <= high)
    return {method: count / num_trials for method, count in hits.items()}, width, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    print(f"{'scenario':<12} {'sigma':>5} {'slope':>5} {'documents':>9} {'trials':>6} {'largest':>7} ", end="")
    print(*(f"{method:>10}" for method in METHODS), f"{'width':>8}")
    for scenario in SCENARIOS:
        for num_documents, share in TRIALS_PER_SIZE.items():
            num_trials = max(1, round(share * arguments.trials))
            found, width, largest = coverage(scenario, num_documents, num_trials, arguments.resamples, arguments.seed)
            kind, sigma, slope = scenario
            print(f"{kind:<12} {sigma:5.1f} {slope:5.1f} {num_documents:9,} {num_trials:6} {largest:7.1%} ", end="")
            print(*(f"{found[method]:10.1%}" if method in found else f"{'':>10}" for method in METHODS), end="")
            print(f" {width:8.4f}" if width else "", flush=True)
    error = math.sqrt(0.95 * 0.05 / arguments.trials)
    seconds = time.perf_counter() - begin
    print(f"{seconds:.0f} s; one standard error of a share is {error:.1%} at {arguments.trials} trials")


if __name__ == "__main__":
    main()
