"""Policy-side predictors of remaining length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.events import NO_PREDICTION
from penstock.predict.remaining import PRIOR_TOKENS, History, Nothing, Observed, Predictor


def history(lengths: list[int], **settings: float) -> History:
    made = History(window=int(settings.get("window", 1000)), quantile=settings.get("quantile", -1.0))
    for length in lengths:
        made.finished(length)
    return made


def ask(predictor: Predictor, generated: float, observed: float = NO_PREDICTION) -> float:
    """Ask both ways; they must agree."""
    many = float(predictor.remaining(np.array([generated]), np.array([observed]))[0])
    assert predictor.one(generated, observed) == pytest.approx(many)
    return many


def test_nothing_is_never_done() -> None:
    assert ask(Nothing(), 10.0, 5.0) == float("inf")


def test_observed_is_passed_on_and_gaps_are_filled() -> None:
    predictor = Observed(history([100, 100]))
    assert ask(predictor, 10.0, 7.0) == 7.0
    assert ask(predictor, 10.0) == 90.0
    assert predictor.learns
    assert not Observed(Nothing()).learns


@pytest.mark.parametrize(
    ("generated", "left"),
    [(0.0, 250.0), (100.0, 200.0), (150.0, 150.0), (399.0, 1.0), (400.0, 400.0), (900.0, 900.0)],
)
def test_history_is_the_mean_of_the_longer_ones(generated: float, left: float) -> None:
    """Of 100, 200, 300, 400: those longer than ``generated``, less ``generated``; beyond all, as much again."""
    assert ask(history([400, 100, 300, 200]), generated) == pytest.approx(left)


def test_history_quantile() -> None:
    assert ask(history([100, 200, 300, 400], quantile=0.5), 100.0) == 200.0
    assert ask(history([100, 200, 300, 400], quantile=0.0), 100.0) == 100.0


def test_history_knows_a_prior_before_anything() -> None:
    assert ask(History(), 50.0) == PRIOR_TOKENS


def test_history_forgets_beyond_its_window() -> None:
    assert ask(history([1000] * 20 + [10] * 10, window=10), 0.0) == 10.0


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(0, 6000), st.floats(-1.0, 0.99))
def test_history_is_positive_and_both_ways_agree(lengths: list[int], generated: int, quantile: float) -> None:
    made = history(lengths, quantile=quantile)
    left = ask(made, float(generated))
    assert left > 0.0 or generated == 0
