"""xLLM's production dispatcher (JD xllm-service, SLO_AWARE policy; report arXiv 2510.14686): pack decodes, lend, flip.

Prefill and decode instance are chosen together on arrival, and the decode slot is held from then on. Decode takes the
first instance, in index order, whose predicted step with this request meets TPOT: first fit packs decodes on few
instances, so that one runs empty and can become a prefill instance. An underused decode instance may be lent for a
prefill; a decode shortage flips the prefill instance just chosen.

The report gives no formulas: this is the behaviour of the published code. Differing from it: SLOs come with the
request (targets below where it has none), latencies are not truncated to whole milliseconds, an instance whose KV
cache cannot hold the prompt is passed over, and instances that are down are not scored. ``minP.time`` leaves out the
request itself, and the request that causes a flip does not decode on the flipped instance: both as in the code.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.core.events import Aborted, Event, Finished, MigrationDone
from penstock.core.types import Role, Slo
from penstock.policy.latency import BatchFit
from penstock.policy.options import Option, OptionValue, number
from penstock.policy.parts import Beliefs, Choice, DecodePlacement, Policy, PrefillPlacement, RoleChange, Roles
from penstock.policy.placement import least_with_room
from penstock.policy.view import ClusterView, RequestRecord

XLLM_OPTIONS = (
    Option("ttft", 1.0, "TTFT target in seconds of requests that have none", "code", low=0.0),
    Option("tpot", 0.05, "TPOT target in seconds of requests that have none", "code", low=0.0),
)


class Reservations:
    """Decode slots held for requests that are still being prefilled, which the controller's books do not know yet."""

    def __init__(self) -> None:
        self.requests: dict[int, tuple[int, int]] = {}
        self.count: Any = np.zeros(0)
        self.tokens: Any = np.zeros(0)

    def cover(self, size: int) -> None:
        """Make ``count`` and ``tokens`` (float64[instances]) cover ``size`` instances."""
        more = size - len(self.count)
        if more > 0:
            self.count = np.concatenate((self.count, np.zeros(more)))
            self.tokens = np.concatenate((self.tokens, np.zeros(more)))

    def hold(self, request: int, instance: int, tokens: int) -> None:
        """Hold a slot on an instance that is covered."""
        self.requests[request] = (instance, tokens)
        self.count[instance] += 1
        self.tokens[instance] += tokens

    def release(self, request: int) -> None:
        """Give up a request's slot, if it has one."""
        held = self.requests.pop(request, None)
        if held is not None:
            self.count[held[0]] -= 1
            self.tokens[held[0]] -= held[1]


class XllmPrefill(PrefillPlacement):
    """Choose both instances on arrival. Writes ``request.planned_decode``: the one write a placement is allowed."""

    estimates = True
    observes = True

    def __init__(self, step: BatchFit, held: Reservations, ttft_s: float = 1.0, tpot_s: float = 0.05) -> None:
        self.step = step
        self.held = held
        self.ttft_s = ttft_s
        self.tpot_s = tpot_s
        self.flip = -1
        """Prefill instance that the latest choice asks to flip; -1 if none."""

    def observe(self, event: Event, view: ClusterView, now_s: float) -> None:
        """A request that ends before its decode gives its slot back."""
        if isinstance(event, (Aborted, Finished)):
            self.held.release(event.request)

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`PrefillPlacement`; without ``fits`` if the chosen instance should flip afterwards."""
        self.flip = -1
        self.held.release(request.request)
        prefills, decodes = view.prefills, view.decodes
        tokens = request.context_tokens()
        holds = view.capacity_tokens[prefills] >= tokens
        if not holds.any():
            return Choice(int(prefills[0]) if len(prefills) > 0 else -1, False)
        prefills = prefills[holds]
        queued = view.prefill_estimate_s[prefills]
        first = int(queued.argmin())
        route, wait = int(prefills[first]), float(queued[first])
        if len(decodes) == 0:
            request.planned_decode = -1
            return Choice(route)

        ttft_s = request.slo.ttft_s if request.slo.ttft_s < float("inf") else self.ttft_s
        tpot_s = request.slo.tpot_s if request.slo.tpot_s < float("inf") else self.tpot_s
        self.held.cover(view.size)
        count = view.decode_requests(decodes) + self.held.count[decodes]
        load = view.resident_tokens(now_s, decodes) + self.held.tokens[decodes]
        step_s = self.step.seconds(count + 1.0, load + tokens) * view.slow[decodes]
        fits = (step_s <= tpot_s) & (load + tokens <= view.capacity_tokens[decodes])
        least = int(step_s.argmin())
        target = int(fits.argmax()) if fits.any() else -1
        chosen = target if target >= 0 else least
        request.planned_decode = int(decodes[chosen])
        self.held.hold(request.request, request.planned_decode, tokens)

        n_prefills, n_decodes = len(view.prefills), len(decodes)
        lender = int(decodes[least])
        if (
            wait > ttft_s
            and target != least
            and step_s[least] < tpot_s * (n_decodes - 1) / n_decodes
            and view.prefill_estimate_s[lender] < wait
            and view.capacity_tokens[lender] >= tokens
        ):
            return Choice(lender)
        mean_wait = float(queued.mean())
        if target < 0 and (mean_wait < ttft_s * (n_prefills - 1) / n_prefills or n_decodes < n_prefills):
            self.flip = route
        return Choice(route, self.flip < 0)


class XllmDecode(DecodePlacement):
    """Decode where the arrival planned it; elsewhere only if that instance is gone."""

    def __init__(self, step: BatchFit, held: Reservations) -> None:
        self.step = step
        self.held = held

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`DecodePlacement`. The slot passes from the reservation to the controller's own books."""
        self.held.release(request.request)
        planned = request.planned_decode
        if planned >= 0 and view.up[planned] and not view.held[planned]:
            return Choice(planned)
        rows = view.decodes
        step_s = self.step.seconds(view.decode_requests(rows) + 1.0, view.resident_tokens(now_s, rows))
        return least_with_room(view, rows, step_s, request.context_tokens())


class XllmRoles(Roles):
    """Flip the chosen prefill instance when decode is short; flip a decode instance that has run empty."""

    observes = True

    def __init__(self, prefill: XllmPrefill, held: Reservations) -> None:
        self.prefill = prefill
        self.held = held

    def relieve(self, phase: Role, request: RequestRecord, view: ClusterView, now_s: float) -> RoleChange | None:
        """The prefill just placed stays on the instance that flips."""
        i = self.prefill.flip
        if phase != Role.PREFILL or i < 0 or len(view.prefills) < 2:
            return None
        self.prefill.flip = -1
        return RoleChange(i, Role.DECODE, "no decode instance meets TPOT")

    def after(self, event: Event, view: ClusterView, now_s: float) -> list[RoleChange]:
        """A decode instance whose last request has just left becomes a prefill instance, if another decode stays."""
        if isinstance(event, Finished):
            i = event.instance
        elif isinstance(event, MigrationDone):
            i = event.source
        else:
            return []
        if not view.up[i] or view.role[i] != 1 or len(view.decodes) < 2:
            return []
        self.held.cover(view.size)
        if view.running[i] + view.pending_requests[i] + view.waiting[i] + self.held.count[i] > 0:
            return []
        return [RoleChange(i, Role.PREFILL, "decode instance is empty")]


def xllm(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``xllm``."""
    step, held = BatchFit(beliefs), Reservations()
    prefill = XllmPrefill(step, held, number(options, "ttft"), number(options, "tpot"))
    return Policy("xllm", prefill, XllmDecode(step, held), roles=XllmRoles(prefill, held))
