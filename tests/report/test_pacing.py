"""The client's buffer: shown times, gaps, and what it cannot hide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.report.pacing import paced, paced_gaps, stalls


@pytest.mark.parametrize(
    ("times", "shown", "late"),
    [
        ([0.0, 0.1, 0.2], [0.0, 0.1, 0.2], [0.0, 0.0]),  # as fast as the pace: nothing changes
        ([0.0, 0.02, 0.04, 0.3], [0.0, 0.1, 0.2, 0.3], [0.0, 0.0, 0.0]),  # the burst bridges the pause
        ([0.0, 0.02, 0.5], [0.0, 0.1, 0.5], [0.0, 0.3]),  # one token in hand is not enough
        ([1.0], [1.0], []),
    ],
)
def test_bursts_bridge_pauses(times: list[float], shown: list[float], late: list[float]) -> None:
    assert paced(np.array(times), 0.1) == pytest.approx(shown)
    assert stalls(np.array(times), 0.1) == pytest.approx(late)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40), st.floats(0.0, 0.5))
@settings(deadline=None)
def test_the_recurrence(gaps: list[float], pace_s: float) -> None:
    times = np.cumsum(gaps)
    shown = paced(times, pace_s)
    by_hand = [times[0]]
    for t in times[1:]:
        by_hand.append(max(t, by_hand[-1] + pace_s))
    assert shown == pytest.approx(by_hand)
    assert (shown >= times - 1e-9).all()
    assert (paced_gaps(times, pace_s) >= pace_s - 1e-9).all()
    assert (stalls(times, pace_s) >= 0.0).all()


@given(st.lists(st.floats(0.0, 0.2), min_size=1, max_size=40))
@settings(deadline=None)
def test_no_stall_while_every_token_is_within_its_schedule(slack: list[float]) -> None:
    """Token i at or before first + i * TPOT (what Kairos's slack keeps) shows without a stall."""
    schedule = np.arange(len(slack)) * 0.1
    times = np.maximum.accumulate(np.maximum(schedule - np.array([0.0, *slack[1:]]), 0.0))
    assert not stalls(times, 0.1).any()
