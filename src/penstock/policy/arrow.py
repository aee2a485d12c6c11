"""Arrow (arXiv 2505.11916 v2, sections 3.1 and 5.2-5.3): stateless instances whose role is a label.

Costs are pairs compared in order: first the work of the *other* phase on the instance, so that a clean instance always
wins, then the own phase's work against the SLO. When no instance meets the SLO, one is relabelled at once (algorithms 1
and 3); a monitor relabels prefill instances when decode load stays high, or exceeds an idle prefill pool's (algorithm
2). Work already there stays; nothing is drained.

The body of v2 was read through an implementation that cites it clause by clause; it gives no value for ``expand``,
``shrink``, the cooldown, or "sustained". Readings of ours, or of that implementation, where the text is open:

* Candidates are the role's pool (``candidates=all``: every instance, the letter of algorithm 1).
* "Decode load is low" means below ``shrink``; below ``expand`` both directions would be legal at once and ping-pong.
* Decode load is latency above the floor of an empty batch, else an idle engine with a tight SLO looks half loaded.
* A decode instance that emits nothing while it has work counts the time since its last progress as its latency.
* Prefill load is the time average between reviews; a sample at the review would see mostly 0.
* Step durations are the engine's own, so the gap of a KV transfer is not in the load (it is in the reported TPOT).
* MT is also bounded by the KV cache. A flip that cannot help (the request alone breaks its SLO) is not made. An empty
  pool is refilled at once, cooldown or not. Ours, all three.
* ``early`` below 1 asks for prefill instances before the TTFT target is lost. Ours; 1 is the paper.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.core.events import Event, Tick
from penstock.core.types import Role, Slo
from penstock.policy.arrow_monitor import LoadMonitor
from penstock.policy.latency import PrefillFit, TokenFit
from penstock.policy.options import Option, OptionValue, number, word
from penstock.policy.parts import Beliefs, Choice, DecodePlacement, Policy, PrefillPlacement, RoleChange, Roles
from penstock.policy.view import ClusterView, RequestRecord

ARROW_OPTIONS = (
    Option("expand", 1.0, "decode load at which the decode pool grows", "code", low=0.0),
    Option("shrink", 0.5, "load below which a pool can spare an instance", "code", low=0.0),
    Option("cooldown", 10.0, "seconds between flips from prefill to decode; the start counts as one", "code", low=0.0),
    Option("sustained", 3.0, "consecutive reviews that must agree", "code", low=1.0),
    Option("interval", 1.0, "seconds between reviews", "code", low=0.001),
    Option("candidates", "pool", "instances that are scored: the role's pool or all", "code", words=("pool", "all")),
    Option("early", 1.0, "share of the TTFT target whose use by the queue asks for a flip", low=0.0, high=1.0),
    Option("flips", "on", "off freezes the roles: the paper's ablation", "paper", words=("on", "off")),
)


def first_then_second(first: Any, second: Any) -> int:
    """Position of the lexicographic minimum of two columns, float64[k] each; the lowest position on a tie."""
    least = first.min()
    return int(np.where(first == least, second, np.inf).argmin())


class ArrowPrefill(PrefillPlacement):
    """Cost ``(resident decode tokens, prefill seconds with this one)``; meets the SLO if done before the deadline."""

    estimates = True

    def __init__(self, cost: PrefillFit, everywhere: bool = False, early: float = 1.0) -> None:
        self.cost = cost
        self.everywhere = everywhere
        self.early = early

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`PrefillPlacement`. With ``early`` < 1 a choice that meets the SLO late may ask for a flip."""
        rows = view.everyone if self.everywhere else view.prefills
        if len(rows) == 0:
            return Choice(-1, False)
        tokens = request.context_tokens()
        own = view.running_tokens[rows] + view.pending_tokens[rows]
        seconds = (view.prefill_estimate_s[rows] + self.cost.seconds(tokens)) * view.slow[rows]
        left = request.slo.ttft_s - (now_s - request.arrival_s)
        best = first_then_second(own, seconds)
        if seconds[best] <= left and view.capacity_tokens[rows[best]] >= tokens:
            return Choice(int(rows[best]), bool(seconds[best] <= self.early * left))
        meets = (seconds <= left) & (view.capacity_tokens[rows] >= tokens)
        if meets.any():
            some = np.flatnonzero(meets)
            best = int(some[first_then_second(own[some], seconds[some])])
            return Choice(int(rows[best]), bool(seconds[best] <= self.early * left))
        holds = np.flatnonzero(view.capacity_tokens[rows] >= tokens)
        if len(holds) > 0:
            best = int(holds[first_then_second(own[holds], seconds[holds])])
        return Choice(int(rows[best]), False)


