"""The engine that fine-tunes: leaps equal single steps, time and blocks add up, KV takes back what it needs."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.core.errors import PenstockError
from penstock.core.types import Role, Slo
from penstock.perf.hardware import hardware_spec
from penstock.perf.models import model_spec
from penstock.perf.roofline import RooflineStepModel
from penstock.policy.engine import EngineKit, EngineParts, Situation, Tuning, TuningShare
from penstock.policy.parts import Beliefs, Policy
from penstock.sim.cluster import ClusterSpec, Fault, FaultKind, InstanceSpec, Scenario
from penstock.sim.result import SimResult
from penstock.sim.run import Sampler, build_world, collect
from penstock.sim.tuning import TuningEngine
from penstock.sim.world import World
from tests.sim.support import LeastTokens, Turns, trace_of

MODEL = RooflineStepModel(model_spec("llama-3.1-8b"), hardware_spec("a100-80g"), 1)


class Fixed(Tuning):
    """Always the same."""

    def __init__(self, sms: int, sequences: int, steps: int) -> None:
        self.answer = TuningShare(sms, sequences, steps)

    def share(self, situation: Situation) -> TuningShare:
        return self.answer


class Kit(EngineKit):
    def __init__(self, tuning: Tuning | None) -> None:
        self.tuning = tuning

    def parts(self, instance: int, role: Role) -> EngineParts:
        return EngineParts(tuning=self.tuning if role is Role.DECODE else None)


def simulated(tuning: Tuning | None, blocks: int = 4000, faults: tuple[Fault, ...] = ()) -> tuple[World, SimResult]:
    rng = np.random.default_rng(4)
    n = 40
    arrivals = np.sort(rng.uniform(0.0, 8.0, n)).tolist()
    trace = trace_of(arrivals, rng.integers(50, 900, n).tolist(), rng.integers(2, 200, n).tolist())
    specs = tuple(InstanceSpec(role, MODEL, blocks, async_scheduling=True) for role in (Role.PREFILL, Role.DECODE))
    cluster = ClusterSpec(specs, 131_072.0)
    policy = Policy("test", Turns(Role.PREFILL), LeastTokens(), engine=Kit(tuning))
    world = build_world(trace, cluster, policy, Beliefs(MODEL, 131_072.0, 1e9), Slo(), Scenario(faults=faults))
    world.run(float("inf"))
    return world, collect(world, trace, "test", cluster, Sampler(world), 0.0)


def engine_of(world: World) -> TuningEngine:
    engine = world.engines[1]
    assert isinstance(engine, TuningEngine)
    return engine


def check_blocks(engine: TuningEngine) -> None:
    engine._number_blocks()
    pool = engine.pool
    assert sorted([*pool.free, *pool.state, *pool.lent, *engine.kv]) == list(range(pool.pages))
    assert engine.free == len(pool.free)
    assert len(pool.state) == engine.truth.state_pages


def test_a_part_that_rests_changes_nothing_but_the_blocks_of_its_state() -> None:
    _, plain = simulated(None)
    world, resting = simulated(Fixed(0, 0, 7))
    assert resting.requests.finish_s == pytest.approx(plain.requests.finish_s, rel=1e-9)
    assert engine_of(world).finetune_tokens == 0
    assert engine_of(world).capacity_blocks == 4000 - engine_of(world).truth.state_pages


def test_leaps_equal_single_steps() -> None:
    _, steps = simulated(Fixed(40, 1, 1))
    _, leaps = simulated(Fixed(40, 1, 1 << 40))
    # Contention is fixed at the start of a leap: a fraction of a per cent over these lengths.
    assert leaps.requests.finish_s == pytest.approx(steps.requests.finish_s, rel=2e-3)
    assert leaps.events < steps.events
    assert leaps.instances.finetune_tokens is not None and steps.instances.finetune_tokens is not None
    assert leaps.instances.finetune_tokens[1] == pytest.approx(steps.instances.finetune_tokens[1], abs=2 * 1024)


def test_tokens_are_time_over_the_time_of_a_micro_batch() -> None:
    world, result = simulated(Fixed(40, 2, 8))
    engine = engine_of(world)
    truth = engine.truth
    fastest = world.now / truth.tuning_alone_s(truth.sms - 40, 2) * truth.tokens(2)
    slowest = (world.now - 1.0) / (1.15 * truth.tuning_alone_s(truth.sms - 40, 2)) * truth.tokens(2)
    assert slowest < engine.finetune_tokens <= fastest
    assert result.instances.finetune_tokens is not None
    assert result.instances.finetune_tokens.tolist() == [0, engine.finetune_tokens]
    check_blocks(engine)


def test_decode_pays_for_the_sms_it_lacks() -> None:
    _, plain = simulated(None)
    _, shared = simulated(Fixed(20, 1, 16))
    # 20 of 108 SMs draw 0.62 of the bandwidth.
    step_s = [run.instances.busy_s[1] / run.instances.steps[1] for run in (plain, shared)]
    assert 1.5 < step_s[1] / step_s[0] < 2.2
    assert shared.requests.finish_s.mean() > plain.requests.finish_s.mean()


def test_kv_takes_the_pages_back_and_nobody_is_preempted_for_fine_tuning() -> None:
    # The state has 320 blocks of the 1,150; one sequence's activations hold 604 more.
    world, tight = simulated(Fixed(60, 1, 4), blocks=1150)
    engine = engine_of(world)
    assert engine.dropped_tokens > 0.0, "micro-batches were given up"
    assert engine.finetune_tokens > 0, "and others finished"
    assert np.isfinite(tight.requests.finish_s).all()
    assert tight.instances.preemptions[1] == 0
    check_blocks(engine)


def test_a_dead_instance_tunes_nothing() -> None:
    down = (Fault(2.0, 1, FaultKind.DOWN), Fault(5.0, 1, FaultKind.UP))
    world, result = simulated(Fixed(60, 1, 16), faults=down)
    whole, _ = simulated(Fixed(60, 1, 16))
    engine = engine_of(world)
    assert np.isfinite(result.requests.finish_s).all()
    assert 0 < engine.finetune_tokens < engine_of(whole).finetune_tokens * (world.now - 2.0) / whole.now
    check_blocks(engine)


def test_state_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PenstockError, match="state of fine-tuning fills"):
        simulated(Fixed(60, 1, 16), blocks=300)
