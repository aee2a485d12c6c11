"""What failures leave behind: small worlds in which a fault falls into a narrow gap."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from penstock.core.actions import Action
from penstock.core.events import Event, InstanceDown, Preempted
from penstock.core.types import MigrationLevel, Role, Slo
from penstock.perf.step import LinearStepModel
from penstock.policy.parts import Beliefs, Policy
from penstock.sim.cluster import ClusterSpec, Fault, FaultKind, ForcedMove, InstanceSpec, Scenario
from penstock.sim.network import DECODE, Network
from penstock.sim.run import build_world
from penstock.sim.world import World
from penstock.workload.trace import Trace
from tests.sim.support import Turns, check, trace_of

P, D = Role.PREFILL, Role.DECODE


class Log:
    """Keeps the events."""

    def __init__(self) -> None:
        self.events: list[tuple[float, Event]] = []

    def write(self, now: float, event: Event, actions: Sequence[Action]) -> None:
        self.events.append((now, event))


def run(
    trace: Trace,
    roles: Sequence[Role],
    scenario: Scenario,
    step: LinearStepModel,
    blocks: int = 1000,
    link: float = 1e9,
    level: MigrationLevel = MigrationLevel.PRECOPY,
) -> tuple[World, Log]:
    specs = tuple(InstanceSpec(role, step, blocks, 4, 16, 64, link) for role in roles)
    cluster = ClusterSpec(specs, kv_bytes_per_token=1000.0, link_latency_s=0.0, migration_level=level)
    log = Log()
    policy = Policy("test", Turns(P), Turns(D))
    world = build_world(trace, cluster, policy, Beliefs(step, 1000.0, link), Slo(), scenario, log=log)
    world.run(1e9)
    check(world)
    return world, log


def test_others_do_not_make_a_transfer_wait_for_its_latency_again() -> None:
    """100 B at 1 MB/s and 1 ms of latency: at 1.0 ms all bytes are out, and a new flow changes nothing."""
    network = Network([1e6] * 3, latency_s=1e-3, handshake_s=0.0)
    flow = network.start(0, DECODE, 0, 1, 100.0, 0.0)
    network.start(1, DECODE, 0, 2, 100.0, 1e-3)
    assert flow.done_s == pytest.approx(1.1e-3)
    assert network.soonest() is flow


def test_a_cancelled_transfer_counts_what_was_sent() -> None:
    network = Network([1e6] * 2, latency_s=1e-3, handshake_s=0.0)
    flow = network.start(0, DECODE, 0, 1, 1e6, 0.0)
    network.end(flow, 0.25)
    assert network.bytes_out[0] == network.bytes_in[1] == pytest.approx(0.25e6)


def test_a_preempted_request_dies_with_all_its_tokens() -> None:
    """The client has what was decoded before the preemption, so it is not sent again."""
    trace, step = trace_of([0.0, 0.0], [8, 8], [20, 20]), LinearStepModel(0.01, per_prefill_s=0.001)
    _, log = run(trace, [P, D], Scenario(), step, blocks=8)
    at = next(now for now, event in log.events if isinstance(event, Preempted))
    faults = [
        Fault(0.0, 2, FaultKind.DOWN),  # so that both go to instance 1
        Fault(at, 2, FaultKind.UP),
        Fault(at + 0.005, 1, FaultKind.DOWN),
    ]
    world, log = run(trace, [P, D, D], Scenario(faults=faults), step, blocks=8)
    down = next(event for _, event in log.events if isinstance(event, InstanceDown) and event.lost)
    assert (down.lost, down.generated) == ((0, 1), (9, 9))
    assert list(world.emitted) == [20, 20]


def test_a_restarted_instance_runs_at_full_speed() -> None:
    faults = [Fault(1.0, 1, FaultKind.SLOW, 4.0), Fault(2.0, 1, FaultKind.DOWN), Fault(3.0, 1, FaultKind.UP)]
    world, _ = run(trace_of([0.0], [4], [2]), [P, D], Scenario(faults=faults), LinearStepModel(0.01))
    assert world.engines[1].slow == 1.0 == world.controller.view.slow[1]


def test_a_slow_instance_stays_slow_if_it_is_brought_up_again() -> None:
    faults = [Fault(1.0, 1, FaultKind.SLOW, 4.0), Fault(2.0, 1, FaultKind.UP)]
    world, _ = run(trace_of([0.0], [4], [2]), [P, D], Scenario(faults=faults), LinearStepModel(0.01))
    assert world.engines[1].slow == 4.0 == world.controller.view.slow[1]


@pytest.mark.parametrize("level", list(MigrationLevel))
def test_a_second_move_in_the_step_in_which_the_first_failed(level: MigrationLevel) -> None:
    """Steps of 1 s: the source is asked to stop, the target dies, and another target is ordered, all in one step."""
    moves = [ForcedMove(4.85, 0, 1), ForcedMove(5.05, 0, 3)]
    scenario = Scenario(forced_moves=moves, faults=[Fault(5.00, 1, FaultKind.DOWN)])
    step = LinearStepModel(1.0, per_prefill_s=0.001)
    world, _ = run(trace_of([0.0], [40], [40]), [P, D, D, D], scenario, step, link=5e5, level=level)
    assert [(move[3], move[4]) for move in world.moves] == [(2, 3)]
    assert list(world.emitted) == [40]
