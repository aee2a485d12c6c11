"""PolyServe's router as LMetric (OSDI'26) re-implements it, in three lines and without tiers, pool or waiting.

Predict (TTFT, TPOT) of the request on each replica. Where some are feasible, take the one with the *highest* predicted
TPOT; where none is, the one with the lowest. LMetric tuned the TPOT bound to its cluster (20 ms for 16 replicas of
Qwen3-30B); here the default is the request's own target. Both predictions are ours: TTFT is the prefill work believed
to wait there and this prompt's, TPOT the iteration with everything that is there or promised and this request.
"""

from __future__ import annotations

from math import inf

import numpy as np

from penstock.core.types import Slo
from penstock.policy.latency import PrefillFit
from penstock.policy.options import Option, OptionValue, number
from penstock.policy.parts import Beliefs, Choice, Policy, PrefillPlacement
from penstock.policy.placement import first_of, that_hold
from penstock.policy.profile_table import ProfileTable
from penstock.policy.view import ClusterView, RequestRecord

LMETRIC_OPTIONS = (
    Option(
        "tpot", 0.0, "bound of the predicted TPOT in seconds; 0: the request's target (LMetric tuned it: 0.02)", low=0.0
    ),
    Option("ttft", 0.0, "bound of the predicted TTFT in seconds; 0: the request's target", low=0.0),
)


class PackedReplica(PrefillPlacement):
    """The feasible replica with the highest predicted TPOT, else the one with the lowest."""

    estimates = True

    def __init__(self, table: ProfileTable, prefill: PrefillFit, tpot_s: float = 0.0, ttft_s: float = 0.0) -> None:
        self.table = table
        self.prefill = prefill
        self.tpot_s = tpot_s
        self.ttft_s = ttft_s

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`PrefillPlacement`; without ``fits`` if no replica is feasible."""
        tokens = request.context_tokens()
        rows = that_hold(view, view.mixed, tokens)
        if len(rows) == 0:
            return first_of(view.mixed)
        requests = view.decode_requests(rows) + view.prefill_requests[rows] + 1.0
        resident = view.resident_tokens(now_s, rows) + view.prefill_tokens[rows] + tokens
        tpot_s = self.table.iteration_s(requests, resident) * view.slow[rows]
        queued_s = (view.prefill_estimate_s[rows] + self.prefill.seconds(tokens)) * view.slow[rows]
        ttft_s = now_s - request.arrival_s + queued_s
        feasible = tpot_s <= (self.tpot_s or request.slo.tpot_s)
        feasible &= ttft_s <= (self.ttft_s or request.slo.ttft_s)
        feasible &= (resident <= view.capacity_tokens[rows]) & (requests <= view.max_running[rows])
        if feasible.any():
            return Choice(int(rows[np.where(feasible, tpot_s, -inf).argmax()]))
        return Choice(int(rows[tpot_s.argmin()]), False)


def lmetric(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``lmetric``."""
    part = PackedReplica(ProfileTable(beliefs), PrefillFit(beliefs), number(options, "tpot"), number(options, "ttft"))
    return Policy("lmetric", part)
