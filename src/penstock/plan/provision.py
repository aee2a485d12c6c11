"""The cheapest mix of machine types for a rate and an SLO, and what a mix can do when the workload changes.

SPAD's method (arXiv 2510.08544, provisioning): for a rate, the smallest numbers of prefill and decode machines that
meet the SLO, at the least hardware cost. What one machine takes comes from the closed form here, with the roofline as
step model; SPAD simulates with LLMCompass, so machine counts differ and ratios are what compares.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import msgspec

from penstock.core.errors import PenstockError
from penstock.core.types import Role
from penstock.experiment.setup import Setup
from penstock.experiment.setup import replace as replace_setup
from penstock.perf.roofline import RooflineStepModel
from penstock.plan.chips import CHIPS_A_MACHINE, Chip, Mix, chip, mix_cost, mix_power
from penstock.plan.closed_form import Case, check_ttft, decode_point
from penstock.plan.machine import Modelled
from penstock.plan.sources import modelled
from penstock.report.columns import number

MOST_MACHINES = 4096
GOALS: dict[str, Callable[[Mix], float]] = {"cost": mix_cost, "tdp": mix_power}
"""What is made least: hardware cost or TDP, both in H100 machines."""


class MachineRate(msgspec.Struct, frozen=True):
    """Requests/s that one machine of a type takes in each role within the SLO; 0 with the reason where it cannot.

    Prefill machines share a queue, so theirs is a machine's part in the smallest pool that takes the demand:
    ``prefill_machines`` of them.
    """

    chip: str
    prefill_rps: float
    decode_rps: float
    prefill_machines: int = 0
    prefill_problem: str = ""
    decode_problem: str = ""


class Mixed(msgspec.Struct, frozen=True):
    """Machines by role: ``prefill`` of ``prefill_chip``, ``decode`` of ``decode_chip``, with cost and TDP in H100s."""

    prefill_chip: str
    prefill: int
    decode_chip: str
    decode: int
    cost: float
    tdp: float
    capacity_rps: float
    binding: str

    def mix(self) -> Mix:
        """Machines by type."""
        found = {self.prefill_chip: self.prefill}
        found[self.decode_chip] = found.get(self.decode_chip, 0) + self.decode
        return found


class Repurposed(msgspec.Struct, frozen=True):
    """Owned machines on another workload.

    ``prefill`` and ``decode`` are machines by type in each role, ``moved`` how many changed theirs, ``capacity_rps``
    the rate that both roles take. ``holds`` says whether that is the rate asked for.
    """

    prefill: Mix
    decode: Mix
    moved: int
    capacity_rps: float
    holds: bool


@dataclass(frozen=True)
class Workload:
    """What a machine is asked for: a case (its machine is replaced by each type's), and the cluster's setup."""

    case: Case
    setup: Setup


def machine_rates(workload: Workload, names: Sequence[str]) -> list[MachineRate]:
    """Both rates of each type. Raises PenstockError where no type can do one of the roles, with the last reason."""
    found = [machine_rate(workload, name) for name in names]
    for role in ("prefill", "decode"):
        if not any(getattr(one, f"{role}_rps") > 0 for one in found):
            problem = getattr(found[-1], f"{role}_problem")
            raise PenstockError(f"no machine type can {role} within the SLO ({problem})", "loosen it, or add types")
    return found


def machine_rate(workload: Workload, name: str) -> MachineRate:
    """Rates of one machine of ``CHIPS_A_MACHINE`` chips, as many instances as fit by tensor parallelism."""
    tp = workload.setup.cluster.tp
    if CHIPS_A_MACHINE % tp:
        raise PenstockError(f"tensor parallelism {tp} does not divide {CHIPS_A_MACHINE} chips", "use 1, 2, 4 or 8")
    instances = CHIPS_A_MACHINE // tp
    rates, problems, pool = [0.0, 0.0], ["", ""], 0
    try:
        case = replace(workload.case, machine=_of_chip(workload.setup, chip(name)))
    except PenstockError as error:
        return MachineRate(name, 0.0, 0.0, 0, str(error), str(error))
    try:
        check_ttft(case)
        pool = _smallest_pool(case, instances)
        rates[0] = case.prefill_capacity_rps(pool * instances) / pool
    except PenstockError as error:
        problems[0] = error.problem
    try:
        rates[1] = instances * decode_point(case).throughput / case.osl
    except PenstockError as error:
        problems[1] = error.problem
    return MachineRate(name, rates[0], rates[1], pool, *problems)


def _smallest_pool(case: Case, instances: int) -> int:
    """Machines of so many prefill instances that take the case's demand; found by doubling and halving."""

    def enough(machines: int) -> bool:
        return case.prefill_capacity_rps(machines * instances) >= case.rate_rps

    low, high = 0, 1
    while not enough(high):
        low, high = high, 2 * high
        if high > MOST_MACHINES:
            raise PenstockError(f"more than {MOST_MACHINES:,} machines would be needed", "check the demand")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _of_chip(setup: Setup, one: Chip) -> Modelled:
    """The step model of a chip; a capped one is not in the catalogue, so its model is made here."""
    c = replace_setup(setup.cluster, hardware=one.hardware, prefill_hardware=None, decode_hardware=None, profile=None)
    found = modelled(replace_setup(setup, cluster=c))
    if one.compute_share == 1:
        return found
    whole = cast(RooflineStepModel, found.prefill_spec.step_model)
    slow = RooflineStepModel(whole.model, one.spec(), c.tp, kv_dtype=c.kv_dtype)
    return replace(
        found,
        prefill_spec=replace(found.prefill_spec, step_model=slow),
        decode_spec=replace(found.decode_spec, step_model=slow),
        source=f"roofline of {c.model} on {one.name}",
    )


def mixes(rates: Sequence[MachineRate], rate_rps: float, goal: str = "cost") -> list[Mixed]:
    """The smallest mix for every pair of types, the least ``goal`` first.

    Raises PenstockError for an unknown goal.
    """
    if goal not in GOALS:
        raise PenstockError(f"unknown goal {goal!r}", f"minimise {' or '.join(GOALS)}")
    found = []
    for p, d in itertools.product(rates, rates):
        if p.prefill_rps <= 0 or d.decode_rps <= 0:
            continue
        n, m = p.prefill_machines, max(1, math.ceil(rate_rps / d.decode_rps * (1 - 1e-12)))
        by_prefill, by_decode = n * p.prefill_rps, m * d.decode_rps
        mix = {p.chip: n}
        mix[d.chip] = mix.get(d.chip, 0) + m
        binding = "prefill" if by_prefill <= by_decode else "decode"
        found.append(Mixed(p.chip, n, d.chip, m, mix_cost(mix), mix_power(mix), min(by_prefill, by_decode), binding))
    return sorted(found, key=lambda one: (GOALS[goal](one.mix()), one.prefill + one.decode))


def repurpose(rates: Sequence[MachineRate], prefill: Mix, decode: Mix, rate_rps: float) -> Repurposed:
    """Machines that are owned, on the workload of ``rates``: the assignment that holds the rate with the fewest moves.

    ``prefill`` and ``decode`` are the machines by type in their present roles. Where none holds the rate, the
    assignment with the highest rate. Every assignment of whole machines is tried.
    """
    by_name = {one.chip: one for one in rates}
    owned = [
        (name, n, role) for role, mix in ((Role.PREFILL, prefill), (Role.DECODE, decode)) for name, n in mix.items()
    ]
    best: tuple[tuple[float, ...], Repurposed] | None = None
    for moved in itertools.product(*(range(n + 1) for _, n, _ in owned)):
        now: tuple[Mix, Mix] = ({}, {})
        for (name, n, role), k in zip(owned, moved, strict=True):
            stay, go = (0, 1) if role is Role.PREFILL else (1, 0)
            now[stay][name] = now[stay].get(name, 0) + n - k
            now[go][name] = now[go].get(name, 0) + k
        capacity = min(
            sum(n * by_name[name].prefill_rps for name, n in now[0].items()),
            sum(n * by_name[name].decode_rps for name, n in now[1].items()),
        )
        holds = capacity >= rate_rps * (1 - 1e-9)
        key = (0.0, float(sum(moved)), -capacity) if holds else (1.0, -capacity, float(sum(moved)))
        if best is None or key < best[0]:
            kept = [{name: n for name, n in mix.items() if n} for mix in now]
            best = key, Repurposed(kept[0], kept[1], sum(moved), capacity, holds)
    assert best is not None
    return best[1]


def reason(rates: Sequence[MachineRate], best: Mixed, homogeneous: Mixed | None) -> str:
    """Why the mix is the cheapest, in words."""
    by_name = {one.chip: one for one in rates}
    p, d = chip(best.prefill_chip), chip(best.decode_chip)
    parts = [
        f"{p.name} prefills {number(by_name[p.name].prefill_rps / p.cost)} req/s a machine-cost of one H100",
        f"{d.name} decodes {number(by_name[d.name].decode_rps / d.cost)}",
    ]
    text = f"{' and '.join(parts)}, the most of the types tried up to whole machines; {best.binding} binds."
    if homogeneous is not None and homogeneous.cost > best.cost:
        text += (
            f" Against {homogeneous.prefill}P+{homogeneous.decode}D of H100: hardware "
            f"{1 - best.cost / homogeneous.cost:.0%} less, TDP {1 - best.tdp / homogeneous.tdp:.0%} less."
        )
    return text


def alone_on_h100(workload: Workload) -> tuple[float, float]:
    """TTFT and TPOT (seconds, the case's percentile) of requests that have an H100 instance to themselves.

    SPAD takes the slowdown request by request; here a percentile is compared with the same percentile.
    """
    case = replace(workload.case, machine=_of_chip(workload.setup, chip("h100")))
    alone = case.decode.handoff.tpot_for(case.decode.ladder.tpot_s[0], case.percentile)
    return case.prefill.floor_s(case.percentile), alone
