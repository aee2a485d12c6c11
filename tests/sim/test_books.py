"""The controller's books on random worlds with faults: nothing promised stays, no claim on KV is used twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings

from penstock.control.controller import Controller
from penstock.core.actions import Action, Decode
from penstock.core.eventlog import encode_actions
from penstock.core.events import Event, InstanceDown, PrefillDone
from penstock.perf.step import LinearStepModel
from penstock.policy.parts import Beliefs
from tests.sim.support import Case, cases

PROMISES = ("prefill_requests", "prefill_tokens", "prefill_estimate_s", "pending_requests", "pending_tokens", "moving")
COMMON = settings(
    max_examples=150,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


class Auditor:
    """A log that checks every claim on pinned KV: issued by ``PrefillDone``, good for one ``Decode``, dead with its
    owner.
    """

    def __init__(self) -> None:
        self.claims: dict[int, int] = {}  # request -> who pins its KV
        self.lines: list[tuple[float, Event, bytes]] = []

    def write(self, now: float, event: Event, actions: Sequence[Action]) -> None:
        if isinstance(event, PrefillDone):
            self.claims[event.request] = event.instance
        elif isinstance(event, InstanceDown):
            self.claims = {request: owner for request, owner in self.claims.items() if owner != event.instance}
        for action in actions:
            if isinstance(action, Decode):
                assert action.request in self.claims, f"{action} at {now} s without a claim on pinned KV"
                del self.claims[action.request]
        self.lines.append((now, event, encode_actions(actions)))


def assert_settled(controller: Controller) -> None:
    assert not controller.requests
    for name in PROMISES:
        np.testing.assert_allclose(getattr(controller.view, name), 0.0, atol=1e-9, err_msg=name)


def audited(case: Case) -> tuple[Controller, Auditor]:
    auditor = Auditor()
    world = case.world(stepping=False, log=auditor)
    world.run(1e9)
    assert not world.flights
    return world.controller, auditor


@given(cases(faults=True, hashes=True))
@settings(COMMON)
def test_when_all_is_done_nothing_is_promised(case: Case) -> None:
    controller, _ = audited(case)
    assert_settled(controller)


@given(cases(faults=True))
@settings(COMMON)
def test_a_log_with_faults_replays_to_the_same_actions(case: Case) -> None:
    """Forced moves are left out: they are orders from outside, which are no events."""
    case = replace(case, scenario=replace(case.scenario, forced_moves=()))
    _, auditor = audited(case)
    beliefs = Beliefs(LinearStepModel(1.0), 1.0, 1e9)  # the policies of these cases ask for no estimate
    again = Controller(case.policy(), beliefs, case.cluster.migration_level, case.cluster.lease_s)
    for now, event, answer in auditor.lines:
        assert encode_actions(again.handle(event, now)) == answer
    assert_settled(again)
