"""DuetServe: the optimiser's vectors, its properties, and what it does in a simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.experiment.build import run
from penstock.experiment.setup import ClusterSetup, Setup, Target, WorkloadSetup
from penstock.perf.hardware import hardware_spec
from penstock.perf.models import model_spec
from penstock.perf.roofline import RooflineStepModel
from penstock.perf.sm_share import SharedGpu, SmCurve, shared_gpu
from penstock.perf.step import StepModel
from penstock.policy.splits import Division, Work, best_division, divisions, fixed_division
from penstock.report.quantiles import GapStatistics
from penstock.sim.result import Outcome


def published() -> SharedGpu:
    """Qwen3-8B on H100 as in the vectors: the whole rectangle of attention, MFU 0.62, MBU 0.9."""
    whole = RooflineStepModel(
        model_spec("qwen3-8b"),
        hardware_spec("h100"),
        mfu=0.62,
        mbu=0.9,
        attention_mfu=0.62,
        attention_mbu=0.9,
        causal=False,
        elementwise=False,
    )
    return shared_gpu(whole)


GPU = published()
VECTOR = Work(64, 64 * 2049, [8128], [0])


@pytest.mark.parametrize(
    ("target_s", "sms", "steps", "decode_ms", "prefill_ms", "digits"),
    [(0.1, 6, 3, 77, 260, 0), (0.05, 10, 5, 46, 269, 0), (0.02, 24, 15, 19.3, 303, 1)],
)
def test_vectors(target_s: float, sms: int, steps: int, decode_ms: float, prefill_ms: float, digits: int) -> None:
    found = best_division(GPU, VECTOR, target_s)
    assert found is not None
    assert (found.decode_sms, found.prefill_sms, found.steps) == (sms, 132 - sms, steps)
    assert round(found.decode_s * 1e3, digits) == decode_ms
    assert round(found.prefill_s * 1e3) == prefill_ms


def test_nothing_is_feasible_below_the_fastest_step() -> None:
    assert best_division(GPU, VECTOR, 0.0115) is None
    assert best_division(GPU, VECTOR, 0.0117) is not None


works = st.builds(
    lambda decodes, mean, new, past: Work(decodes, decodes * mean, new, [past] + [0] * (len(new) - 1)),
    st.integers(1, 256),
    st.integers(1, 8000),
    st.lists(st.integers(1, 4096), min_size=1, max_size=4),
    st.integers(0, 20_000),
)


def everything(work: Work, target_s: float, count_join: bool) -> list[Division]:
    """All divisions that meet the target, unpruned."""
    found = [d for sms in GPU.curve.parts() for d in divisions(GPU, work, sms, 1 << 30)]
    return [d for d in found if (d.longest_gap_s() if count_join else d.decode_s) <= target_s]


@settings(max_examples=60, deadline=None)
@given(works, st.floats(0.005, 0.4), st.booleans())
def test_the_choice_is_the_best_of_all(work: Work, target_s: float, count_join: bool) -> None:
    found = best_division(GPU, work, target_s, count_join=count_join)
    allowed = everything(work, target_s, count_join)
    if found is None:
        assert not allowed
        return
    assert found.decode_s <= target_s
    assert found.tokens_per_s(work) == pytest.approx(max(d.tokens_per_s(work) for d in allowed), rel=1e-12)
    if count_join:
        assert found.longest_gap_s() <= target_s


@settings(max_examples=30, deadline=None)
@given(works, st.lists(st.floats(0.006, 0.4), min_size=2, max_size=2, unique=True))
def test_a_looser_target_never_costs_throughput_and_never_raises_the_smallest_share(
    work: Work, targets: list[float]
) -> None:
    tight, loose = (best_division(GPU, work, t) for t in sorted(targets))
    if tight is None:
        return
    assert loose is not None
    assert loose.tokens_per_s(work) >= tight.tokens_per_s(work)


def test_the_share_for_decode_falls_with_the_target_and_is_close_to_the_smallest() -> None:
    shares = []
    for target_s in (0.015, 0.02, 0.03, 0.05, 0.08, 0.1, 0.15):
        found = best_division(GPU, VECTOR, target_s)
        assert found is not None
        smallest = min(d.decode_sms for d in everything(VECTOR, target_s, False))
        assert smallest <= found.decode_sms <= smallest + 4
        shares.append(found.decode_sms)
    assert shares == sorted(shares, reverse=True)


def test_bounded_steps() -> None:
    found = best_division(GPU, VECTOR, 0.02, max_steps=8)
    assert found is None
    assert fixed_division(GPU, VECTOR, 24, 8).steps == 8
    assert fixed_division(GPU, VECTOR, 24, 64).steps == 16


def test_counting_the_join_leaves_no_long_gap() -> None:
    """The vectors' own choices break their target at the join: 3 x 77 ms end 29 ms before the prefill."""
    free = best_division(GPU, VECTOR, 0.1)
    strict = best_division(GPU, VECTOR, 0.1, count_join=True)
    assert free is not None and strict is not None
    assert free.longest_gap_s() > 0.1 >= strict.longest_gap_s()
    assert strict.tokens_per_s(VECTOR) < free.tokens_per_s(VECTOR)


def test_a_whole_chip_is_the_model_itself() -> None:
    class Other(StepModel):
        """No parts."""

    other = Other()
    assert SharedGpu(other, SmCurve(132)).on(132) is other


def figures(policy: str, budget: int, options: dict[str, float | str] | None = None) -> tuple[float, float]:
    """P99 of the gaps between tokens and P90 of TTFT, seconds: 500 conversations, 26 a second, on one H100."""
    setup = Setup(
        policy=policy,
        options=options or {},
        workload=WorkloadSetup(synthetic="azure-conv", requests=500, rate_rps=26.0),
        cluster=ClusterSetup(
            model="qwen3-8b", hardware="h100", prefill=0, decode=0, mixed=1, max_num_batched_tokens=budget
        ),
        slo=Target(ttft_s=2.0, tpot_s=0.05),
    )
    result = run(setup, sample=False)
    assert (result.requests.outcome == Outcome.FINISHED).all()
    p99_s = GapStatistics(result.gaps).quantile(0.99)
    assert p99_s is not None
    return p99_s, float(np.quantile(result.requests.first_token_s - result.trace.arrival_s, 0.9))


def test_dividing_keeps_the_target_and_prefills_sooner_than_small_chunks() -> None:
    ours_s, ours_ttft_s = figures("duet", 8192)
    whole_s, _ = figures("mixed", 8192)
    small_s, small_ttft_s = figures("mixed", 1280)
    assert ours_s <= 0.05 < whole_s
    assert small_s <= 0.05  # what a tuned budget of mixed batches reaches
    assert ours_ttft_s < small_ttft_s


def test_a_target_out_of_reach_stops_the_prompts_but_loses_nothing() -> None:
    p99_s, _ = figures("duet", 8192, {"target": 0.009})
    assert p99_s < figures("duet", 8192, {"target": 0.05})[0]
