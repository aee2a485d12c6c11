"""``penstock provision``: the cheapest mix of machine types, and the arithmetic of chips."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.options import OUTPUT, SLO, WORKLOAD, Jobs, JsonFile, Quiet, takes_setup_but

if TYPE_CHECKING:
    from penstock.cli.show import Show
    from penstock.experiment.setup import Setup
    from penstock.plan.provision import MachineRate, Mixed, Repurposed, Workload
    from penstock.plan.verify import Check

SCHEMA = "penstock.provision/1"
MACHINES = "Machines"
SHOWN = 8


@takes_setup_but(
    "rate", "synthetic", "cv", "classes", "prefill", "decode", "mixed", "handshake", "migration_level", "slo", "fault",
    "predictor", "until", "belief_profile", "belief_error", "hardware", "prefill_hardware", "decode_hardware",
    "prefill_tp", "decode_tp", "profile",
)  # fmt: skip
def provision(
    setup: Setup,
    rps: Annotated[float | None, typer.Option(help="Demand, requests/s.", rich_help_panel=WORKLOAD)] = None,
    isl: Annotated[float | None, typer.Option(help="Mean input tokens.", rich_help_panel=WORKLOAD)] = None,
    osl: Annotated[float | None, typer.Option(help="Mean output tokens.", rich_help_panel=WORKLOAD)] = None,
    synthetic: Annotated[
        str | None, typer.Option(help="Lengths of a profile: azure-conv, reasoning, ...", rich_help_panel=WORKLOAD)
    ] = None,
    percentile: Annotated[float, typer.Option(help="Targets hold for this percentile.", rich_help_panel=SLO)] = 90.0,
    slowdown: Annotated[
        str | None,
        typer.Option(
            help="Targets as multiples of a request alone on an H100: 3/2.", metavar="TTFT/TPOT", rich_help_panel=SLO
        ),
    ] = None,
    types: Annotated[
        str, typer.Option(help="Machine types to mix.", rich_help_panel=MACHINES)
    ] = "h100,a100,h100-450w,spad-prefill,spad-decode",
    minimise: Annotated[str, typer.Option(help="cost (hardware) or tdp.", rich_help_panel=MACHINES)] = "cost",
    have_prefill: Annotated[
        str | None, typer.Option(help="Prefill machines owned, as 18xspad-prefill.", rich_help_panel=MACHINES)
    ] = None,
    have_decode: Annotated[
        str | None, typer.Option(help="Decode machines owned, as 7xspad-decode.", rich_help_panel=MACHINES)
    ] = None,
    mix: Annotated[str | None, typer.Option(help="Only the arithmetic of this mix.", rich_help_panel=MACHINES)] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="What --mix is compared with; repeat it.", rich_help_panel=MACHINES)
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Simulate the cheapest mix.", rich_help_panel=OUTPUT)
    ] = False,
    repeat: Annotated[int, typer.Option(help="Seeds of --verify.", rich_help_panel=OUTPUT)] = 1,
    jobs: Jobs = 0,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Find the cheapest mix of machine types for a rate and an SLO.

    A machine is eight chips. Cost and TDP are SPAD's arithmetic (arXiv 2510.08544), in H100 machines.

    penstock provision --rps 70 --trace azure_code_2023.csv --model llama-3.1-70b --tp 8 --slowdown 3/2

    penstock provision --rps 55 --trace azure_conv_2023.csv --model llama-3.1-70b --tp 8 --slowdown 3/2 \
--have-prefill 18xspad-prefill --have-decode 7xspad-decode

    penstock provision --mix 18xspad-prefill+7xspad-decode --against 25xh100 --against 21xh100+4xh100-450w
    """
    import penstock
    from penstock.cli.show import Show
    from penstock.core.errors import PenstockError
    from penstock.experiment.parse import names
    from penstock.plan.chips import chip, parse_mix
    from penstock.plan.provision import machine_rates, mixes, reason, repurpose

    show = Show(quiet, json)
    document: dict[str, Any] = {"schema": SCHEMA, "penstock": penstock.__version__}
    chosen = [chip(name).name for name in names(types, "machine type")]
    document["chips"] = _chips(show)
    if mix is not None:
        show.json(document | {"mix": _arithmetic(show, mix, against or [])})
        return
    if against:
        raise PenstockError("--against without --mix", "give --mix, as 18xspad-prefill+7xspad-decode")
    if (have_prefill is None) != (have_decode is None):
        raise PenstockError("owned machines of one role only", "give both --have-prefill and --have-decode")
    workload, notes = _workload(setup, rps, isl, osl, synthetic, percentile, slowdown)
    owned = None if have_prefill is None or have_decode is None else (parse_mix(have_prefill), parse_mix(have_decode))
    wanted = list(dict.fromkeys([*chosen, "h100", *((*owned[0], *owned[1]) if owned is not None else ())]))
    rates = machine_rates(workload, wanted)
    rate = workload.case.rate_rps
    found = mixes([one for one in rates if one.chip in chosen], rate, minimise)
    uniform = mixes([one for one in rates if one.chip == "h100"], rate)
    same = uniform[0] if uniform else None
    for note in notes:
        show.note(note)
    _print(show, workload, rates, found, same)
    if not found:
        raise PenstockError("no pair of these types meets the SLO", "give more --types, or a looser SLO")
    said = reason(rates, found[0], same)
    show.print(said)
    again = None
    if owned is not None:
        again = repurpose(rates, *owned, rate)
        document["repurposed"] = _repurposed(show, again, owned, same)
    checks = _verify(show, workload, found[0], repeat, jobs) if verify else None
    case = workload.case
    document |= {"rate_rps": rate, "ttft_s": case.ttft_s, "tpot_s": case.tpot_s, "percentile": case.percentile}
    document |= {"machines": rates, "mixes": found, "homogeneous": same, "text": said, "verify": checks}
    show.json(document | {"notes": notes, "setup": workload.setup.plain()})


