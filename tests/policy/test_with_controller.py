"""Every preset under the real controller: a request's whole life, random histories, and the table of legal changes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.control.controller import Controller
from penstock.control.lifecycle import NEXT, advance
from penstock.core.actions import Decode, Flip, Migrate, Prefill, Reject, Serve
from penstock.core.errors import IllegalTransition
from penstock.core.events import DecodeStarted, Finished, PrefillDone, RequestArrived, Tick
from penstock.core.types import Role
from penstock.policy.parts import Refusal
from penstock.policy.registry import PRESETS, build_policy
from penstock.policy.view import Stage
from tests.policy.cluster import BELIEFS, SLO, load, request, up
from tests.policy.world import World

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


def world(name: str, seed: int = 0) -> World:
    roles = [P, P, D, D, D] if PRESETS[name].disaggregated else [M, M, M, M]
    return World(build_policy(name, BELIEFS, SLO), roles, seed)


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_request_lives_and_leaves_nothing(name: str) -> None:
    there = world(name)
    there.arrive(400)
    assert isinstance(there.orders[0], Prefill if PRESETS[name].disaggregated else Serve)
    there.obey(there.orders.pop(0))
    assert [type(o) for o in there.orders] == ([Decode] if PRESETS[name].disaggregated else [])
    while there.orders:
        there.obey(there.orders.pop(0))
    there.now = 1.0
    there.tick()
    there.finish(0)
    there.drain()


@pytest.mark.parametrize("name", list(PRESETS))
def test_too_long_a_prompt_is_refused(name: str) -> None:
    there = world(name)
    there.prompt[0] = 50_000
    actions = there.tell(RequestArrived(0, 50_000, SLO))
    assert actions[-1] == Reject(0, Refusal.TOO_LONG.value)
    there.drain()


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if p.disaggregated])
def test_without_any_decode_instance_the_request_is_refused(name: str) -> None:
    controller = Controller(build_policy(name, BELIEFS, SLO), BELIEFS)
    controller.handle(up(0, P), 0.0)
    controller.handle(RequestArrived(0, 100, SLO), 0.0)
    assert controller.handle(PrefillDone(0, 0, load()), 0.1) == [Reject(0, Refusal.NO_INSTANCE.value)]


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(list(PRESETS)), st.integers(0, 10_000), st.booleans())
def test_random_histories_keep_the_books_and_repeat(name: str, seed: int, failures: bool) -> None:
    """Nothing goes to a dead instance, no flip empties a pool, nothing is left over, the same again the same way."""
    logs = []
    for _ in range(2):
        there = world(name, seed)
        for _ in range(150):
            there.step(failures)
        there.drain()
        logs.append(there.log)
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ares-none", Migrate), ("ares-oracle", Migrate), ("ares-history", Migrate), ("arrow", Flip), ("xllm", Flip)],
)
def test_the_histories_exercise_what_the_policy_is_for(name: str, kind: type) -> None:
    there = world(name, seed=1)
    for _ in range(600):
        there.step()
    there.drain()  # xLLM flips what runs empty
    assert any(f" {kind.__name__}(" in line for line in there.log)


def test_ares_moves_through_the_controller() -> None:
    controller = Controller(build_policy("ares", BELIEFS, SLO), BELIEFS)
    for i, role in enumerate([P, D, D]):
        controller.handle(up(i, role), 0.0)
    for r in range(4):
        controller.handle(RequestArrived(r, 1000, SLO), 0.0)
        controller.handle(PrefillDone(r, 0, load(), 4000.0), 0.1)
        target = controller.requests[r].decode_instance
        controller.handle(DecodeStarted(r, target, load(1001, 1)), 0.2)
    where = [controller.requests[r].decode_instance for r in range(4)]
    assert sorted(where) == [1, 1, 2, 2]
    staying = [r for r in range(4) if where[r] == 1]
    for r in range(4):
        if where[r] == 2:
            controller.handle(Finished(r, 2, 20, load(0)), 0.3)
    tick = Tick((1, 2), (load(2100, 2), load(0)), tuple(staying), (50, 50), (4000.0, 3000.0))
    actions = controller.handle(tick, 1.0)
    assert [type(a) for a in actions] == [Migrate]
    assert controller.view.moving[1] == controller.view.moving[2] == 1.0
    again = controller.handle(Tick((1, 2), (load(2100, 2), load(0)), tuple(staying), (60, 60), (4000.0, 3000.0)), 2.0)
    assert again == []


@pytest.mark.parametrize("before", list(Stage))
@pytest.mark.parametrize("after", list(Stage))
def test_the_table_of_changes_is_the_law(before: Stage, after: Stage) -> None:
    record = request()
    record.stage = before
    if after in NEXT[before]:
        advance(record, after)
        assert record.stage == after
    else:
        with pytest.raises(IllegalTransition, match=f"{before.name} cannot become {after.name}"):
            advance(record, after)
        assert record.stage == before


def test_events_out_of_order_are_illegal() -> None:
    controller = Controller(build_policy("static", BELIEFS, SLO), BELIEFS)
    for i, role in enumerate([P, D]):
        controller.handle(up(i, role), 0.0)
    controller.handle(RequestArrived(0, 100, SLO), 0.0)
    with pytest.raises(IllegalTransition):
        controller.handle(RequestArrived(0, 100, SLO), 0.0)
    with pytest.raises(IllegalTransition):
        controller.handle(Finished(9, 1, 5, load()), 0.0)
    controller.handle(PrefillDone(0, 0, load()), 0.1)
    with pytest.raises(IllegalTransition):
        controller.handle(PrefillDone(0, 0, load()), 0.2)
