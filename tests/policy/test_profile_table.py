"""The profile table: monotone whatever is believed, close to a belief that is monotone, and its inverse."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.perf.step import StepModel
from penstock.policy.profile_table import ProfileTable
from tests.policy.cluster import BELIEFS


class Jagged(StepModel):
    """Measured badly: times that go up and down."""

    def step_s(self, decodes: int, context: int, chunk_new: list[int], chunk_past: list[int]) -> float:
        """See :class:`StepModel`."""
        tokens = decodes + sum(chunk_new)
        return 0.01 + 1e-5 * tokens + 1e-8 * context + 0.005 * ((tokens * 7919 + context // 1024) % 5)


SMOOTH = ProfileTable(BELIEFS)
ROUGH = ProfileTable(msgspec.structs.replace(BELIEFS, step=Jagged()))
TOKENS, KV = st.floats(1, 20_000), st.floats(0, 2e7)


@settings(max_examples=200, deadline=None)
@given(TOKENS, TOKENS, KV, KV, st.booleans())
def test_no_larger_batch_takes_less_time(t1: float, t2: float, n1: float, n2: float, rough: bool) -> None:
    table = ROUGH if rough else SMOOTH
    for grid in (table.decodes, table.prompts):
        low, high = grid.at([min(t1, t2), max(t1, t2)], [min(n1, n2), max(n1, n2)])
        assert low <= high + 1e-15


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2048), st.integers(0, 4_000_000))
def test_it_is_the_belief_where_that_is_monotone(decodes: int, kv: int) -> None:
    assert float(SMOOTH.iteration_s(decodes, kv)) == pytest.approx(BELIEFS.decode_step_s(decodes, kv), rel=1e-9)


@pytest.mark.parametrize(("decodes", "kv", "chunk"), [(0, 0, 700), (20, 20_000, 300), (200, 400_000, 64)])
def test_a_chunk_beside_decodes(decodes: int, kv: int, chunk: int) -> None:
    truth = BELIEFS.step.step_s(decodes, kv, [chunk], [0])
    assert SMOOTH.with_chunk_s(decodes, kv, chunk) == pytest.approx(truth, rel=0.01)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 600), KV, st.floats(0.001, 0.5), st.booleans())
def test_the_largest_chunk_within_a_budget(decodes: int, kv: float, budget_s: float, rough: bool) -> None:
    table = ROUGH if rough else SMOOTH
    most = table.most_chunk(decodes, kv, budget_s)
    if most > 0:
        assert table.with_chunk_s(decodes, kv, most) <= budget_s + 1e-12
    if decodes + most < table.prompts.tokens[-1]:
        assert table.with_chunk_s(decodes, kv, most + 1) > budget_s - 1e-12


def test_an_empty_batch_takes_no_time() -> None:
    assert np.array_equal(SMOOTH.iteration_s([0.0, 0.0], [0.0, 1e6]), [0.0, 0.0])


def test_attention_over_what_is_before_a_chunk() -> None:
    whole = BELIEFS.step.step_s(0, 0, [256], [20_000]) - BELIEFS.step.step_s(0, 0, [256], [0])
    assert SMOOTH.attention_s(256, 20_000) == pytest.approx(whole)
