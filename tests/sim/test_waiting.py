"""Requests that a placement tells to wait (``Choice.wait``) stay with the controller and are placed later."""

from __future__ import annotations

from hypothesis import given, settings

from tests.sim.support import Case, cases
from tests.sim.test_leaping_equals_stepping import COMMON, assert_complete, assert_equal


@given(cases(faults=True))
@settings(COMMON)
def test_requests_wait_and_none_is_forgotten(case: Case) -> None:
    case = case.equipped("patient")
    world, leap = case.run(stepping=False)
    _, step = case.run(stepping=True)
    assert_equal(leap, step)
    assert_complete(case, leap)
    assert world.controller.pending() == 0
