"""The engine whose batches a policy composes, on random small worlds."""

from __future__ import annotations

from hypothesis import given, settings

from tests.sim.support import Case, cases
from tests.sim.test_leaping_equals_stepping import COMMON, assert_complete, assert_equal


@given(cases(faults=True))
@settings(COMMON)
def test_with_everybody_chosen_it_is_the_leaping_engine(case: Case) -> None:
    _, plain = case.run(stepping=False)
    _, composed = case.equipped("everybody").run(stepping=False)
    assert_equal(composed, plain)
    assert_complete(case, composed)


@given(cases(faults=True, hashes=True))
@settings(COMMON)
def test_whoever_sits_out_nothing_is_lost(case: Case) -> None:
    """``Case.run`` checks blocks and books at every sample and at the end."""
    case = case.equipped("some order" if case.scenario.seed % 2 else "some")
    world, result = case.run(stepping=False)
    assert_complete(case, result)
    assert world.controller.pending() == 0