def _chips(show: Show) -> list[dict[str, object]]:
    """Print and return what each type costs and draws."""
    from rich import box
    from rich.table import Table

    from penstock.plan.chips import CHIPS, die_usd

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("Chip", "die mm²", "die $", "memory $", "chip $", "cost", "TDP W", "TDP", "Note"):
        table.add_column(title, justify="left" if title in ("Chip", "Note") else "right")
    rows: list[dict[str, object]] = []
    for one in CHIPS.values():
        die = None if one.area_mm2 is None else die_usd(one.area_mm2)
        memory = None if one.memory is None else one.memory.usd
        table.add_row(
            one.name,
            "–" if one.area_mm2 is None else f"{one.area_mm2:.0f}",
            "–" if die is None else f"{die:.0f}",
            "–" if memory is None else f"{memory:.0f}",
            f"{one.usd:.0f}",
            f"{one.cost:.2f}",
            f"{one.tdp_w:.0f}",
            f"{one.power:.2f}",
            one.note,
        )
        row: dict[str, object] = {
            "name": one.name,
            "area_mm2": one.area_mm2,
            "die_usd": die,
            "memory_usd": memory,
            "usd": one.usd,
        }
        rows.append(row | {"cost": one.cost, "tdp_w": one.tdp_w, "tdp": one.power, "note": one.note})
    show.print(table)
    return rows


def _arithmetic(show: Show, mix: str, against: list[str]) -> dict[str, object]:
    from penstock.plan.chips import mix_cost, mix_power, mix_text, parse_mix, saving

    mine = parse_mix(mix)
    cost, power = mix_cost(mine), mix_power(mine)
    show.print(f"{mix_text(mine)}: hardware {cost:.2f}, TDP {power:.2f} H100 machines.")
    rows = []
    for text in against:
        theirs = parse_mix(text)
        other_cost, other_power = mix_cost(theirs), mix_power(theirs)
        saved, cooler = saving(cost, other_cost), saving(power, other_power)
        show.print(
            f"against {mix_text(theirs)} ({other_cost:.2f}, {other_power:.2f}): hardware {saved:+.1%} saved, "
            f"TDP {cooler:+.1%} saved."
        )
        row = {"mix": mix_text(theirs), "cost": other_cost, "tdp": other_power}
        rows.append(row | {"cost_saving": saved, "tdp_saving": cooler})
    return {"mix": mix_text(mine), "cost": cost, "tdp": power, "against": rows}


def _workload(
    setup: Setup,
    rps: float | None,
    isl: float | None,
    osl: float | None,
    synthetic: str | None,
    percentile: float,
    slowdown: str | None,
) -> tuple[Workload, list[str]]:
    """The case on H100 machines, with the targets of ``--slowdown`` where it is given."""
    import dataclasses

    from penstock.core.errors import PenstockError
    from penstock.experiment.setup import replace
    from penstock.plan.provision import Workload, alone_on_h100
    from penstock.plan.question import Question, pose
    from penstock.report.columns import seconds

    setup = replace(
        setup,
        workload=replace(setup.workload, synthetic=synthetic or ""),
        cluster=replace(setup.cluster, hardware="h100"),
    )
    posed = pose(Question(rps=rps, isl=isl, osl=osl, percentile=percentile), setup)
    assert posed.setup is not None
    workload, notes = Workload(posed.case, posed.setup), posed.notes
    if slowdown is None:
        return workload, notes
    parts = slowdown.split("/")
    try:
        ttft, tpot = (float(part) for part in parts)
    except ValueError:
        ttft = tpot = 0.0
    if not (1 < ttft < 1e6 and 1 < tpot < 1e6):
        raise PenstockError(f"slowdown {slowdown!r} cannot be read", "write TTFT/TPOT above 1, as 3/2") from None
    alone = alone_on_h100(workload)
    case = dataclasses.replace(workload.case, ttft_s=ttft * alone[0], tpot_s=tpot * alone[1])
    notes.append(
        f"P{percentile:g} of requests alone on an H100 machine: TTFT {seconds(alone[0])}, TPOT {seconds(alone[1])}; "
        f"targets {seconds(case.ttft_s)} and {seconds(case.tpot_s)}"
    )
    return Workload(case, posed.setup), notes


