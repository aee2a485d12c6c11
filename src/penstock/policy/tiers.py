"""TPOT tiers and the servers they hold (PolyServe, arXiv 2507.17769): a tier for each TPOT, the rest is a pool.

A tier is named by its TPOT budget in seconds. It takes servers from the pool, and empty ones go back. A server whose
last request of its own tier has left, with guests from looser tiers on it, becomes one of the tightest of these.
"""

from __future__ import annotations

from typing import Any

import numpy as np

POOL = -1.0
"""What stands in :attr:`Tiers.budget_s` for a server in the pool."""


class Tiers:
    """Which server works for which tier.

    Parameters
    ----------
    merge : float
        Classes whose TPOT is at most this factor above a tier's share that tier (the tightest such). 1: a tier for
        each TPOT.

    Attributes
    ----------
    known : list of float
        Budgets of the tiers that requests have asked for, tightest first.
    budget_s : float64[servers]
        The budget of each server's tier, ``POOL`` where it has none.
    taken, given : int
        Servers taken from the pool and given back so far.
    """

    def __init__(self, merge: float = 1.0) -> None:
        self.merge = merge
        self.known: list[float] = []
        self.budget_s: Any = np.empty(0)
        self.taken = 0
        self.given = 0

    def cover(self, size: int) -> None:
        """Make room for ``size`` servers; new ones start in the pool."""
        more = size - len(self.budget_s)
        if more > 0:
            self.budget_s = np.concatenate((self.budget_s, np.full(more, POOL)))

    def tier_of(self, tpot_s: float) -> float:
        """The tier of requests with this TPOT target (``inf``: none); a new one if none will do."""
        for budget in self.known:
            if budget <= tpot_s <= self.merge * budget:
                return budget
        self.known.append(tpot_s)
        self.known.sort()
        return tpot_s

    def tighter(self, tier: float) -> list[float]:
        """Tiers that a request of ``tier`` may be promoted to, the least tight first."""
        return [budget for budget in reversed(self.known) if budget < tier]

    def servers(self, tier: float, rows: Any) -> Any:
        """Those of ``rows`` (intp[k]) that work for ``tier``."""
        return rows[self.budget_s[rows] == tier]

    def pool(self, rows: Any) -> Any:
        """Those of ``rows`` (intp[k]) that work for no tier."""
        return rows[self.budget_s[rows] == POOL]

    def take(self, server: int, tier: float) -> None:
        """Move a server from the pool to a tier."""
        assert self.budget_s[server] == POOL, "only the pool gives servers away"
        self.budget_s[server] = tier
        self.taken += 1

    def loosen(self, server: int, tier: float) -> None:
        """The tightest request there is of ``tier``: if that is looser than the server's tier, it changes to it."""
        if self.budget_s[server] < tier:
            self.budget_s[server] = tier

    def give_back(self, server: int) -> None:
        """Put a server into the pool: it has run empty, or is gone."""
        if self.budget_s[server] != POOL:
            self.budget_s[server] = POOL
            self.given += 1


class Demand:
    """How many requests of each tier need a server now, whether they have one or wait."""

    def __init__(self) -> None:
        self._tier: dict[int, float] = {}
        self._counted: set[int] = set()
        self._count: dict[float, int] = {}

    def expect(self, request: int, tier: float) -> None:
        """A request of a tier has arrived."""
        self._tier[request] = tier

    def begin(self, request: int) -> None:
        """It needs a server from now on (again, perhaps: lost ones begin twice)."""
        if request in self._tier and request not in self._counted:
            self._counted.add(request)
            tier = self._tier[request]
            self._count[tier] = self._count.get(tier, 0) + 1

    def end(self, request: int) -> None:
        """It has finished or was given up."""
        tier = self._tier.pop(request, None)
        if tier is not None and request in self._counted:
            self._counted.discard(request)
            self._count[tier] -= 1

    def of(self, tier: float) -> int:
        """Requests of a tier."""
        return self._count.get(tier, 0)
