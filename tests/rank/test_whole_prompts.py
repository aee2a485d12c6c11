"""Without chunked prefill a prompt waits for a step that has room for all of it."""

from __future__ import annotations

import pytest

from penstock.core.types import Role, Slo
from penstock.perf.step import LinearStepModel
from penstock.policy.parts import Beliefs
from penstock.policy.registry import build_policy
from penstock.sim.cluster import ClusterSpec, InstanceSpec, Scenario
from penstock.sim.run import simulate
from tests.sim.support import trace_of


def first_tokens(chunked: bool, stepping: bool, prompts: list[int], budget: int) -> list[float]:
    """Times of the first tokens of prompts that arrive together, with steps of 1 s + 1 ms a token."""
    model = LinearStepModel(1.0, per_prefill_s=1e-3)
    spec = InstanceSpec(
        Role.MIXED, model, 10_000, max_num_seqs=4, max_num_batched_tokens=budget, chunked_prefill=chunked
    )
    beliefs = Beliefs(model, 1.0, 1e9)
    trace = trace_of([0.0] * len(prompts), prompts, [1] * len(prompts), None)
    policy = build_policy("mixed", beliefs, Slo())
    result = simulate(trace, ClusterSpec((spec,), 1.0), policy, beliefs, Slo(), Scenario(stepping=stepping))
    return [float(t) for t in result.requests.first_token_s]


@pytest.mark.parametrize("stepping", [False, True])
def test_a_prompt_waits_or_is_cut(stepping: bool) -> None:
    whole = first_tokens(False, stepping, [10, 60, 60], 100)
    cut = first_tokens(True, stepping, [10, 60, 60], 100)
    assert whole == pytest.approx([1.07, 1.07, 2.13])
    assert cut == pytest.approx([1.10, 1.10, 2.13])  # the first two share their step with 30 tokens of the third


@pytest.mark.parametrize("stepping", [False, True])
def test_one_longer_than_a_step_is_cut_all_the_same(stepping: bool) -> None:
    found = first_tokens(False, stepping, [250], 100)
    assert found == pytest.approx([3.25])
