"""The fluid model's engine in the simulator: Poisson arrivals of given types, a step linear in the tokens it holds.

For tests and ``benchmarks/wait.py``. KV is counted token by token, an evicted request starts over from its prompt, and
slots and batch budget never bind, as in the model (WAIT, arXiv 2504.11320, section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import numpy as np

from penstock.core.types import Role, Slo
from penstock.perf.step import LinearStepModel
from penstock.plan.fluid import Flow, StepCost
from penstock.policy.engine import Batching, EngineKit, EngineParts
from penstock.policy.mixed import LeastTokens
from penstock.policy.parts import Beliefs, Policy
from penstock.sim.cluster import ClusterSpec, InstanceSpec, Scenario
from penstock.sim.run import simulate
from penstock.workload.arrivals import poisson_arrivals
from penstock.workload.trace import Trace

_MANY: Final = 1 << 20


class Outcome(msgspec.Struct, frozen=True):
    """What one run came to.

    ``throughput`` is completions over arrivals, both within the part of the run that counts; ``latency_s`` the mean
    from arrival to the last token of those completed there, ``ttft_s`` to the first; ``peak_tokens`` the most KV tokens
    ever held, ``evictions`` those of the whole run.
    """

    throughput: float
    latency_s: float
    ttft_s: float
    peak_tokens: int
    evictions: int


def traffic(flows: Sequence[Flow], seconds: float, seed: int) -> Trace:
    """Poisson arrivals of whole-token types over ``seconds``; types are SLO classes, outputs count the first token."""
    rng = np.random.default_rng(seed)
    parts = []
    for flow in flows:
        most = int(flow.rate_rps * seconds + 6 * (flow.rate_rps * seconds) ** 0.5) + 10
        arrivals = poisson_arrivals(most, flow.rate_rps, rng)
        parts.append(arrivals[arrivals < seconds])
    kinds = np.repeat(np.arange(len(flows)), [len(part) for part in parts])
    arrival_s = np.concatenate(parts)
    order = np.argsort(arrival_s, kind="stable")
    kinds = kinds[order]
    prompt = np.array([flow.prompt for flow in flows], np.int64)[kinds]
    output = np.array([flow.output + 1 for flow in flows], np.int64)[kinds]
    names = tuple(f"type{k}" for k in range(len(flows)))
    return Trace(arrival_s[order], prompt, output, kinds.astype(np.int16), class_names=names)


def observe(
    flows: Sequence[Flow],
    cost: StepCost,
    capacity_tokens: int,
    batching: Callable[[], Batching] | None,
    seconds: float,
    seed: int = 0,
    warm_up_s: float = 0.0,
) -> Outcome:
    """Run one engine for ``seconds``; what happens before ``warm_up_s`` is not counted.

    ``batching`` None is plain first-come-first-served. The cost of a prompt token is that of any other
    (``per_prompt_token_s`` is not looked at).
    """
    trace = traffic(flows, seconds, seed)
    model = LinearStepModel(cost.base_s, cost.per_request_s, cost.per_token_s, cost.per_token_s)
    spec = InstanceSpec(Role.MIXED, model, int(capacity_tokens), 1, _MANY, _MANY, restart_evicted=True)
    kit = None if batching is None else _Kit(batching)
    policy = Policy("fluid", LeastTokens(), engine=kit)
    scenario = Scenario(until_s=seconds)
    result = simulate(trace, ClusterSpec((spec,), 1.0), policy, Beliefs(model, 1.0, 1e9), Slo(), scenario)
    finish_s = result.requests.finish_s
    ended = (finish_s > warm_up_s) & (finish_s <= seconds)
    came = int((trace.arrival_s > warm_up_s).sum())
    return Outcome(
        throughput=float(ended.sum()) / came,
        latency_s=float((finish_s - trace.arrival_s)[ended].mean()),
        ttft_s=float((result.requests.first_token_s - trace.arrival_s)[ended].mean()),
        peak_tokens=int(result.instances.peak_blocks[0]),
        evictions=int(result.instances.preemptions[0]),
    )


class _Kit(EngineKit):
    """The same batching in every engine, each its own."""

    def __init__(self, batching: Callable[[], Batching]) -> None:
        self.batching = batching

    def parts(self, instance: int, role: Role) -> EngineParts:
        """See :class:`EngineKit`."""
        return EngineParts(batching=self.batching())