class ArrowDecode(DecodePlacement):
    """Cost ``(prompt tokens to prefill, resident tokens with this one - MT)``; meets the SLO if the second is <= 0."""

    def __init__(self, step: TokenFit, everywhere: bool = False) -> None:
        self.step = step
        self.everywhere = everywhere

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`DecodePlacement`. A request whose prefill instance has become a decode instance stays there."""
        home = request.prefill_instance
        if home >= 0 and view.up[home] and view.role[home] == 1:
            return Choice(home)
        rows = view.everyone if self.everywhere else view.decodes
        if len(rows) == 0:
            return Choice(-1, False)
        other = view.prefill_tokens[rows]
        most = self._most_tokens(request.slo.tpot_s, view, rows)
        excess = view.resident_tokens(now_s, rows) + request.context_tokens() - most
        best = first_then_second(other, excess)
        if excess[best] <= 0.0:
            return Choice(int(rows[best]))
        some = np.flatnonzero(excess <= 0.0)
        if len(some) == 0:
            return Choice(int(rows[best]), False)
        return Choice(int(rows[some[first_then_second(other[some], excess[some])]]))

    def _most_tokens(self, tpot_s: float, view: ClusterView, rows: Any) -> Any:
        """MT of each row: tokens within the TPOT target, on a slow instance fewer, and never more than its KV cache."""
        within = (tpot_s / view.slow[rows] - self.step.intercept) / self.step.slope
        return np.minimum(np.maximum(within, 0.0), view.capacity_tokens[rows])


class ArrowRoles(Roles):
    """Algorithms 1 (urgent flips), 2 (monitor) and 3 (which instance flips)."""

    observes = True
    estimates = True

    def __init__(
        self,
        cost: PrefillFit,
        step: TokenFit,
        slo: Slo,
        expand: float = 1.0,
        shrink: float = 0.5,
        cooldown_s: float = 10.0,
        sustained: int = 3,
        interval_s: float = 1.0,
    ) -> None:
        self.cost = cost
        self.step = step
        self.expand = expand
        self.shrink = shrink
        self.cooldown_s = cooldown_s
        self.sustained = sustained
        self.interval_s = interval_s
        self.monitor = LoadMonitor(slo, step.intercept)
        self.decode_load = 0.0
        self.prefill_load = 0.0
        self._agreed = 0
        self._last_flip_s = -1.0

    def observe(self, event: Event, view: ClusterView, now_s: float) -> None:
        """Measure loads; the first event starts the cooldown."""
        if self._last_flip_s < 0.0:
            self._last_flip_s = now_s
        self.monitor.observe(event, view, now_s)

    def relieve(self, phase: Role, request: RequestRecord, view: ClusterView, now_s: float) -> RoleChange | None:
        """Algorithm 1, line 3. Prefill is urgent and knows no cooldown; decode overload builds up slowly and waits."""
        tokens = request.context_tokens()
        if phase == Role.DECODE:
            unwanted = now_s - self._last_flip_s < self.cooldown_s or self.step.seconds(tokens) > request.slo.tpot_s
            if unwanted and len(view.decodes) > 0:
                return None
            return self._towards_decode(view, tokens, now_s, "no decode instance meets TPOT")
        unwanted = self.decode_load >= self.shrink or self.cost.seconds(tokens) > request.slo.ttft_s
        if unwanted and len(view.prefills) > 0:
            return None
        return self._towards_prefill(view, tokens)

    def review(self, event: Tick, view: ClusterView, now_s: float) -> list[RoleChange]:
        """Algorithm 2."""
        self.monitor.observe(event, view, now_s)  # the controller shows a tick to observers only after the review
        self.prefill_load, self.decode_load = self.monitor.pool_loads(view, now_s)
        high = self.decode_load >= self.expand
        spare = self.prefill_load <= self.shrink <= self.decode_load
        self._agreed = self._agreed + 1 if high or spare else 0
        if self._agreed < self.sustained or now_s - self._last_flip_s < self.cooldown_s:
            return []
        change = self._towards_decode(view, 0, now_s, "decode load high" if high else "prefill load low")
        return [] if change is None else [change]

    def _towards_decode(self, view: ClusterView, tokens: float, now_s: float, reason: str) -> RoleChange | None:
        """Algorithm 3 from prefill: one with decodes left over first, then the one with the least prefill work."""
        rows = view.prefills
        if len(rows) <= 1:
            return None
        none_left = (view.decode_requests(rows) == 0.0).astype(np.float64)
        i = int(rows[first_then_second(none_left, view.prefill_estimate_s[rows])])
        if view.capacity_tokens[i] < tokens:
            return None
        self._last_flip_s = now_s
        self._agreed = 0
        return RoleChange(i, Role.DECODE, reason)

    def _towards_prefill(self, view: ClusterView, tokens: float) -> RoleChange | None:
        """Algorithm 3 from decode: one with prefills left over first, then the one with the fewest tokens."""
        rows = view.decodes
        if len(rows) <= 1:
            return None
        none_left = (view.prefill_requests[rows] == 0.0).astype(np.float64)
        held = view.running_tokens[rows] + view.pending_tokens[rows]
        i = int(rows[first_then_second(none_left, held)])
        if view.capacity_tokens[i] < tokens:
            return None
        return RoleChange(i, Role.PREFILL, "no prefill instance meets TTFT")


def arrow(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``arrow``."""
    cost, step = PrefillFit(beliefs), TokenFit(beliefs)
    everywhere = word(options, "candidates") == "all"
    roles = ArrowRoles(
        cost,
        step,
        slo,
        number(options, "expand"),
        number(options, "shrink"),
        number(options, "cooldown"),
        int(number(options, "sustained")),
        number(options, "interval"),
    )
    prefill, decode = ArrowPrefill(cost, everywhere, number(options, "early")), ArrowDecode(step, everywhere)
    return Policy("arrow", prefill, decode, roles=None if word(options, "flips") == "off" else roles)
