"""How sure the plan is: the fit error of its inputs, the noise of arrivals, and which input moves the answer most.

Fit error: the plan again with prefill and decode slower and faster by their relative errors (taken as systematic: an
error that averages out over steps does less). Arrival noise: the plan again for what windows of traffic bring, with a
Poisson number of requests whose lengths are drawn anew from the workload's. Both are ours; the paper gives points only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import msgspec
import numpy as np

from penstock.core.errors import PenstockError
from penstock.plan.closed_form import INPUTS, Answer, Case, changed, solve

Cost = Callable[[float, float], float | None]
"""US dollars an hour of so many prefill and decode instances, None if unknown."""
REPLICATES = 40
WINDOW_S = 600.0
"""Length of the windows whose traffic differs from each other, seconds: about how fast a fleet can be resized."""
MOST_DRAWN = 20_000
NUDGE = 0.1
"""By how much an input is changed for the sensitivity."""


class Range(msgspec.Struct, frozen=True):
    """A predicted figure with its ranges: by fit error alone, by arrival noise alone (95 %), and both together.

    Where an end is None, the plan does not exist there (a target cannot be met).
    """

    value: float
    fit_low: float | None
    fit_high: float | None
    arrivals_low: float | None
    arrivals_high: float | None
    low: float | None
    high: float | None


class Sensitivity(msgspec.Struct, frozen=True):
    """Instances (fractional, prefill + decode) when one input is 10 % lower and higher; None: no such plan."""

    input: str
    low: float | None
    high: float | None
    swing: float


def figures(answer: Answer, prefill: int, decode: int, cost: Cost) -> dict[str, float]:
    """Every predicted figure of a plan, by the name that its JSON has."""
    case = answer.case
    found = {
        "prefill_throughput": answer.prefill_throughput,
        "decode_throughput": answer.decode_throughput,
        "pd_ratio": answer.pd_ratio,
        "prefill_instances": answer.prefill_instances,
        "decode_instances": answer.decode_instances,
        "capacity_rps": answer.capacity_rps(prefill, decode),
        "prefill_load": case.rate_rps / case.prefill_capacity_rps(prefill),
        "decode_load": case.rate_rps / answer.decode_capacity_rps(decode),
        "ttft_s": case.ttft_at(case.rate_rps, prefill),
        "tpot_s": case.tpot_at(case.rate_rps, decode) or math.inf,
    }
    price = cost(answer.prefill_instances, answer.decode_instances)
    if price is not None:
        found["cost_per_hour"] = price
    return found


def ranges(
    answer: Answer,
    prefill: int,
    decode: int,
    cost: Cost,
    seed: int = 0,
    replicates: int = REPLICATES,
    window_s: float = WINDOW_S,
) -> dict[str, Range]:
    """The ranges of every figure of :func:`figures`.

    Fit errors are those of the case's machine, prefill and decode both slow, both fast, and one of each.
    """
    if not 0 < window_s < math.inf:
        raise PenstockError(f"a window of {window_s:g} s", "give --window above 0, as 10min")
    case, machine = answer.case, answer.case.machine

    def again(other: Case) -> dict[str, float] | None:
        try:
            return figures(solve(other), prefill, decode, cost)
        except PenstockError:
            return None

    here = figures(answer, prefill, decode, cost)
    fits: list[dict[str, float] | None] = [here]
    p, d = machine.prefill_error, machine.decode_error
    if p or d:
        corners = {(1 / (1 + a), 1 / (1 + b)) for a in (p, -p) for b in (d, -d)}
        fits += [again(replace(case, machine=machine.faster(*corner))) for corner in sorted(corners)]
    rng = np.random.default_rng([seed, 11])
    drawn = [again(_window(case, rng, window_s)) for _ in range(replicates)]
    return {name: _range(name, value, fits, drawn) for name, value in here.items()}


def _window(case: Case, rng: np.random.Generator, window_s: float) -> Case:
    """The case as one window of traffic shows it."""
    count = max(1, int(rng.poisson(case.rate_rps * window_s)))
    if len(case.prompts) > 1:
        # Lengths of very long windows are drawn by as many, and their mean moved as little as it would.
        rows = rng.integers(0, len(case.prompts), min(count, MOST_DRAWN))
        return replace(case, rate_rps=count / window_s, prompts=case.prompts[rows], outputs=case.outputs[rows])
    return replace(case, rate_rps=count / window_s)


def _range(name: str, value: float, fits: list[dict[str, float] | None], drawn: list[dict[str, float] | None]) -> Range:
    fit = [one[name] for one in fits if one is not None and math.isfinite(one[name])]
    whole = len(fit) == len(fits)
    fit_low, fit_high = min(fit, default=value), max(fit, default=value)
    some = [one[name] for one in drawn if one is not None and math.isfinite(one[name])]
    known = len(some) == len(drawn) and len(some) > 1 and math.isfinite(value)
    noise = 1.96 * float(np.std(some, ddof=1)) if known else None
    if not math.isfinite(value):
        return Range(value, None, None, None, None, None, None)
    low = None if noise is None else value - math.hypot(value - fit_low, noise)
    high = None if noise is None or not whole else value + math.hypot(fit_high - value, noise)
    return Range(
        value,
        fit_low,
        fit_high if whole else None,
        None if noise is None else value - noise,
        None if noise is None else value + noise,
        low if low is None else max(low, 0.0),
        high,
    )


def sensitivity(answer: Answer) -> list[Sensitivity]:
    """One input at a time 10 % lower and higher; the largest swing in instances first."""
    case = answer.case
    here = answer.prefill_instances + answer.decode_instances
    found = []
    for name in INPUTS:
        if name == "overhead" and case.overhead_s == 0:
            continue
        ends = [_instances(changed(case, name, 1 + sign * NUDGE)) for sign in (-1, 1)]
        swing = max((abs(end - here) if end is not None else math.inf) for end in ends)
        found.append(Sensitivity(name, ends[0], ends[1], swing))
    return sorted(found, key=lambda one: -one.swing)


def _instances(case: Case) -> float | None:
    try:
        answer = solve(case)
    except PenstockError:
        return None
    return answer.prefill_instances + answer.decode_instances


def plain(found: Mapping[str, Range]) -> dict[str, dict[str, float | None]]:
    """Ranges as JSON can hold them (no inf)."""
    return {
        name: {
            key: value if value is None or math.isfinite(value) else None
            for key, value in msgspec.to_builtins(one).items()
        }
        for name, one in found.items()
    }
