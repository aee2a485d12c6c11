"""``auto`` in a rough world: clients leave, instances die, requests move, and its books stay true."""

from __future__ import annotations

from math import inf
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.control.controller import Controller
from penstock.core.actions import Action, Migrate, Serve
from penstock.core.events import (
    Aborted,
    Event,
    Finished,
    InstanceDown,
    InstanceHeld,
    Interrupted,
    MigrationDone,
    MigrationFailed,
    MoveOrdered,
    PolicyChosen,
    PrefillDone,
    RequestArrived,
    Tick,
)
from penstock.core.types import Role, Slo
from penstock.perf.step import LinearStepModel
from penstock.policy.backlog import Backlog
from penstock.policy.doors import Doors, Lag
from penstock.policy.margin import Margin
from penstock.policy.outlook import Outlook
from penstock.policy.parts import Beliefs, Policy
from penstock.policy.registry import build_policy
from penstock.policy.tenants import Tenants
from penstock.policy.view import RequestRecord, Stage
from tests.policy.cluster import load, up

BELIEFS = Beliefs(LinearStepModel(0.005, 1e-4, 1e-8, 2e-5, 1e-10), 1e5, 1e10, max_batched_tokens=8192)
SLO = Slo(1.0, 0.05)
CLASSES = (SLO, Slo(0.2, 0.02), Slo(inf, inf), Slo(0.5, 0.001), Slo(inf, 0.03))
T = TypeVar("T")


def policy(name: str, options: dict[str, str]) -> Policy:
    return build_policy(name, BELIEFS, SLO, **options)


class Rough:
    """A controller under ``auto`` and, for truth, who was sent where."""

    def __init__(self, instances: int, **options: str) -> None:
        self.controller = Controller(policy("auto", options), BELIEFS, build_policy=policy)
        self.now = 0.0
        self.up = set(range(instances))
        self.next = 0
        for i in range(instances):
            self.tell(up(i, Role.MIXED))

    def tell(self, event: Event) -> list[Action]:
        self.now += 0.003
        return self.controller.handle(event, self.now)

    def stage(self, stage: Stage) -> list[RequestRecord]:
        return [record for record in self.controller.requests.values() if record.stage == stage]

    def arrive(self, tokens: int, slo: Slo = SLO) -> list[Action]:
        self.next += 1
        return self.tell(RequestArrived(self.next, tokens, slo))

    def first_token(self, record: RequestRecord) -> list[Action]:
        return self.tell(PrefillDone(record.request, record.prefill_instance, load()))

    def finish(self, record: RequestRecord) -> list[Action]:
        return self.tell(Finished(record.request, record.decode_instance, record.generated + 5, load()))

    def fail(self, instance: int) -> list[Action]:
        self.up.discard(instance)
        lost = [
            record
            for record in self.controller.requests.values()
            if (record.stage == Stage.PREFILLING and record.prefill_instance == instance)
            or (record.stage in (Stage.DECODING, Stage.MIGRATING) and record.decode_instance == instance)
        ]
        ids, generated = tuple(r.request for r in lost), tuple(r.generated for r in lost)
        return self.tell(InstanceDown(instance, ids, generated))

    def recover(self, instance: int) -> list[Action]:
        self.up.add(instance)
        return self.tell(up(instance, Role.MIXED))

    def tick(self, seconds: float = 0.0) -> list[Action]:
        self.now += seconds
        live = sorted(self.up)
        running = self.stage(Stage.DECODING)
        return self.tell(
            Tick(
                tuple(live),
                tuple(load() for _ in live),
                tuple(r.request for r in running),
                tuple(r.generated for r in running),
                tuple(-1.0 for _ in running),
            )
        )

    def part(self, kind: type[T]) -> T:
        found = next(p for p in (*self.controller.policy.observers, self.controller.policy.room) if isinstance(p, kind))
        assert isinstance(found, kind)
        return found

    def empty(self) -> bool:
        """Is nothing left in any book?"""
        doors, backlog, margin = self.part(Doors), self.part(Backlog), self.part(Margin)
        queues = [queue for queue in backlog._queues.values() if queue]
        tenants = [count for count in self.part(Tenants)._count.values() if count]
        left = [self.part(Lag)._sent, self.part(Outlook).sent, margin._target, margin._begun, backlog._home]
        return not (any(left) or queues or tenants or doors.waiting or doors.late or self.controller.pending())