def _print(show: Show, workload: Workload, rates: list[MachineRate], found: list[Mixed], same: Mixed | None) -> None:
    from rich import box
    from rich.table import Table

    from penstock.plan.chips import chip, saving
    from penstock.report.columns import number

    machines = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("Machine", "prefill req/s", "per cost", "decode req/s", "per cost", "cannot"):
        machines.add_column(title, justify="left" if title in ("Machine", "cannot") else "right")
    for rate in rates:
        cost = chip(rate.chip).cost
        p, d = rate.prefill_rps, rate.decode_rps
        problem = rate.prefill_problem or rate.decode_problem
        machines.add_row(rate.chip, number(p), number(p / cost), number(d), number(d / cost), problem)
    show.print(machines)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption="Cost and TDP in H100 machines.", caption_justify="left")
    for title in ("Prefill", "Decode", "cost", "TDP", "cost saved", "TDP saved", "capacity req/s", "binds"):
        table.add_column(title, justify="left" if title in ("Prefill", "Decode", "binds") else "right")
    shown = found[:SHOWN] + ([same] if same is not None and same not in found[:SHOWN] else [])
    for one in shown:
        table.add_row(
            f"{one.prefill} x {one.prefill_chip}",
            f"{one.decode} x {one.decode_chip}",
            f"{one.cost:.2f}",
            f"{one.tdp:.2f}",
            "–" if same is None else f"{saving(one.cost, same.cost):.0%}",
            "–" if same is None else f"{saving(one.tdp, same.tdp):.0%}",
            number(one.capacity_rps),
            one.binding,
        )
    show.print(table)


def _repurposed(
    show: Show, again: Repurposed, owned: tuple[dict[str, int], dict[str, int]], same: Mixed | None
) -> dict[str, object]:
    from penstock.plan.chips import mix_cost, mix_power, mix_text, saving
    from penstock.report.columns import number

    whole = {name: owned[0].get(name, 0) + owned[1].get(name, 0) for name in {**owned[0], **owned[1]}}
    text = (
        f"Owned {mix_text(whole)}: {again.moved} change their role, {mix_text(again.prefill) or 'none'} prefill and "
        f"{mix_text(again.decode) or 'none'} decode take {number(again.capacity_rps)} req/s"
        + (", enough." if again.holds else ": not enough.")
    )
    found: dict[str, object] = {"text": text, "assignment": again}
    if again.holds and same is not None:
        cost, power = saving(mix_cost(whole), same.cost), saving(mix_power(whole), same.tdp)
        text += f" Against {same.prefill + same.decode} H100 machines: hardware {cost:+.0%}, TDP {power:+.0%} saved."
        found |= {"text": text, "cost_saving": cost, "tdp_saving": power}
    show.print(text)
    return found


def _verify(show: Show, workload: Workload, best: Mixed, repeat: int, jobs: int) -> list[Check]:
    """Simulate the mix as one cluster of its instances."""
    import dataclasses

    from penstock.core.errors import PenstockError
    from penstock.experiment.setup import replace
    from penstock.plan.chips import CHIPS_A_MACHINE, chip
    from penstock.plan.closed_form import solve
    from penstock.plan.question import LENGTHS_DRAWN
    from penstock.plan.sources import modelled
    from penstock.plan.tables import checks_table
    from penstock.plan.verify import requests_for, verify

    pair = chip(best.prefill_chip), chip(best.decode_chip)
    for one in pair:
        if one.compute_share != 1:
            raise PenstockError(f"{one.name} is not in the hardware catalogue", "leave it out of --types to --verify")
    cluster = replace(workload.setup.cluster, prefill_hardware=pair[0].hardware, decode_hardware=pair[1].hardware)
    setup = replace(workload.setup, cluster=cluster)
    case = dataclasses.replace(workload.case, machine=modelled(setup))
    answer = solve(case)
    each = CHIPS_A_MACHINE // cluster.tp
    split = best.prefill * each, best.decode * each
    requests = requests_for(case, best.capacity_rps, LENGTHS_DRAWN)
    with show.bar("simulating", repeat) as progress:
        seeds = [setup.seed + i for i in range(repeat)]
        checks = verify(case, answer, [split], setup, seeds, requests, jobs, progress)
    show.print(checks_table(checks, case.tokens_a_request))
    return checks
