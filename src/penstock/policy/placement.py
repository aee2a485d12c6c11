"""Simple placements that several policies share: in turn, least prefill work, least resident KV, fewest requests.

Each is a filter (does the sequence fit?) and a score (smaller is better; ties go to the lower index). The filter costs
array operations only when the best-scored instance fails it: the best one that passes is the best of those that pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.core.types import Role
from penstock.policy.latency import PrefillFit
from penstock.policy.parts import Choice, DecodePlacement, PrefillPlacement
from penstock.policy.view import ClusterView, RequestRecord


def has_room(view: ClusterView, i: int, tokens: float) -> bool:
    """Would ``tokens`` more KV tokens and one more request fit on ``i``, by the latest word and what is promised?"""
    held = view.running_tokens[i] + view.pending_tokens[i]
    return bool(
        held + tokens <= view.capacity_tokens[i] and view.running[i] + view.pending_requests[i] < view.max_running[i]
    )


def with_room(view: ClusterView, rows: Any, tokens: float) -> Any:
    """:func:`has_room` for every one of ``rows``: intp[k] in, bool[k] out."""
    held = view.running_tokens[rows] + view.pending_tokens[rows]
    return (held + tokens <= view.capacity_tokens[rows]) & (view.decode_requests(rows) < view.max_running[rows])


def least_with_room(view: ClusterView, rows: Any, score: Any, tokens: float) -> Choice:
    """The row with the least ``score`` among those with room for a decode; without ``fits`` if none has room.

    Parameters
    ----------
    rows : intp[k]
    score : float64[k]
        Finite; smaller is better.
    tokens : float
        KV tokens the request brings.
    """
    if len(rows) == 0:
        return Choice(-1, False)
    best = int(rows[score.argmin()])
    if has_room(view, best, tokens):
        return Choice(best)
    fits = with_room(view, rows, tokens)
    if not fits.any():
        return Choice(best, False)
    return Choice(int(rows[np.where(fits, score, np.inf).argmin()]))


def least_that_holds(view: ClusterView, rows: Any, score: Any, tokens: float) -> Choice:
    """The row with the least ``score`` among those whose KV cache, when empty, holds ``tokens`` (a prefill waits)."""
    if len(rows) == 0:
        return Choice(-1, False)
    best = int(rows[score.argmin()])
    if view.capacity_tokens[best] >= tokens:
        return Choice(best)
    fits = view.capacity_tokens[rows] >= tokens
    if not fits.any():
        return Choice(best, False)
    return Choice(int(rows[np.where(fits, score, np.inf).argmin()]))


def that_hold(view: ClusterView, rows: Any, tokens: float) -> Any:
    """Those of ``rows`` whose KV cache, when empty, holds ``tokens``: intp[k] in, intp[j] out."""
    return rows[view.capacity_tokens[rows] >= tokens]


def first_of(rows: Any) -> Choice:
    """The answer where none of ``rows`` (intp[k]) could ever do: the first, without ``fits``."""
    return Choice(int(rows[0]) if len(rows) > 0 else -1, False)


class Rotation:
    """Instances in turn, skipping those that could never hold the sequence. Blind to load, as round robin is."""

    def __init__(self) -> None:
        self._turn = -1

    def take(self, view: ClusterView, rows: Any, tokens: float) -> Choice:
        """The next of ``rows`` (intp[k])."""
        n = len(rows)
        for _ in range(n):
            self._turn = (self._turn + 1) % n
            i = int(rows[self._turn])
            if view.capacity_tokens[i] >= tokens:
                return Choice(i)
        return first_of(rows)


class RoundRobinPrefill(PrefillPlacement):
    """Prefill instances (or mixed ones) in turn."""

    def __init__(self, role: Role = Role.PREFILL) -> None:
        self.role = role
        self._rotation = Rotation()

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`PrefillPlacement`."""
        return self._rotation.take(view, view.index_of(self.role), request.context_tokens())


class RoundRobinDecode(DecodePlacement):
    """Decode instances in turn."""

    def __init__(self) -> None:
        self._rotation = Rotation()

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`DecodePlacement`."""
        return self._rotation.take(view, view.decodes, request.context_tokens())


class LeastPrefillWork(PrefillPlacement):
    """The instance that is believed to finish this prefill first: work queued there and this, times its slowness."""

    estimates = True

    def __init__(self, cost: PrefillFit) -> None:
        self.cost = cost

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`PrefillPlacement`."""
        rows = view.prefills
        tokens = request.context_tokens()
        score = (view.prefill_estimate_s[rows] + self.cost.seconds(tokens)) * view.slow[rows]
        return least_that_holds(view, rows, score, tokens)


class ShortestQueue(PrefillPlacement):
    """The prefill instance with the fewest requests not yet prefilled (DistServe, arXiv 2401.09670)."""

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`PrefillPlacement`."""
        rows = view.prefills
        return least_that_holds(view, rows, view.prefill_requests[rows], request.context_tokens())


class LeastResident(DecodePlacement):
    """The decode instance with the fewest resident KV tokens, promised ones included (FlowKV-like)."""

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`DecodePlacement`."""
        rows = view.decodes
        return least_with_room(view, rows, view.resident_tokens(now_s, rows), request.context_tokens())


class FewestRequests(DecodePlacement):
    """The decode instance with the fewest decodes, promised ones included (DistServe, arXiv 2401.09670)."""

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`DecodePlacement`."""
        rows = view.decodes
        return least_with_room(view, rows, view.decode_requests(rows), request.context_tokens())
