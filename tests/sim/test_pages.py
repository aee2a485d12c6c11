"""The page pool: no page twice, none lost, KV never starves, state survives."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.core.errors import PenstockError
from penstock.sim.pages import PagePool


class PoolMachine(RuleBasedStateMachine):
    """KV requests of many owners against a job that borrows whatever it can get."""

    pool: PagePool

    @initialize(pages=st.integers(4, 60), state=st.integers(0, 3))
    def start(self, pages: int, state: int) -> None:
        self.pool = PagePool(pages)
        self.owners: dict[int, list[int]] = {}
        self.next_owner = 0
        self.pending = 0  # pages that KV waits for
        assert self.pool.reserve_state(state)
        self.state = list(self.pool.state)

    @precondition(lambda self: self.pending == 0)
    @rule(pages=st.integers(1, 30))
    def kv_asks(self, pages: int) -> None:
        borrowed, spare = list(self.pool.lent), len(self.pool.free)
        got = self.pool.take(pages)
        if got is None:
            assert pages > spare
            if pages <= spare + len(borrowed):
                self.pending = pages
        else:
            assert pages <= spare and len(got) == pages
            self._hold(got)

    @precondition(lambda self: self.pending > 0)
    @rule()
    def one_boundary_later_kv_has_its_pages(self) -> None:
        assert self.pool.boundary()
        got = self.pool.take(self.pending)
        assert got is not None and len(got) == self.pending
        self._hold(got)
        self.pending = 0

    @precondition(lambda self: self.pending > 0)
    @rule(pages=st.integers(1, 30))
    def nothing_is_lent_while_kv_waits(self, pages: int) -> None:
        assert not self.pool.lend(pages)

    @precondition(lambda self: self.pending > 0)
    @rule()
    def kv_gives_up(self) -> None:
        self.pool.withdraw()
        self.pending = 0

    @precondition(lambda self: self.pending == 0)
    @rule(pages=st.integers(1, 30))
    def tuning_borrows(self, pages: int) -> None:
        spare = len(self.pool.free)
        assert self.pool.lend(pages) == (pages <= spare)

    @precondition(lambda self: self.pending == 0)
    @rule()
    def a_boundary_without_demand_takes_nothing(self) -> None:
        lent = list(self.pool.lent)
        assert not self.pool.boundary()
        assert self.pool.lent == lent

    @rule()
    def a_micro_batch_ends(self) -> None:
        if self.pending == 0:
            self.pool.end_micro_batch()
            assert not self.pool.lent

    @precondition(lambda self: bool(self.owners))
    @rule(data=st.data())
    def kv_returns(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owners)))
        self.pool.give(self.owners.pop(owner))

    def _hold(self, pages: list[int]) -> None:
        self.owners[self.next_owner] = pages
        self.next_owner += 1

    @invariant()
    def every_page_is_somewhere_once(self) -> None:
        if not hasattr(self, "pool"):
            return
        held = [p for pages in self.owners.values() for p in pages]
        numbers = [*self.pool.free, *self.pool.state, *self.pool.lent, *held]
        assert sorted(numbers) == list(range(self.pool.pages))

    @invariant()
    def state_stays(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool.state == self.state


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_small_demand_met_meanwhile_leaves_the_large_one_standing() -> None:
    pool = PagePool(10)
    assert pool.lend(6)
    assert pool.take(8) is None
    assert pool.take(2) is not None
    assert not pool.lend(1), "eight pages are still wanted"
    assert pool.boundary()
    assert pool.take(8) is not None


def test_what_can_never_be_met_takes_nothing_from_fine_tuning() -> None:
    pool = PagePool(10)
    assert pool.reserve_state(4) and pool.lend(3)
    assert pool.take(7) is None
    assert not pool.boundary()
    assert len(pool.lent) == 3


def test_state_must_fit() -> None:
    pool = PagePool(3)
    assert not pool.reserve_state(4)
    assert pool.state == []
    with pytest.raises(PenstockError, match="0 pages"):
        PagePool(0)
