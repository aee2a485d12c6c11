"""Which moves lower the variance of the instances' loads most, now and over a horizon: the search behind ARES.

Moving a sequence of ``t`` tokens from an instance with ``S`` to one with ``D`` leaves the sum of the loads alone and
lowers the sum of their squares by ``2 t (S - D - t)``. So, with the sampled points weighted by ``w``,

    gain(r, s, d) = sum over points of  w t_r (L_s - L_d - t_r)        drop of the mean variance = 2 gain / instances

Only ``t_r L_d`` couples request and target, and that is a matrix product. ``L_d >= min over d`` bounds the gain of a
whole source in one pass, and a move changes the loads of its two instances only, which take no further part: a heap of
bounds gives the exact greedy sequence while it looks at few sources closely.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np


def project(context: Any, remaining: Any, slot: Any, held: Any, points: Any) -> tuple[Any, Any]:
    """Tokens of each request and of each instance at each point of the horizon.

    A request grows by one token a step and frees its KV when it ends.

    Parameters
    ----------
    context : float64[n]
        Tokens now.
    remaining : float64[n]
        Tokens still to come; what runs now counts at point 0 even if predicted to be over.
    slot : intp[n]
        Instance of each request, 0 to m - 1.
    held : float64[m]
        Tokens promised to each instance by requests that are not among the n; kept over the whole horizon.
    points : float64[p]
        Steps from now, ascending from 0.

    Returns
    -------
    tokens : float64[p, n]
    load : float64[p, m]
    """
    alive = points[:, None] < np.maximum(remaining, 1.0)[None, :]
    tokens = (context[None, :] + points[:, None]) * alive
    load = np.empty((len(points), len(held)))
    for p in range(len(points)):
        load[p] = np.bincount(slot, weights=tokens[p], minlength=len(held))
    load += held[None, :]
    return tokens, load


class Search:
    """One greedy search over a snapshot. Nothing in it outlives the tick.

    Parameters
    ----------
    tokens : float64[p, n]
        Tokens of each candidate at each point, candidates grouped by source.
    slot : intp[n]
        Source of each candidate, ascending.
    load : float64[p, m]
        Tokens of each instance at each point.
    weight : float64[p]
        Weight of each point, summing to 1.
    targets : intp[k]
        Instances that may receive.
    limit : float64[k]
        Most tokens each target may hold at any point.
    patience : float64[n]
        Remaining steps of a candidate over the seconds its move must pay back: the move is worth it if
        ``patience * (step seconds on the target afterwards) > 1``.
    slope, intercept : float64[k]
        Step seconds of each target: ``slope * tokens + intercept``.
    """

    def __init__(
        self,
        tokens: Any,
        slot: Any,
        load: Any,
        weight: Any,
        targets: Any,
        limit: Any,
        patience: Any,
        slope: Any,
        intercept: Any,
    ) -> None:
        self.tokens = tokens
        self.slot = slot
        self.targets = targets
        self.patience = patience
        self.slope = slope
        self.intercept = intercept
        self.weighted = tokens * weight[:, None]
        self.target_load = load[:, targets]
        self.room = limit[None, :] - self.target_load
        self.own = np.einsum("pn,pn->n", self.weighted, load[:, slot] - tokens)
        self.free = np.ones(len(targets), np.bool_)
        step_s = slope * self.target_load[0] + intercept
        self.least_step = float(step_s.min()) if len(targets) > 0 else 0.0
        self.least_room = float(self.room.min()) if len(targets) > 0 else 0.0

    def best(self, most: int, least_gain: float) -> list[tuple[int, int, float]]:
        """Up to ``most`` moves, best first, at most one per source and per target, each with gain > ``least_gain``.

        Returns
        -------
        list of (candidate, instance, gain)
            ``candidate`` indexes the columns of ``tokens``; ties go to the lower source, target and candidate.
        """
        found: list[tuple[int, int, float]] = []
        if len(self.slot) == 0 or len(self.targets) == 0:
            return found
        starts = np.flatnonzero(np.concatenate((np.ones(1, np.bool_), self.slot[1:] != self.slot[:-1])))
        ends = np.append(starts[1:], len(self.slot))
        bound = np.maximum.reduceat(self.own - self.target_load.min(axis=1) @ self.weighted, starts)
        # Entries: (-gain, or -bound while column is -1; group of candidates; column of its best target).
        heap: list[tuple[float, int, int]] = [(-float(bound[g]), g, -1) for g in range(len(starts))]
        heapq.heapify(heap)
        tops: dict[int, tuple[Any, Any]] = {}
        while heap and len(found) < most:
            negative, group, column = heapq.heappop(heap)
            if -negative <= least_gain:
                break
            if column >= 0 and self.free[column]:
                self.free[column] = False
                found.append((int(tops[group][0][column]), int(self.targets[column]), -negative))
                continue
            if column < 0:
                tops[group] = self._tops(int(starts[group]), int(ends[group]))
            gain = np.where(self.free, tops[group][1], -np.inf)
            column = int(gain.argmax())
            if gain[column] > least_gain:
                heapq.heappush(heap, (-float(gain[column]), group, column))
        return found

    def _tops(self, first: int, end: int) -> tuple[Any, Any]:
        """The best of candidates ``first:end`` for each target, intp[k], and its gain (-inf: none may), float64[k]."""
        gain = self._gains(first, end)
        best = gain.argmax(axis=1)
        return first + best, gain[np.arange(len(best)), best]

    def _gains(self, first: int, end: int) -> Any:
        """Gain of each candidate ``first:end`` on each target, -inf where the move is not allowed; float64[k, c]."""
        tokens = self.tokens[:, first:end]
        gain = self.own[first:end] - self.target_load.T @ self.weighted[:, first:end]
        # Most requests pass both tests on every target; only the doubtful ones are worth a look at each.
        doubtful = np.flatnonzero(self.patience[first:end] * self.least_step <= 1.0)
        if len(doubtful) > 0:
            step_s = (
                self.slope[:, None] * (self.target_load[0][:, None] + tokens[0, doubtful]) + self.intercept[:, None]
            )
            hasty = self.patience[first:end][doubtful] * step_s <= 1.0
            gain[:, doubtful] = np.where(hasty, -np.inf, gain[:, doubtful])
        doubtful = np.flatnonzero(tokens.max(axis=0) > self.least_room)
        if len(doubtful) > 0:
            fits = (tokens[:, None, doubtful] <= self.room[:, :, None]).all(axis=0)
            gain[:, doubtful] = np.where(fits, gain[:, doubtful], -np.inf)
        return gain
