"""The fluid model of one engine whose KV cache limits it: WAIT (arXiv 2504.11320, sections 2 to 4).

Requests of type j bring ``prompt`` tokens, run through ``output + 1`` stages of one step each (stage 0 computes the
prompt), and hold ``prompt + s`` tokens of KV at stage s. A step costs ``base_s`` and ``per_token_s`` for every token
that its batch holds. If n_j requests of type j start in every step, every stage of type j holds n_j requests: from
that one picture follow memory, step time and throughput.

An engine that counts tokens as vLLM does gives the first token with the prompt: ``output`` here is one less than the
output tokens there.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, inf, isfinite
from typing import Final

import msgspec

from penstock.core.errors import PenstockError

MARGIN: Final = 0.03
"""How much longer than its step a batch may take to gather; ours (the paper asks for more than 0)."""
_MOST_ROUNDS: Final = 100_000
_ALMOST: Final = 1e-9


class Flow(msgspec.Struct, frozen=True):
    """One type of requests: ``prompt`` tokens, ``output`` stages after the prompt's, ``rate_rps`` arrivals/s."""

    prompt: float
    output: float
    rate_rps: float

    def stages(self) -> float:
        """Steps that a request takes part in."""
        return self.output + 1.0

    def held(self) -> float:
        """K_j: KV tokens summed over the stages of one request (section 2)."""
        return self.stages() * (self.prompt + 0.5 * self.output)


class StepCost(msgspec.Struct, frozen=True):
    """Seconds of a step: ``base_s`` (d0) and ``per_token_s`` (d1) for every KV token of the batch (section 2).

    Ours, for engines where it matters: ``per_prompt_token_s`` in place of d1 for the prompts that a step computes
    (negative: d1 as well), and ``per_request_s`` for each request that decodes.
    """

    base_s: float
    per_token_s: float
    per_prompt_token_s: float = -1.0
    per_request_s: float = 0.0

    def request_s(self, flow: Flow) -> float:
        """Seconds that one request adds to the steps it takes part in."""
        if self.per_prompt_token_s < 0.0:
            return self.per_token_s * flow.held() + self.per_request_s * flow.output
        decoding = flow.held() - flow.prompt
        return self.per_prompt_token_s * flow.prompt + self.per_token_s * decoding + self.per_request_s * flow.output


class Equilibrium(msgspec.Struct, frozen=True):
    """The fluid equilibrium (section 3).

    ``demand`` is S, KV tokens x steps that arrive per second; ``load`` is the busy share that depends on the batch
    (d1 S), below 1; ``memory_tokens`` is M*, ``step_s`` dT*, ``starts`` n*_j (requests a step), ``tokens_per_s`` Thr*.
    """

    demand: float
    load: float
    memory_tokens: float
    step_s: float
    starts: tuple[float, ...]
    tokens_per_s: float


class Curve(msgspec.Struct, frozen=True):
    """M* over the total rate, the mix of types fixed: ``M* = a rate / (1 - b rate)``."""

    a: float
    b: float

    def memory_tokens(self, rate_rps: float) -> float:
        """M*; ``inf`` from the pole on, where no batch is long enough to keep up."""
        return self.a * rate_rps / (1.0 - self.b * rate_rps) if self.b * rate_rps < 1.0 else inf

    def rate_at(self, capacity_tokens: float) -> float:
        """The rate at which M* is the capacity."""
        return capacity_tokens / (self.a + self.b * capacity_tokens)

    def pole_rps(self) -> float:
        """The rate that no memory is enough for."""
        return 1.0 / self.b if self.b > 0.0 else inf


