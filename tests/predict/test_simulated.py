"""World-side predictors: exact, or as wrong as the paper's."""

from __future__ import annotations

import itertools
import math

import pytest

from penstock.predict.simulated import LengthOracle, NoisyOracle, normal

REQUESTS = 6000


def mean_error(generated: int, seed: int) -> float:
    """Mean absolute error over outputs spread evenly over 30,000-32,000 tokens."""
    oracle = NoisyOracle(seed)
    total = 0.0
    for request in range(REQUESTS):
        left = 30_000 + request * 2000 // REQUESTS - generated
        total += abs(oracle.remaining(request, left, generated) - left)
    return total / REQUESTS


def test_oracle_knows() -> None:
    assert LengthOracle().remaining(3, 17, 4) == 17.0


@pytest.mark.parametrize(("generated", "paper"), [(1, 18_256.0), (8_000, 2_929.0)])
def test_error_is_the_papers(generated: int, paper: float) -> None:
    """STAR: mean absolute error for outputs of 30-32K tokens at the first token and after 8K generated."""
    assert mean_error(generated, seed=7) == pytest.approx(paper, rel=0.05)


def test_answers_depend_on_seed_request_and_refresh_only() -> None:
    one, other = NoisyOracle(1), NoisyOracle(1)
    questions = [(r, 1000 - g, g) for g in (1, 19, 20, 400) for r in range(50)]
    straight = [one.remaining(*q) for q in questions]
    backward = [other.remaining(*q) for q in reversed(questions)]
    assert straight == backward[::-1]
    assert straight != [NoisyOracle(2).remaining(*q) for q in questions]
    assert one.remaining(5, 990, 0) / 990 == pytest.approx(one.remaining(5, 971, 19) / 971)
    assert one.remaining(5, 970, 20) / 970 != pytest.approx(one.remaining(5, 971, 19) / 971)


def test_without_spread_it_is_exact() -> None:
    assert NoisyOracle(0, sigma_first=0.0).remaining(1, 500, 30) == 500.0


def test_part_of_the_error_stays_with_the_request() -> None:
    """With half of the variance fixed, errors of one request at two refreshes correlate by about one half."""
    oracle = NoisyOracle(3, halving_tokens=1e12)
    pairs = [
        (math.log(oracle.remaining(r, 100, 0) / 100), math.log(oracle.remaining(r, 100, 200) / 100))
        for r in range(4000)
    ]
    product = sum(a * b for a, b in pairs) / sum(a * a for a, _ in pairs)
    assert product == pytest.approx(0.5, abs=0.06)


def test_normal_is_standard() -> None:
    draws = [normal(1, request, 5) for request in range(20_000)]
    mean = sum(draws) / len(draws)
    variance = sum((x - mean) ** 2 for x in draws) / len(draws)
    lag = sum(a * b for a, b in itertools.pairwise(draws)) / len(draws)
    assert mean == pytest.approx(0.0, abs=0.03)
    assert variance == pytest.approx(1.0, abs=0.04)
    assert lag == pytest.approx(0.0, abs=0.03)
