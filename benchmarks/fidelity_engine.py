"""The simulator's own engine as a replay for ``fidelity_vllm.study``: what a user of ``penstock simulate`` gets.

The replay and the simulator share no code, so each checks the other: on a single engine they give the same figures.
A data-parallel group is one engine here whose work is split evenly over the ranks; the replay balances requests over
them as vLLM does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fidelity_replay import EngineConfig, Request
from penstock.core.actions import Action
from penstock.core.events import Event, RequestArrived
from penstock.core.types import Role, Slo
from penstock.perf.operators import OperatorStepModel
from penstock.perf.step import StepModel
from penstock.policy.parts import Beliefs
from penstock.policy.registry import build_policy
from penstock.sim.cluster import ClusterSpec, InstanceSpec, Scenario
from penstock.sim.run import build_world
from penstock.workload.trace import Trace

if TYPE_CHECKING:
    from penstock.sim.world import World


class EvenGroup(StepModel):
    """A data-parallel group as one engine: every rank gets an even share of decodes, context and prompts."""

    def __init__(self, model: OperatorStepModel, ranks: int) -> None:
        self.model = model
        self.ranks = ranks

    def step_s(self, decodes: int, context: int, chunk_new: list[int], chunk_past: list[int]) -> float:
        """Seconds of a step of the group; chunks go to the ranks in turn."""
        n = self.ranks
        shares = [decodes // n + (r < decodes % n) for r in range(n)]
        return self.model.lockstep_s(
            [
                (share, round(context * share / max(decodes, 1)), chunk_new[r::n], chunk_past[r::n])
                for r, share in enumerate(shares)
            ]
        )

    def decode_affine(self, decodes: int, context: int) -> tuple[float, float, float]:
        """One step at a time: rounding the shares bends the line at every token."""
        return self.step_s(decodes, context, [], []), 0.0, float(context)


class Boundaries:
    """Notes when the engine loop first sees each request: at the end of the step in progress."""

    def __init__(self) -> None:
        self.world: World | None = None
        self.queued_s: dict[int, float] = {}

    def write(self, now: float, event: Event, actions: list[Action]) -> None:
        """Called before the actions of ``event`` are carried out."""
        if isinstance(event, RequestArrived) and self.world is not None:
            engine = self.world.engines[0]
            planned = engine.planned
            self.queued_s[event.request] = engine.time_of(max(1, engine.boundary(now))) if planned else now


def simulated(requests: list[Request], config: EngineConfig, model: OperatorStepModel, ranks: int) -> list[Request]:
    """Serve ``requests`` with the simulator's leaping engine, one mixed instance; times are filled in."""
    step = model if ranks == 1 else EvenGroup(model, ranks)
    spec = InstanceSpec(
        Role.MIXED,
        step,
        # vLLM keeps one block of each rank for itself.
        (config.num_blocks - 1) * ranks,
        config.block_size,
        config.max_num_seqs * ranks,
        config.max_num_batched_tokens * ranks,
        async_scheduling=True,
    )
    trace = Trace(
        np.array([r.arrival_s for r in requests]),
        np.array([r.prompt for r in requests], np.int64),
        np.array([r.outputs for r in requests], np.int64),
        np.zeros(len(requests), np.int16),
    )
    beliefs = Beliefs(step, 1.0, 1e9)
    notes = Boundaries()
    policy = build_policy("mixed", beliefs, Slo())
    world = build_world(trace, ClusterSpec((spec,), 1.0), policy, beliefs, Slo(), Scenario(), log=notes)
    notes.world = world
    world.run(1e9)
    for i, request in enumerate(requests):
        request.queued_s = notes.queued_s[i]
        request.first_s = world.first_token_s[i]
        request.last_s = world.finish_s[i]
        request.preempted = world.preempted[i]
    return requests
