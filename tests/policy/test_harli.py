"""Harli: the truth of a shared GPU, the predictor, the choice, and a simulation against its baselines."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from penstock.core.errors import PenstockError
from penstock.core.events import Aborted, Finished, PrefillDone
from penstock.core.types import Role, Slo
from penstock.experiment.build import run
from penstock.experiment.setup import ClusterSetup, Setup, Target, WorkloadSetup
from penstock.perf.hardware import hardware_spec
from penstock.perf.models import model_spec
from penstock.perf.roofline import RooflineStepModel
from penstock.perf.step import LinearStepModel
from penstock.perf.tuning import CoRun, Profiler, TuningJob, activation_bytes, adapter_params
from penstock.policy.corun import CoRunPredictor, SoloFit, profile
from penstock.policy.engine import Situation
from penstock.policy.harli import AdaptiveSplit, IdleOnly, Limits, MeasuredLimit, StaticSplit
from penstock.policy.registry import build_policy
from penstock.report.metrics import summarize
from penstock.report.schema import RunMetrics
from tests.policy.cluster import BELIEFS, cluster, load

MARGIN = 0.2
LLAMA = model_spec("llama-3.1-8b")


@cache
def truth() -> CoRun:
    return CoRun(RooflineStepModel(LLAMA, hardware_spec("a100-80g"), 1), 16, TuningJob(sequences=(1, 2)))


@cache
def predictor() -> CoRunPredictor:
    return CoRunPredictor(profile(Profiler(truth()), 256))


def situation(decodes: int, context: int, free: int = 20_000) -> Situation:
    found = Situation(0, Role.DECODE, 16, 20_000)
    found.decodes, found.context, found.free_blocks = decodes, context, free
    return found


# -- the truth ---------------------------------------------------------------------------------------------------------


def test_the_size_of_the_job() -> None:
    # Attention 2 (4096 + 4096) + 2 (4096 + 1024), MLP 3 (4096 + 14336); 16 of each, 32 layers.
    assert adapter_params(LLAMA, 16) == 16 * 32 * (26_624 + 55_296)
    assert activation_bytes(LLAMA, 2048) - activation_bytes(LLAMA, 1024) == pytest.approx(
        2 * 1024 * (32 * 4096 + 8 * 4096 + 4 * 14_336 + 2 * 48 * 128)
    )
    # Three passes over 7.5e9 weights by 1,024 tokens at 0.78 of 312e12 FLOP/s take 0.19 s; attention and norms add 7 %.
    assert truth().tuning_alone_s(108, 1) == pytest.approx(0.19, rel=0.12)
    assert truth().tuning_alone_s(0, 1) == float("inf")


def test_sharing_costs_both() -> None:
    found = truth()
    alone = found.whole.step_s(64, 64_000, [], [])
    steps = [found.decode_s(sms, 1, 64, 64_000) for sms in (8, 16, 32, 54, 86)]
    assert steps == sorted(steps, reverse=True) and steps[-1] > alone
    slower, tuning = found.factors(54, 1, 64, 64_000)
    assert slower > 1.01 and tuning > 1.01, "they want more bandwidth than there is"
    assert found.factors(54, 1, 0, 0) == (1.0, 1.0), "nothing decodes"
    assert found.tuning_s(54, 1, 64, 64_000) > found.tuning_alone_s(54, 1) > found.tuning_alone_s(108, 1)


def test_only_a_roofline_can_be_shared() -> None:
    with pytest.raises(PenstockError, match="cannot say what fine-tuning costs"):
        CoRun(LinearStepModel(0.01), 16)


# -- the predictor -----------------------------------------------------------------------------------------------------


def test_stage_one_is_exact_on_planes_and_picks_the_bin() -> None:
    # Two planes that meet at a batch of 8, so that the edge is on both.
    rows = [
        (b, b * c, 0.01 + (1e-4 * b if b <= 8 else 8e-4 + 1e-3 * (b - 8)) + 1e-7 * b * c)
        for b in (1, 4, 8, 12, 16)
        for c in (100, 1000)
    ]
    fit = SoloFit(np.array(rows, np.float64), [1, 8, 16])
    assert fit.seconds(4, 2000) == pytest.approx(0.01 + 4e-4 + 2e-4, rel=1e-9)
    assert fit.seconds(14, 2000) == pytest.approx(0.01 + 8e-4 + 6e-3 + 2e-4, rel=1e-9)
    with pytest.raises(PenstockError, match="no samples of batches"):
        SoloFit(np.array(rows, np.float64)[:2], [1, 8])


def test_held_out_error_and_optimism() -> None:
    rng = np.random.default_rng(11)
    found = predictor()
    errors: list[float] = []
    while len(errors) < 1500:
        batch = int(rng.integers(1, 257))
        context = batch * int(np.exp(rng.uniform(np.log(128), np.log(12_000))))
        if context > 400_000:
            continue
        i = int(rng.integers(len(found.pairs)))
        pair = found.pairs[i]
        measured = truth().decode_s(pair.sms, pair.sequences, batch, context) * np.exp(rng.normal(0.0, 0.02))
        errors.append(found.seconds(batch, context)[i] / measured - 1.0)
    assert np.abs(errors).mean() < 0.05
    assert -np.quantile(errors, 0.01) < MARGIN / 2


def test_pairs_come_fastest_first() -> None:
    rates = [pair.tokens_per_s for pair in predictor().pairs]
    assert rates == sorted(rates, reverse=True)
    assert len(rates) == 2 * len(truth().gpu.curve.parts())


# -- the choice --------------------------------------------------------------------------------------------------------


def split(limit_s: float, reserve: float = 0.0) -> AdaptiveSplit:
    pages = {k: truth().pages(k) for k in (1, 2)}
    return AdaptiveSplit(predictor(), Limits(pages, reserve), MeasuredLimit(limit_s, 0.0, 0.0), 32)


@pytest.mark.parametrize(("batch", "context"), [(1, 1000), (40, 40_000), (200, 250_000)])
def test_the_choice_is_the_best_feasible_one(batch: int, context: int) -> None:
    part = split(0.045)
    chosen = part.share(situation(batch, context))
    assert chosen.sequences > 0 and chosen.steps == 32
    seconds = predictor().seconds(batch, context + 32 * batch)
    feasible = [p for p, s in zip(predictor().pairs, seconds, strict=True) if s <= 0.045]
    best = feasible[0].tokens_per_s
    taken = next(p for p in predictor().pairs if (p.sms, p.sequences) == (chosen.decode_sms, chosen.sequences))
    assert best * 0.93 <= taken.tokens_per_s <= best
    assert truth().decode_s(chosen.decode_sms, chosen.sequences, batch, context + 32 * batch) <= 0.045 * 1.1


def test_more_decodes_leave_less_and_too_many_leave_nothing() -> None:
    part = split(0.030)
    shares = [part.share(situation(b, 1500 * b)) for b in (8, 32, 96)]
    assert [s.decode_sms for s in shares] == sorted(s.decode_sms for s in shares)
    assert shares[0].decode_sms < shares[2].decode_sms
    assert part.share(situation(256, 400_000)).sequences == 0


def test_memory_bounds_the_micro_batch() -> None:
    one, two = truth().pages(1), truth().pages(2)
    part = split(0.045, reserve=0.1)
    assert part.share(situation(0, 0, 2000 + two)).sequences == 2
    assert part.share(situation(0, 0, 2000 + two - 1)).sequences == 1
    assert part.share(situation(8, 8000, 2000 + two)).sequences in (1, 2)
    assert part.share(situation(8, 8000, 2000 + two - 1)).sequences == 1
    assert part.share(situation(8, 8000, 2000 + one - 1)).sequences == 0
    idle = part.share(situation(0, 0))
    assert (idle.decode_sms, idle.sequences) == (0, 2)


def test_the_baselines() -> None:
    limits = Limits({1: 100}, 0.0)
    assert StaticSplit(limits, 40).share(situation(250, 400_000)).decode_sms == 40
    assert StaticSplit(limits, 40).share(situation(0, 0)).decode_sms == 40
    assert IdleOnly(limits).share(situation(1, 10)).sequences == 0
    assert IdleOnly(limits).share(situation(0, 0)).sequences == 1


def test_without_a_profiler_nothing_is_tuned() -> None:
    assert build_policy("harli", BELIEFS, Slo(1.0, 0.05)).engine is None


# -- the limit ---------------------------------------------------------------------------------------------------------


def test_late_requests_lower_the_limit_until_few_enough_are_late() -> None:
    limit = MeasuredLimit(0.05, 0.2, late=0.1)
    assert limit.limit_s == pytest.approx(0.04) and limit.strictness() == 1.0
    for _ in range(5):
        limit.ended(0.051)
    assert limit.limit_s == pytest.approx(0.05 * 0.71) and limit.strictness() == pytest.approx(0.71 / 0.8)
    limits = Limits({1: 10}, 0.3, limit)
    assert limits.room(situation(1, 10, free=20_000)) == pytest.approx(20_000 * 0.7 * 0.71 / 0.8)
    before = limit.limit_s
    for k in range(1000):
        limit.ended(0.051 if k % 10 == 0 else 0.049)
    assert limit.limit_s == pytest.approx(before, abs=0.05 * 0.021), "a tenth is what may be late"
    for _ in range(1000):
        limit.ended(0.05)
    assert limit.limit_s == pytest.approx(0.05 * 0.9) and limit.strictness() == 1.0
    for _ in range(1000):
        limit.ended(1.0)
    assert limit.limit_s == pytest.approx(0.05 * 0.3)


def test_the_limit_hears_of_each_request_once() -> None:
    limit, view = MeasuredLimit(0.05, 0.2, late=0.1), cluster([Role.DECODE])
    limit.observe(PrefillDone(1, 0, load()), view, 1.0)
    limit.observe(PrefillDone(1, 0, load()), view, 2.0)  # lost, and computed again
    limit.observe(Finished(1, 0, 11, load()), view, 1.6)
    assert limit.limit_s == pytest.approx(0.05 * 0.78), "60 ms a token since the first"
    limit.observe(PrefillDone(2, 0, load()), view, 1.0)
    limit.observe(Aborted(2), view, 9.0)
    limit.observe(Finished(3, 0, 1, load()), view, 9.0)
    assert limit.limit_s == pytest.approx(0.05 * 0.78)
    assert not MeasuredLimit(0.05, 0.2, late=0.0).observes and not MeasuredLimit(float("inf"), 0.2, 0.1).observes


# -- the whole ---------------------------------------------------------------------------------------------------------


@cache
def simulated(
    split: str, share: float = 0.5, kv_blocks: int | None = None, lengths: str = "azure-conv", late: float = 0.004
) -> RunMetrics:
    setup = Setup(
        policy="harli",
        options={"split": split, "share": share, "late": late},
        workload=WorkloadSetup(synthetic=f"{lengths}@20x0.3,{lengths}@10x2.4", rate_rps=12.0, duration_s=60.0),
        cluster=ClusterSetup("llama-3.1-8b", "a100-80g", prefill=2, decode=1, kv_blocks=kv_blocks),
        slo=Target(5.0, 0.05),
    )
    return summarize(run(setup, 3), setup.slo.slo())


def test_decode_keeps_its_target_and_tuning_gets_more_than_from_the_baselines() -> None:
    alone, harli, idle = simulated("off"), simulated("adaptive"), simulated("idle")
    assert alone.finetune_tokens_per_s is None
    assert harli.finetune_tokens_per_s is not None and idle.finetune_tokens_per_s is not None
    assert harli.tpot_attainment >= alone.tpot_attainment - 0.01
    assert harli.tpot_s.p50 is not None and alone.tpot_s.p50 is not None and harli.tpot_s.p50 > 1.2 * alone.tpot_s.p50
    assert harli.finetune_tokens_per_s > 2.0 * idle.finetune_tokens_per_s
    tuned = [run for run in (simulated("static", x) for x in (0.3, 0.4, 0.5, 0.6, 0.8))
             if run.tpot_attainment >= alone.tpot_attainment - 0.01]  # fmt: skip
    assert tuned, "some static split keeps the target"
    assert harli.finetune_tokens_per_s > 1.1 * max(run.finetune_tokens_per_s or 0.0 for run in tuned)


def test_short_answers_keep_their_target_too() -> None:
    alone, harli = simulated("off", lengths="sharegpt"), simulated("adaptive", lengths="sharegpt")
    fixed = simulated("adaptive", lengths="sharegpt", late=0.0)
    assert fixed.tpot_attainment < alone.tpot_attainment - 0.02, (
        "what the wait for the batch takes is no part of a step"
    )
    assert harli.tpot_attainment >= alone.tpot_attainment - 0.015, "a minute, in which the limit is learnt"
    assert harli.finetune_tokens_per_s is not None and fixed.finetune_tokens_per_s is not None
    assert harli.finetune_tokens_per_s > 0.8 * fixed.finetune_tokens_per_s
