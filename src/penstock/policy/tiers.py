"""TPOT tiers and the servers they hold (PolyServe, arXiv 2507.17769): a tier for each TPOT, the rest is a pool.

A tier is named by its TPOT budget in seconds. Servers change hands in two ways only: a tier takes one from the pool,
and an empty one goes back.
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

    def give_back(self, server: int) -> None:
        """Put a server into the pool: it has run empty, or is gone."""
        if self.budget_s[server] != POOL:
            self.budget_s[server] = POOL
            self.given += 1
