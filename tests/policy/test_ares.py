"""ARES: the vectorised search against an exhaustive one that follows the definition, and its rules one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.types import Role
from penstock.policy.ares import AresDispatch, AresRescheduler, Horizon
from penstock.policy.latency import TokenFit
from penstock.policy.parts import Running
from penstock.policy.view import ClusterView
from penstock.predict.remaining import Nothing, Observed
from tests.policy.cluster import BELIEFS, cluster, request, running_of

D, P = Role.DECODE, Role.PREFILL
STEPS, POINTS, DECAY = 800.0, 4, 0.8


def rescheduler(steps: float = STEPS, **settings: float) -> AresRescheduler:
    made = AresRescheduler(BELIEFS, Horizon(steps, POINTS, DECAY), Observed(Nothing()))
    for name, value in settings.items():
        setattr(made, name, value)
    return made


class Naive:
    """The definition, literally: loads at every point, the mean variance before and after, every pair tried."""

    def __init__(self, part: AresRescheduler, running: Running, view: ClusterView) -> None:
        self.part, self.view = part, view
        self.points, self.weight = list(part.horizon.points), list(part.horizon.weight)
        self.rows = list(
            zip(running.requests, running.instances, running.prompt + running.generated, running.predicted, strict=True)
        )
        self.pool = [int(i) for i in view.decodes]
        self.where = {int(r): int(i) for r, i, _, _ in self.rows}
        self.load = {i: [self.tokens_on(i, t) for t in self.points] for i in self.pool}

    def tokens(self, context: float, left: float, t: float) -> float:
        left = left if left >= 0.0 else math.inf
        return context + t if t < max(left, 1.0) else 0.0

    def tokens_on(self, i: int, t: float) -> float:
        mine = sum(self.tokens(float(c), float(left), t) for _, where, c, left in self.rows if where == i)
        return float(mine + self.view.pending_tokens[i])

    def score(self, load: dict[int, list[float]]) -> float:
        return float(sum(w * float(np.var([load[i][p] for i in self.pool])) for p, w in enumerate(self.weight)))

    def after(self, request: int, target: int) -> dict[int, list[float]]:
        load = {i: list(x) for i, x in self.load.items()}
        for r, source, context, left in self.rows:
            if r == request:
                for p, t in enumerate(self.points):
                    load[int(source)][p] -= self.tokens(float(context), float(left), t)
                    load[target][p] += self.tokens(float(context), float(left), t)
        return load

    def allowed(self, request: int, target: int) -> bool:
        part, view, fit = self.part, self.view, TokenFit(BELIEFS)
        overall = {i: sum(w * x for w, x in zip(self.weight, self.load[i], strict=True)) for i in self.pool}
        mean = sum(overall.values()) / len(overall)
        source = self.where[request]
        if overall[source] <= (1 + part.margin) * mean or overall[target] >= (1 - part.margin) * mean:
            return False
        if view.moving[source] or view.moving[target]:
            return False
        _, _, context, left = next(row for row in self.rows if row[0] == request)
        after = self.after(request, target)[target]
        if max(after) > view.capacity_tokens[target] * (1 - part.reserve):
            return False
        left = float(left) if left >= 0.0 else math.inf
        return left * fit.seconds(after[0]) > part.amortise * BELIEFS.transfer_s(int(context))

    def best(self) -> tuple[float, set[tuple[int, int]]]:
        """Greatest drop of the score, and the moves (request, target) that reach it."""
        before, top, winners = self.score(self.load), 0.0, set[tuple[int, int]]()
        for r, source, _, _ in self.rows:
            for target in self.pool:
                if target == source or not self.allowed(int(r), target):
                    continue
                drop = before - self.score(self.after(int(r), target))
                if drop > top * (1 + 1e-9) + 1e-6:
                    top, winners = drop, {(int(r), target)}
                elif drop > top * (1 - 1e-9) - 1e-6 and drop > 1e-6:
                    winners.add((int(r), target))
        return top, winners


@st.composite
def clusters(draw: st.DrawFn) -> tuple[ClusterView, Running]:
    n = draw(st.integers(2, 5))
    view = cluster([P] + [D] * n, capacity_tokens=draw(st.sampled_from([3_200, 9_600, 96_000])))
    rows = draw(
        st.lists(
            st.tuples(
                st.integers(1, n),
                st.integers(1, 2000),
                st.integers(1, 500),
                st.one_of(st.integers(0, 2000).map(float), st.just(-1.0)),
            ),
            max_size=14,
        )
    )
    for i in range(1, n + 1):
        view.pending_tokens[i] = draw(st.sampled_from([0, 0, 300]))
        view.moving[i] = draw(st.sampled_from([0, 0, 0, 1]))
    return view, running_of([(100 + k, *row) for k, row in enumerate(rows)])


@settings(max_examples=150, deadline=None)
@given(clusters(), st.sampled_from([0.0, STEPS]))
def test_the_first_move_is_the_best_of_all(made: tuple[ClusterView, Running], steps: float) -> None:
    view, running = made
    part = rescheduler(steps, least_gain=0.0)
    naive = Naive(part, running, view)
    drop, winners = naive.best()
    moves = part.moves(running, view, 0.0)
    if drop > 1e-3:  # below that rounding decides whether there is a gain at all
        assert moves and (moves[0].request, moves[0].target) in winners


@settings(max_examples=100, deadline=None)
@given(clusters())
def test_moves_are_apart_help_and_fit(made: tuple[ClusterView, Running]) -> None:
    view, running = made
    part = rescheduler()
    moves = part.moves(running, view, 0.0)
    touched = [i for m in moves for i in (m.source, m.target)]
    assert len(touched) == len(set(touched))
    naive = Naive(part, running, view)
    score = naive.score(naive.load)
    for move in moves:
        assert naive.where[move.request] == move.source
        assert naive.allowed(move.request, move.target)
        naive.load = naive.after(move.request, move.target)
        assert max(naive.load[move.target]) <= view.capacity_tokens[move.target] * (1 - part.reserve)
        assert naive.score(naive.load) < score
        score = naive.score(naive.load)
    again = rescheduler().moves(running, view, 0.0)
    assert [(m.request, m.target) for m in again] == [(m.request, m.target) for m in moves]


@settings(max_examples=60, deadline=None)
@given(clusters())
def test_several_moves_follow_the_greedy_order(made: tuple[ClusterView, Running]) -> None:
    """After its first move is made by hand and its two instances are locked, the next best is the second."""
    view, running = made
    moves = rescheduler(margin=0.0, least_gain=0.0).moves(running, view, 0.0)
    if len(moves) < 2:
        return
    view.moving[moves[0].source] = view.moving[moves[0].target] = 1.0
    naive = Naive(rescheduler(margin=0.0), running, view)
    drop, winners = naive.best()
    if drop > 1e-3:
        assert (moves[1].request, moves[1].target) in winners


def test_the_horizon_sees_what_current_loads_hide() -> None:
    """Equal tokens now, but instance 0 keeps its requests for long and instance 1 is about to lose them."""
    view = cluster([D, D])
    long = [(k, 0, 1000, 0, 5000.0) for k in range(4)]
    short = [(10 + k, 1, 1000, 0, 100.0) for k in range(4)]
    running = running_of(long + short)
    assert rescheduler(0.0).moves(running, view, 0.0) == []
    moves = rescheduler().moves(running, view, 0.0)
    assert [(m.source, m.target) for m in moves] == [(0, 1)]


def test_nearly_finished_requests_stay() -> None:
    view = cluster([D, D])
    rows = [(1, 0, 20_000, 0, 2.0), (2, 0, 20_000, 0, 2.0)]
    assert rescheduler(0.0, amortise=20.0).moves(running_of(rows), view, 0.0) == []
    assert len(rescheduler(0.0, amortise=0.01).moves(running_of(rows), view, 0.0)) == 1


def test_small_gains_are_left_alone() -> None:
    view = cluster([D, D])
    rows = running_of([(1, 0, 100, 0, -1.0), (2, 0, 5000, 0, -1.0), (3, 1, 4000, 0, -1.0)])
    assert len(rescheduler(0.0).moves(rows, view, 0.0)) == 1
    assert rescheduler(0.0, least_gain=0.2).moves(rows, view, 0.0) == []


def test_requests_outside_the_pool_are_left_alone() -> None:
    view = cluster([P, D, D])
    rows = running_of([(1, 0, 9000, 0, -1.0), (2, 1, 100, 0, -1.0)])
    assert all(m.source != 0 for m in rescheduler().moves(rows, view, 0.0))
    assert rescheduler().moves(running_of([]), view, 0.0) == []
    assert rescheduler().moves(running_of([]), cluster([P]), 0.0) == []


def test_dispatch_prefers_the_instance_that_empties_first() -> None:
    view = cluster([D, D], [4000, 4000], [4, 4])
    horizon, predictor = Horizon(STEPS, POINTS, DECAY), Observed(Nothing())
    part = AresRescheduler(BELIEFS, horizon, predictor)
    rows = [(k, 0, 1000, 0, 5000.0) for k in range(4)] + [(10 + k, 1, 1000, 0, 100.0) for k in range(4)]
    part.moves(running_of(rows), view, 0.0)
    dispatch = AresDispatch(horizon, predictor)
    assert dispatch.place(request(predicted=4000.0), view, 0.0).instance == 1
    # Each dispatch adds what it sends: the long ones sent to 1 make it the fuller one in the end.
    sent = [dispatch.place(request(prompt=1000, predicted=9000.0), view, 0.0).instance for _ in range(8)]
    assert 0 in sent


def test_without_horizon_dispatch_is_least_resident() -> None:
    dispatch = AresDispatch(Horizon(0.0, POINTS, DECAY), Nothing())
    view = cluster([D, D], [4000, 3000], [1, 1])
    assert dispatch.place(request(), view, 0.0).instance == 1


@pytest.mark.parametrize(("context", "left"), [(100.0, 0.0), (100.0, 350.0), (50.0, 1e9)])
def test_later_is_the_projection(context: float, left: float) -> None:
    horizon = Horizon(STEPS, POINTS, DECAY)
    want = sum(w * (context + t) for t, w in zip(horizon.points[1:], horizon.weight[1:], strict=True) if t < left)
    assert horizon.later(context, left) == pytest.approx(float(want))
