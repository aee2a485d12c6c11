"""From fractions to whole instances: every rounding rule, what it achieves, and what binds there, in words.

The paper rounds 3.07 down and 3.79 up and does not say why (arXiv 2603.04716, worked example); both are the nearest
whole numbers, and the result falls 2 % short of the demand. So each rule is shown with what it achieves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from penstock.core.errors import PenstockError
from penstock.plan.closed_form import Answer
from penstock.report.columns import amount, number, percent, seconds

RULES = ("floor", "nearest", "ceil")


@dataclass(frozen=True)
class Bill:
    """GPUs of one prefill and one decode instance, and US dollars an hour of one of their GPUs (None: unknown)."""

    prefill_gpus: int = 1
    decode_gpus: int = 1
    prefill_price: float | None = None
    decode_price: float | None = None

    def gpus(self, prefill: int, decode: int) -> int:
        """GPUs of so many instances."""
        return prefill * self.prefill_gpus + decode * self.decode_gpus

    def cost(self, prefill: float, decode: float) -> float | None:
        """US dollars an hour of so many instances; None where a price is unknown."""
        if self.prefill_price is None or self.decode_price is None:
            return None
        return prefill * self.prefill_gpus * self.prefill_price + decode * self.decode_gpus * self.decode_price


class Option(msgspec.Struct, frozen=True):
    """Whole instances.

    ``capacity_rps`` (requests/s) and ``capacity_tpm`` (input + output tokens/min) are what both stages take within
    both targets; ``share_of_demand`` is that over the demand. ``prefill_load`` and ``decode_load`` are the demand over
    each stage's capacity, ``prefill_busy`` the utilisation of prefill instances at the demand (their queue's ρ),
    ``ttft_s`` and ``tpot_s`` the predicted latencies there (None: unstable, or outside the ladder). ``binding`` is
    ``prefill`` or ``decode``; ``text`` says why. ``cost_per_hour`` is in US dollars.
    """

    rule: str
    prefill: int
    decode: int
    capacity_rps: float
    capacity_tpm: float
    share_of_demand: float
    prefill_load: float
    decode_load: float
    prefill_busy: float
    ttft_s: float | None
    tpot_s: float | None
    binding: str
    text: str
    gpus: int
    cost_per_hour: float | None


def options(answer: Answer, bill: Bill) -> list[Option]:
    """One option a rule, at least one instance of each kind."""
    rounds: dict[str, Callable[[float], int]] = {"floor": math.floor, "nearest": _nearest, "ceil": _ceil}
    found = []
    for rule in RULES:
        p, d = (max(1, rounds[rule](x)) for x in (answer.prefill_instances, answer.decode_instances))
        found.append(option(answer, bill, rule, p, d))
    return found


def option(answer: Answer, bill: Bill, rule: str, prefill: int, decode: int) -> Option:
    """What ``prefill`` and ``decode`` instances achieve."""
    case = answer.case
    by_prefill, by_decode = case.prefill_capacity_rps(prefill), answer.decode_capacity_rps(decode)
    capacity = min(by_prefill, by_decode)
    ttft = case.ttft_at(case.rate_rps, prefill)
    return Option(
        rule=rule,
        prefill=prefill,
        decode=decode,
        capacity_rps=capacity,
        capacity_tpm=capacity * case.tokens_a_request * 60,
        share_of_demand=capacity / case.rate_rps,
        prefill_load=case.rate_rps / by_prefill,
        decode_load=case.rate_rps / by_decode,
        prefill_busy=case.rate_rps * case.prefill.mean_s / prefill,
        ttft_s=ttft if math.isfinite(ttft) else None,
        tpot_s=case.tpot_at(case.rate_rps, decode),
        binding="prefill" if by_prefill <= by_decode else "decode",
        text=binding_text(answer, prefill, decode),
        gpus=bill.gpus(prefill, decode),
        cost_per_hour=bill.cost(prefill, decode),
    )


def choose(found: list[Option], shortfall: float) -> Option:
    """The smallest option that takes ``1 - shortfall`` of the demand; ``ceil`` always does.

    Raises PenstockError for a shortfall outside [0, 1).
    """
    if not 0 <= shortfall < 1:
        raise PenstockError(f"shortfall {shortfall:g} is not in [0, 1)", "give --shortfall 0.03 for 3 %")
    enough = [one for one in found if one.share_of_demand >= (1 - shortfall) * (1 - 1e-9)]
    return min(enough or found[-1:], key=lambda one: (one.gpus, one.prefill + one.decode))


def binding_text(answer: Answer, prefill: int, decode: int) -> str:
    """Which stage binds, at which rate, because of what, how much room the other has, and what one more would bring."""
    case, point = answer.case, answer.decode_point
    by_prefill, by_decode = case.prefill_capacity_rps(prefill), answer.decode_capacity_rps(decode)

    def tpm(rate_rps: float) -> str:
        return f"{amount(rate_rps * case.tokens_a_request * 60)} tokens/min"

    which = "mean" if case.percentile is None else f"P{case.percentile:g}"
    if by_prefill <= by_decode:
        floor = case.prefill.floor_s(case.percentile) + case.overhead_s
        busy = by_prefill * case.prefill.mean_s / prefill
        more = min(case.prefill_capacity_rps(prefill + 1), by_decode)
        return (
            f"Prefill binds: beyond {tpm(by_prefill)} ({number(by_prefill)} req/s), {percent(min(busy, 1))} of "
            f"{_count(prefill, 'prefill instance')}, queueing takes {which} TTFT above {seconds(case.ttft_s)} (an idle "
            f"instance needs {seconds(floor)}); decode has {_room(by_decode, by_prefill)}. One prefill instance more: "
            f"{tpm(more)}."
        )
    more = min(answer.decode_capacity_rps(decode + 1), by_prefill)
    why = (
        f"steps take {seconds(point.step_s)}, all that {which} TPOT {seconds(case.tpot_s)} allows"
        if point.bound == "TPOT"
        else f"{point.bound} allows no larger batch (steps take {seconds(point.step_s)}, TPOT would allow more)"
    )
    return (
        f"Decode binds: beyond {tpm(by_decode)} ({number(by_decode)} req/s), a batch of {number(round(point.batch))} "
        f"on each of {_count(decode, 'decode instance')}, {why}; prefill has {_room(by_prefill, by_decode)}. One "
        f"decode instance more: {tpm(more)}."
    )


def _room(mine: float, binding: float) -> str:
    share = mine / binding - 1
    if share < 0.005:
        return "no room either"
    return f"{share:.0%} to spare" if share < 4 else f"room for {share + 1:.0f} times as much"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _nearest(x: float) -> int:
    return math.floor(x + 0.5)


def _ceil(x: float) -> int:
    # Rounding noise must not buy an instance.
    return math.ceil(x * (1 - 1e-12))