class Verdict(msgspec.Struct, frozen=True):
    """What whole thresholds come to (section 4).

    ``memory_tokens`` is M_pi = sum n_j K_j, which WAIT never exceeds; ``batch_s`` the step that holds it; ``gather_s``
    the least n_j / rate_j, what the scarcest type takes to gather. WAIT keeps up if ``batch_s <= gather_s``
    (``keeps_up``), and ``fits`` if M_pi is within the capacity. ``over`` is M_pi / M*: what rounding costs.
    """

    memory_tokens: float
    batch_s: float
    gather_s: float
    keeps_up: bool
    fits: bool
    over: float


def check(flows: Sequence[Flow], cost: StepCost) -> None:
    """Raise PenstockError unless there is something to solve."""
    if not flows:
        raise PenstockError("no request types", "give at least one, as prompt, output and rate")
    for flow in flows:
        values = (flow.prompt, flow.output, flow.rate_rps)
        if not all(isfinite(value) for value in values) or min(flow.prompt, flow.rate_rps) <= 0.0 or flow.output < 0.0:
            raise PenstockError(
                f"a type of {flow.prompt:g} prompt and {flow.output:g} output tokens at {flow.rate_rps:g} requests/s",
                "prompt and rate must be above 0, output 0 or more",
            )
    if not (isfinite(cost.base_s) and isfinite(cost.per_token_s)) or cost.base_s <= 0.0 or cost.per_token_s < 0.0:
        raise PenstockError(
            f"a step of {cost.base_s:g} s and {cost.per_token_s:g} s a token",
            "the time of an empty step must be above 0, that of a token 0 or more",
        )


def curve(flows: Sequence[Flow], cost: StepCost) -> Curve:
    """M* over the total rate for the mix of ``flows``."""
    check(flows, cost)
    total = sum(flow.rate_rps for flow in flows)
    held = sum(flow.rate_rps * flow.held() for flow in flows) / total
    busy = sum(flow.rate_rps * cost.request_s(flow) for flow in flows) / total
    return Curve(cost.base_s * held, busy)


def solve(flows: Sequence[Flow], cost: StepCost) -> Equilibrium:
    """The equilibrium of the given rates.

    Raises
    ------
    PenstockError
        Unstable: requests add more work per second than a second holds, whatever the batch.
    """
    check(flows, cost)
    demand = sum(flow.rate_rps * flow.held() for flow in flows)
    load = sum(flow.rate_rps * cost.request_s(flow) for flow in flows)
    if load >= 1.0:
        total = sum(flow.rate_rps for flow in flows)
        raise PenstockError(
            f"unstable: {total:g} requests/s need {load:.3g} seconds of KV work a second, whatever the batch",
            f"stay below {total / load:.4g} requests/s of this mix, or make tokens cheaper",
        )
    step_s = cost.base_s / (1.0 - load)
    return Equilibrium(
        demand=demand,
        load=load,
        memory_tokens=demand * step_s,
        step_s=step_s,
        starts=tuple(flow.rate_rps * step_s for flow in flows),
        tokens_per_s=sum(flow.rate_rps * flow.output for flow in flows),
    )


def require_room(found: Equilibrium, flows: Sequence[Flow], cost: StepCost, capacity_tokens: float) -> None:
    """Raise PenstockError where the equilibrium does not fit the KV cache: no policy can hold these rates."""
    if found.memory_tokens > capacity_tokens:
        rate = curve(flows, cost).rate_at(capacity_tokens)
        raise PenstockError(
            f"overfull: the equilibrium holds {found.memory_tokens:,.1f} KV tokens, the cache {capacity_tokens:,.0f}",
            f"stay below {rate:.4g} requests/s of this mix, or give more memory",
        )


def memory_of(flows: Sequence[Flow], thresholds: Sequence[float]) -> float:
    """M_pi: KV tokens of a batch with n_j requests at every stage of type j."""
    return sum(n * flow.held() for n, flow in zip(thresholds, flows, strict=True))


def batch_seconds(flows: Sequence[Flow], cost: StepCost, thresholds: Sequence[float]) -> float:
    """Seconds of the step with n_j requests at every stage of type j."""
    return cost.base_s + sum(n * cost.request_s(flow) for n, flow in zip(thresholds, flows, strict=True))