@settings(max_examples=60)
@given(st.randoms(use_true_random=False), st.booleans())
def test_nothing_is_left_of_who_has_gone(random: object, sort: bool) -> None:
    choose = random.choice  # type: ignore[attr-defined]
    world = Rough(3, sort="1" if sort else "0")
    for _ in range(150):
        what = choose(("arrive",) * 6 + ("first",) * 3 + ("finish",) * 2 + ("abort", "break", "fail", "move", "tick"))
        prefilling, decoding = world.stage(Stage.PREFILLING), world.stage(Stage.DECODING)
        if what == "arrive":
            world.arrive(choose((10, 500, 3000, 90_000, 200_000)), choose(CLASSES))
        elif what == "first" and prefilling:
            world.first_token(choose(prefilling))
        elif what == "finish" and decoding:
            world.finish(choose(decoding))
        elif what == "abort" and world.controller.requests:
            world.tell(Aborted(choose(sorted(world.controller.requests))))
        elif what == "break" and prefilling + decoding:
            record = choose(prefilling + decoding)
            where = record.prefill_instance if record in prefilling else record.decode_instance
            world.tell(Interrupted(record.request, where, record.generated, "test"))
        elif what == "fail":
            instance = choose((0, 1, 2))
            if instance in world.up:
                world.fail(instance)
            else:
                world.recover(instance)
        elif what == "move" and decoding:
            for action in world.tell(MoveOrdered(choose(decoding).request, -1, "test")):
                if isinstance(action, Migrate):
                    if choose((True, False)):
                        world.tell(MigrationDone(action.request, action.source, action.target, load(), load()))
                    else:
                        world.tell(MigrationFailed(action.request, action.source, action.target, "test"))
        else:
            world.tick(choose((0.0, 0.5, 5.0)))
    for instance in sorted({0, 1, 2} - world.up):
        world.recover(instance)
    for _ in range(3000):  # all that is left is served, or refused
        if not world.controller.requests:
            break
        for record in world.stage(Stage.PREFILLING)[:1]:
            world.first_token(record)
        for record in world.stage(Stage.DECODING):
            world.finish(record)
        for record in world.stage(Stage.MIGRATING):
            world.tell(MigrationFailed(record.request, record.decode_instance, record.migrating_to, "test"))
        world.tick(0.1)
    assert not world.controller.requests
    assert world.empty()


def test_who_leaves_between_two_plans_is_not_placed() -> None:
    world = Rough(1)
    world.arrive(90_000)
    for _ in range(6):
        world.arrive(3000, Slo(50.0, 0.05))
    waiting = sorted(record.request for record in world.stage(Stage.ARRIVED))
    world.tell(Aborted(waiting[2]))
    placed = [a.request for a in world.first_token(world.stage(Stage.PREFILLING)[0]) if isinstance(a, Serve)]
    assert placed and waiting[2] not in placed


def test_it_survives_having_no_instance() -> None:
    world = Rough(1)
    for _ in range(6):
        world.arrive(90_000)
    world.fail(0)
    assert len(world.stage(Stage.ARRIVED)) > 0
    world.tick(40.0)  # TTFT and patience are over
    assert not world.stage(Stage.ARRIVED)
    world.recover(0)
    assert any(isinstance(action, Serve) for action in world.arrive(500))


def test_another_auto_takes_over_who_waits_and_who_runs() -> None:
    world = Rough(1)
    for _ in range(6):
        world.arrive(60_000, Slo(1000.0, 0.05))
    waiting = len(world.stage(Stage.ARRIVED))
    assert waiting > 0
    world.tell(PolicyChosen("auto", {"tiers": "1"}))
    assert len(world.part(Doors).waiting) == waiting
    assert world.part(Tenants).tightest_s(0) == 0.05
    for _ in range(50):
        for record in world.stage(Stage.PREFILLING) + world.stage(Stage.DECODING):
            if record.stage == Stage.PREFILLING:
                world.first_token(record)
            else:
                world.finish(record)
        world.tick(0.1)
    assert not world.controller.requests and world.empty()


def test_asking_for_a_target_books_nothing() -> None:
    world = Rough(2)
    for _ in range(8):
        world.arrive(200)
        for record in world.stage(Stage.PREFILLING):
            world.first_token(record)
    lag = world.part(Lag).safe_s()
    world.tell(InstanceHeld(0, True))
    moved = [record for record in world.stage(Stage.DECODING) if record.decode_instance == 0]
    for record in moved:
        for action in world.tell(MoveOrdered(record.request, -1, "drain")):
            assert isinstance(action, Migrate)
            assert world.part(Tenants).tightest_s(0) == 0.05  # not before it has moved
            world.tell(MigrationDone(action.request, 0, action.target, load(), load()))
    assert moved and world.part(Tenants).tightest_s(0) == inf
    world.now += 20.0
    for record in moved:
        world.finish(record)
    assert world.part(Lag).safe_s() == pytest.approx(lag)


def test_a_target_that_no_step_meets_does_not_hold_up_the_others() -> None:
    world = Rough(1)
    world.arrive(500)
    world.first_token(world.stage(Stage.PREFILLING)[0])
    assert any(isinstance(action, Serve) for action in world.arrive(500, Slo(inf, 0.004)))
    assert world.part(Tenants).tightest_s(0) == 0.05
