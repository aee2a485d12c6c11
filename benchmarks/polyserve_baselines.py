"""What PolyServe is compared with: tiers of fixed size, and the bound of tiers that never interfere.

Used by ``polyserve.py``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np

from penstock.core.types import Slo
from penstock.perf.step import StepModel
from penstock.policy.chunking import Credit, TierKit
from penstock.policy.latency import PrefillFit
from penstock.policy.parts import Beliefs, Choice, DecodePlacement, Policy, PrefillPlacement
from penstock.policy.placement import LeastPrefillWork, least_that_holds, least_with_room
from penstock.policy.profile_table import ProfileTable
from penstock.policy.tiers import Tiers
from penstock.policy.view import ClusterView, RequestRecord


class FixedTiers:
    """Which rows of the servers belong to a TPOT target, and whose turn it is.

    Parameters
    ----------
    split : sequence of (float, int)
        TPOT and number of servers of each tier, in the order of the servers.
    choice : str
        ``random``, ``turn`` or ``fewest`` (requests): which server of the tier.
    """

    def __init__(self, split: Sequence[tuple[float, int]], choice: str, seed: int = 0) -> None:
        ends = np.cumsum([count for _, count in split])
        self.rows = {tpot: np.arange(end - count, end) for (tpot, count), end in zip(split, ends, strict=True)}
        self.choice = choice
        self.turn = dict.fromkeys(self.rows, -1)
        self.random = random.Random(seed)

    def pick(self, request: RequestRecord, servers: Any) -> Any:
        """One server of the request's tier (the loosest that is tight enough), or for ``fewest`` all: intp[k]."""
        tpot = max(tier for tier in self.rows if tier <= request.slo.tpot_s)
        rows = servers[self.rows[tpot]]
        if self.choice == "turn":
            self.turn[tpot] = (self.turn[tpot] + 1) % len(rows)
            return rows[self.turn[tpot] : self.turn[tpot] + 1]
        if self.choice == "random":
            k = self.random.randrange(len(rows))
            return rows[k : k + 1]
        return rows


class FixedTierDecode(DecodePlacement):
    """Decodes in tiers that never change."""

    def __init__(self, tiers: FixedTiers) -> None:
        self.tiers = tiers

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`DecodePlacement`."""
        rows = self.tiers.pick(request, view.decodes)
        return least_with_room(view, rows, view.decode_requests(rows), request.context_tokens())


class FixedTierReplica(PrefillPlacement):
    """Replicas in tiers that never change."""

    def __init__(self, tiers: FixedTiers) -> None:
        self.tiers = tiers

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`PrefillPlacement`."""
        rows = self.tiers.pick(request, view.mixed)
        score = view.decode_requests(rows) + view.prefill_requests[rows]
        return least_that_holds(view, rows, score, request.context_tokens())


def fixed_tiers(beliefs: Beliefs, split: Sequence[tuple[float, int]], choice: str) -> Policy:
    """Disaggregated, ``split`` decode servers a tier."""
    return Policy("tiers", LeastPrefillWork(PrefillFit(beliefs)), FixedTierDecode(FixedTiers(split, choice)))


def fixed_mixed_tiers(beliefs: Beliefs, split: Sequence[tuple[float, int]], choice: str, chunking: bool) -> Policy:
    """Replicas, ``split`` a tier; ``chunking``: with PolyServe's dynamic chunks, else vLLM's."""
    part = FixedTierReplica(FixedTiers(split, choice))
    if not chunking:
        return Policy("tiers", part)
    tiers = Tiers()
    tiers.cover(sum(count for _, count in split))
    server = 0
    for tpot, count in split:
        for _ in range(count):
            tiers.take(server, tiers.tier_of(tpot))
            server += 1
    return Policy("tiers", part, engine=TierKit(ProfileTable(beliefs), tiers, Credit(), stretch=1.0))


# -- the bound --------------------------------------------------------------------------------------------------------


def best_rate(
    step: StepModel,
    capacity_tokens: float,
    tpot_s: float,
    prompt: Any,
    output: Any,
    mixed: bool,
) -> float:
    """Most requests/s of one class that one server can sustain: a fluid batch, every step exactly as long as allowed.

    The batch is the largest whose KV fits and whose step takes at most ``tpot_s``. A request holds its prompt and, on
    average over its stay, half of its output. In mixed mode each step also computes the prompt tokens that keep up
    with the departures.
    """
    stay = float(output.mean())
    context = float((output * (prompt + 0.5 * output)).sum() / output.sum())
    best = 0.0
    for batch in range(1, int(capacity_tokens / context) + 1):
        chunk = round(batch * float(prompt.mean()) / stay) if mixed else 0
        new, past = ([chunk], [round(float(prompt.mean()) / 2)]) if chunk else ([], [])
        seconds = step.step_s(batch, round(batch * context), new, past)
        if seconds > tpot_s:
            break
        best = max(best, batch / (stay * seconds))
    return best


def bound_rps(rates: Sequence[float], shares: Sequence[float], servers: int) -> float:
    """Rate at which ``servers`` servers, split among the tiers as real numbers, are all at their best rate."""
    return servers / sum(share / rate if rate > 0 else inf for share, rate in zip(shares, rates, strict=True))


def best_split(rates: Sequence[float], shares: Sequence[float], servers: int) -> list[int]:
    """Whole servers a tier with the highest rate that no tier exceeds: add one where it is lowest."""
    split = [1] * len(rates)
    while sum(split) < servers:
        reach = [n * rate / share for n, rate, share in zip(split, rates, shares, strict=True)]
        split[int(np.argmin(reach))] += 1
    return split


def slos_by_class(tpots: Sequence[float], ttft_s: float) -> dict[str, Slo]:
    """Classes named after their TPOT in milliseconds."""
    return {f"{tpot * 1e3:g} ms": Slo(ttft_s, tpot) for tpot in tpots}