def judge(flows: Sequence[Flow], cost: StepCost, thresholds: Sequence[float], capacity_tokens: float = inf) -> Verdict:
    """Check thresholds against the conditions of WAIT (section 4); raises PenstockError as :func:`solve`."""
    if len(thresholds) != len(flows) or any(n <= 0 for n in thresholds):
        raise PenstockError(
            f"{len(thresholds)} thresholds for {len(flows)} types", "give one above 0 for each type, in the same order"
        )
    least = solve(flows, cost).memory_tokens
    memory = memory_of(flows, thresholds)
    batch_s = batch_seconds(flows, cost, thresholds)
    gather_s = min(n / flow.rate_rps for n, flow in zip(thresholds, flows, strict=True))
    return Verdict(
        memory_tokens=memory,
        batch_s=batch_s,
        gather_s=gather_s,
        keeps_up=batch_s <= gather_s,
        fits=memory <= capacity_tokens,
        over=memory / least,
    )


def whole_thresholds(flows: Sequence[Flow], cost: StepCost, margin: float = MARGIN) -> tuple[int, ...]:
    """The smallest whole thresholds whose batch takes ``1 + margin`` times less than it takes to gather.

    The paper leaves rounding open; rounding each n*_j up need not keep up, because what is added makes the batch
    longer. Longer batches are tried until one gathers in its own time: the map is monotone, so the first fixed point
    is the smallest in every type. Ours.

    Raises
    ------
    PenstockError
        Unstable, also with the margin.
    """
    load = solve(flows, cost).load
    if load * (1.0 + margin) >= 1.0:
        raise PenstockError(f"a load of {load:.4g} leaves no margin of {margin:g}", "give a smaller margin or rate")
    period = 0.0
    starts = tuple(1 for _ in flows)
    for _ in range(_MOST_ROUNDS):
        longer = (1.0 + margin) * batch_seconds(flows, cost, starts)
        if longer <= period:
            break
        period = longer
        starts = tuple(max(ceil(flow.rate_rps * period - _ALMOST), 1) for flow in flows)
    return starts


def shared_cap(flows: Sequence[Flow], cap: float) -> tuple[float, ...]:
    """n_j = B rho_j / (output_j + 1), rho_j the share of type j in what runs (the paper's practical rule, v1).

    ``cap`` is B, requests that may run at once. Every n_j is then the same time of arrivals, as in the fluid.
    """
    running = sum(flow.rate_rps * flow.stages() for flow in flows)
    return tuple(cap * flow.rate_rps / running for flow in flows)


def segment_ends(longest: int, segments: int) -> tuple[int, ...]:
    """``segments`` equal parts of the stages 1 .. ``longest``, as their last stages; fewer if there are too few."""
    count = max(min(segments, longest), 1)
    return tuple(floor(longest * (k + 1) / count + 0.5) for k in range(count))


def nested_cap(survival: Sequence[float], lengths: Sequence[float], cap: float, eta: float = 0.05) -> tuple[float, ...]:
    """Thresholds of segments from a cap (the practical rule of the revised paper).

    ``n_k = n_1 q_2 ... q_k`` with ``q_k = min(p_k + eta, 0.99)``, scaled so that ``sum lengths_k n_k`` is the cap.

    Parameters
    ----------
    survival : sequence of m - 1 floats
        p_2 .. p_m: the share of those who entered segment k - 1 that enter segment k.
    lengths : sequence of m floats
        Stages in each segment.
    cap : float
        Requests that may run at once (``tl`` in the paper).
    """
    shape = [1.0]
    for p in survival:
        shape.append(shape[-1] * min(p + eta, 0.99))
    scale = cap / sum(n * length for n, length in zip(shape, lengths, strict=True))
    return tuple(n * scale for n in shape)
