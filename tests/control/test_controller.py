"""The controller alone: an event in, actions out, and books that balance when instances come and go."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import penstock
from penstock.control.controller import Controller
from penstock.core.actions import Decode, Migrate, Prefill
from penstock.core.errors import IllegalTransition
from penstock.core.events import (
    DecodeStarted,
    Finished,
    InstanceDown,
    InstanceUp,
    Load,
    MigrationDone,
    MoveOrdered,
    PrefillDone,
    RequestArrived,
)
from penstock.core.types import Role, Slo
from penstock.perf.step import LinearStepModel
from penstock.policy.parts import Beliefs, Policy
from tests.sim.support import Turns
from tests.sim.test_books import assert_settled

IDLE = Load(0, 0, 0, 100, 0.0)
IMPURE = {"time", "datetime", "random", "secrets", "uuid", "os", "socket", "asyncio", "threading", "subprocess"}


def controller() -> Controller:
    """One prefill instance (0), two decode instances (1, 2), and a request that decodes on 2."""
    policy = Policy("test", Turns(Role.PREFILL), Turns(Role.DECODE))
    made = Controller(policy, Beliefs(LinearStepModel(0.01), 1.0, 1e9))
    for i, role in enumerate((Role.PREFILL, Role.DECODE, Role.DECODE)):
        made.handle(up(i, role), 0.0)
    assert made.handle(RequestArrived(7, 30, Slo()), 0.0) == [Prefill(7, 0)]
    assert made.handle(PrefillDone(7, 0, IDLE), 0.1) == [Decode(7, 2)]
    assert made.handle(DecodeStarted(7, 2, IDLE), 0.2) == []
    return made


def up(instance: int, role: Role) -> InstanceUp:
    return InstanceUp(instance, role, 100, 16, 8)


def test_a_source_that_dies_and_returns_owes_nothing_to_a_move_that_went_on() -> None:
    made = controller()
    assert isinstance(made.handle(MoveOrdered(7, 1), 0.9)[0], Migrate)
    assert made.view.moving.tolist() == [0, 1, 1]
    made.handle(InstanceDown(2), 1.0)
    made.handle(up(2, Role.DECODE), 1.1)
    made.handle(MigrationDone(7, 2, 1, IDLE, IDLE), 1.2)
    assert made.view.moving.tolist() == [0, 0, 0]
    made.handle(Finished(7, 1, 5, IDLE), 1.3)
    assert_settled(made)


def test_a_request_lost_while_it_moves_leaves_no_promise_on_the_target() -> None:
    made = controller()
    made.handle(MoveOrdered(7, 1), 0.9)
    assert made.handle(InstanceDown(2, (7,), (4,)), 1.0) == [Prefill(7, 0)]
    assert made.view.pending_tokens[1] == 0 and made.view.moving[1] == 0
    assert made.view.prefill_tokens[0] == 34  # the prompt and what the client has


def test_a_lost_pull_is_not_ordered_again_on_the_same_claim() -> None:
    """The dead instance may have pulled already, so that others hold those blocks by now."""
    made = controller()
    made.handle(RequestArrived(8, 30, Slo()), 1.0)
    assert made.handle(PrefillDone(8, 0, IDLE), 1.1) == [Decode(8, 1)]
    custody = made.requests[8].custody
    assert custody is not None and custody.refusal(1.1) == "already used"
    assert made.handle(InstanceDown(1, (8,), (1,)), 1.2) == [Prefill(8, 0)]


def test_an_event_that_does_not_fit_is_refused() -> None:
    made = controller()
    for event in (RequestArrived(7, 30, Slo()), DecodeStarted(7, 2, IDLE), DecodeStarted(9, 2, IDLE)):
        with pytest.raises(IllegalTransition):
            made.handle(event, 1.0)


@pytest.mark.parametrize("folder", ["control", "policy", "predict"])
def test_what_decides_has_no_clock_no_socket_and_no_randomness(folder: str) -> None:
    for path in (Path(penstock.__file__).parent / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]}
            else:
                assert not (isinstance(node, ast.Attribute) and node.attr == "random"), path
                continue
            assert not names & IMPURE, path
