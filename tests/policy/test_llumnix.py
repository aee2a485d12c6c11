"""Llumnix: freeness, the pairs and the test against swinging back."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.core.types import Role
from penstock.policy.llumnix import FreenessRescheduler, freeness
from penstock.policy.parts import Move
from tests.policy.cluster import cluster, running_of

D = Role.DECODE


def test_freeness_is_free_tokens_a_request() -> None:
    view = cluster([D, D, D], [90_000, 0, 100_000], [10, 0, 5])
    view.pending_tokens[0] = 20_000
    view.pending_requests[0] = 10
    steps = freeness(view, np.arange(3), 0.0)
    assert steps[0] == pytest.approx(-500.0)
    assert steps[1] > 1e12
    assert steps[2] == pytest.approx(0.0)


def test_the_shortest_request_leaves_the_full_instance() -> None:
    view = cluster([D, D], [99_990, 10_000], [5, 5])
    running = running_of([(1, 0, 20_000, 10, -1.0), (2, 0, 100, 5, -1.0), (3, 0, 9_000, 4, -1.0), (4, 1, 10, 1, -1.0)])
    assert FreenessRescheduler().moves(running, view, 0.0) == [Move(2, 0, 1, "freeness")]
    assert FreenessRescheduler(choice="longest").moves(running, view, 0.0)[0].request == 1
    assert FreenessRescheduler(choice="latest").moves(running, view, 0.0)[0].request == 3


@pytest.mark.parametrize(
    ("tokens", "running", "why"),
    [
        ([99_000, 10_000], [5, 5], "source has 200 steps left"),
        ([99_990, 99_950], [5, 5], "target would fall below the threshold"),
        ([99_998, 99_990], [1, 1], "the source would be freer than the target afterwards"),
    ],
)
def test_no_move(tokens: list[int], running: list[int], why: str) -> None:
    view = cluster([D, D], tokens, running)
    rows = running_of([(1, 0, 45, 5, -1.0)])
    assert FreenessRescheduler().moves(rows, view, 0.0) == [], why


def test_a_preempting_instance_sheds_and_receives_nothing() -> None:
    view = cluster([D, D], [50_000, 10_000], [500, 5])
    view.preemptions[0] = 1.0
    rows = running_of([(1, 0, 45, 5, -1.0)])
    assert [m.target for m in FreenessRescheduler().moves(rows, view, 0.0)] == [1]
    view.preemptions[1] = 1.0
    assert FreenessRescheduler().moves(rows, view, 0.0) == []


def test_one_migration_per_instance_and_worst_first() -> None:
    view = cluster([D, D, D, D], [99_990, 99_999, 10_000, 20_000], [5, 5, 5, 5])
    rows = running_of([(1, 0, 100, 5, -1.0), (2, 1, 100, 5, -1.0)])
    moves = FreenessRescheduler().moves(rows, view, 0.0)
    assert [(m.source, m.target) for m in moves] == [(1, 2), (0, 3)]
    view.moving[1] = 1.0
    assert [(m.source, m.target) for m in FreenessRescheduler().moves(rows, view, 0.0)] == [(0, 2)]
