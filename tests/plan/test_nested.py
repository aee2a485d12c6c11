"""Nested WAIT's memory bound (arXiv 2504.11320, section 5): decay rates, batch memory, thresholds."""

from __future__ import annotations

from math import exp, log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.plan.fluid import StepCost, memory_of, solve
from penstock.plan.nested import (
    Segments,
    batch_tokens,
    bound,
    decay_floor,
    decay_rate,
    whole_thresholds,
)

COST = StepCost(0.010, 1e-6)
TWO = Segments(10, (10.0, 20.0), (1000.0, 1000.0))


@pytest.mark.parametrize(
    ("before", "here", "survival", "theta", "floor"), [(21, 9, 0.3, 1.1048, 1.0286), (100, 55, 0.5, 0.4027, 0.4)]
)
def test_decay_rates(before: float, here: float, survival: float, theta: float, floor: float) -> None:
    found = decay_rate(before, here, survival)
    assert round(found, 4) == theta
    assert exp(-found * here) * (1 - survival + survival * exp(found)) ** before == pytest.approx(1.0)
    assert round(decay_floor(before, here, survival), 4) == floor


@given(st.integers(2, 300), st.floats(0.01, 0.98), st.floats(0.01, 0.99))
def test_the_root_lies_above_its_floor(before: int, survival: float, where: float) -> None:
    here = before * (survival + where * (1 - survival))
    if here >= before * (1 - 1e-6):
        return
    assert decay_rate(before, here, survival) >= decay_floor(before, here, survival) * (1 - 1e-9)


def test_shape_of_the_segments() -> None:
    four = Segments(10, (20.0, 40.0, 80.0, 160.0), (20.0, 40.0, 80.0, 160.0))
    assert four.survival() == pytest.approx((280 / 300, 240 / 280, 160 / 240))
    assert four.stages() == (21.0, 20.0, 40.0, 80.0)
    assert four.middles() == (10.0, 30.5, 60.5, 120.5)
    published = (15, 14, 12, 8)  # the early version's thresholds: what still comes by, in twentieths
    assert [n / 15 for n in published] == pytest.approx([sum(four.rates[k:]) / 300 for k in range(4)])


def test_a_batch_without_slack_holds_what_the_fluid_does() -> None:
    """With n_k exactly the survivors, the segments hold stage by stage what the types do."""
    found = solve(TWO.flows(), COST)
    first = sum(found.starts)
    assert batch_tokens(TWO, (first, found.starts[1])) == pytest.approx(found.memory_tokens)
    assert memory_of(TWO.flows(), found.starts) == pytest.approx(found.memory_tokens)


def test_the_bound_adds_up() -> None:
    own = (56, 31)
    found = bound(TWO, COST, own, horizon_s=100.0, delta=0.05)
    theta = decay_rate(56, 31, 0.5)
    assert found.batch_tokens == 56 * 11 * 15 + 31 * 10 * 25.5 == 17_145.0
    assert found.buffer_tokens == pytest.approx(20 * (31 + log(2 * (1 + 100 / 0.010) / 0.05) / theta))
    assert found.memory_tokens == found.batch_tokens + found.buffer_tokens
    assert found.thetas == (theta,) and found.floors == (decay_floor(56, 31, 0.5),)
    assert found.keeps_up and found.batch_s == pytest.approx(0.027145) and found.gather_s == pytest.approx(0.028)
    assert bound(TWO, COST, own, 1000.0, 0.05).memory_tokens > found.memory_tokens
    assert bound(TWO, COST, own, 100.0, 0.001).memory_tokens > found.memory_tokens


def test_the_smallest_whole_thresholds() -> None:
    assert whole_thresholds(TWO, COST) == (56, 31)
    short = bound(TWO, COST, (55, round(55 * 0.55)), 1.0, 0.05)
    assert short.batch_s < short.gather_s < 1.03 * short.batch_s
    with pytest.raises(PenstockError, match="no thresholds keep up"):
        whole_thresholds(Segments(10, (10.0, 20.0), (2000.0, 2000.0)), COST)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ((30, 15), "choose it between 15 and 30"),
        ((30, 30), "both excluded"),
        ((30,), "2 segments, 2 rates, 1 thresholds"),
    ],
)
def test_bad_thresholds(own: tuple[float, ...], words: str) -> None:
    with pytest.raises(PenstockError, match=words):
        bound(TWO, COST, own, 100.0, 0.05)


def test_bad_questions() -> None:
    with pytest.raises(PenstockError, match="delta must lie"):
        bound(TWO, COST, (56, 31), 100.0, 1.0)
    with pytest.raises(PenstockError, match="one after the other"):
        bound(Segments(10, (20.0, 10.0), (1.0, 1.0)), COST, (56, 31), 100.0, 0.05)
    with pytest.raises(PenstockError, match="between 0 and 1"):
        decay_rate(10, 5, 1.0)
