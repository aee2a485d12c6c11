"""``penstock goodput``: the highest rate that a policy sustains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.options import Jobs, JsonFile, Quiet, Repeat, ReportFile, takes_setup

if TYPE_CHECKING:
    from penstock.experiment.goodput import Goodput
    from penstock.experiment.setup import Setup
    from penstock.report.tables import GoodputRow

SCHEMA = "penstock.goodput/1"


@takes_setup
def goodput(
    setup: Setup,
    policies: Annotated[
        str, typer.Option("--policies", "--policy", help="One policy or several with commas between, or all.")
    ] = "auto",
    goal: Annotated[float, typer.Option(help="Share of requests that must meet the SLO.")] = 0.9,
    tolerance: Annotated[float, typer.Option(help="Relative precision of the rate.")] = 0.02,
    set: Annotated[list[str] | None, typer.Option(help="Option, as ares.horizon=4096; repeat it.")] = None,
    repeat: Repeat = 1,
    jobs: Jobs = 0,
    json: JsonFile = None,
    report: ReportFile = None,
    quiet: Quiet = False,
) -> None:
    """Find the highest request rate at which 90 % of the requests meet the SLO.

    Bisects on the rate; every rate sees the same requests, closer together. One search per policy and seed.

    penstock goodput --policies least-kv,arrow --ttft 500ms --tpot 40ms --repeat 3

    penstock goodput --trace azure_code_2023.csv --requests 3000 --prefill 3 --decode 1
    """
    import penstock
    from penstock.cli.show import Show, check_writable
    from penstock.experiment.build import notes, with_policy
    from penstock.experiment.floors import check_reachable, check_targets
    from penstock.experiment.goodput import goodput as search
    from penstock.experiment.parse import names
    from penstock.experiment.repeat import cores, fan_out, repeats_differ, seeds
    from penstock.experiment.settings import options_of
    from penstock.policy.registry import PRESETS
    from penstock.report.repeat import interval
    from penstock.report.tables import goodput_table

    show = Show(quiet, json)
    check_writable(report)
    chosen = list(PRESETS) if policies.strip() == "all" else names(policies, "policy")
    options = options_of(chosen, set or [])
    setups = {name: with_policy(setup, name, options[name]) for name in chosen}
    for one in setups.values():
        check_targets(one)
        check_reachable(one)
    if setup.workload.rate_rps is not None:
        show.note("--rate is ignored: goodput searches for it")
    if repeat > 1 and not any(repeats_differ(one) for one in setups.values()):
        show.note("the trace is recorded and nothing is random: all seeds give the same run (add --noise or --cv)")
    tasks = [(one, seed, goal, tolerance) for one in setups.values() for seed in seeds(setup, repeat)]
    alone = len(tasks) == 1 or cores(jobs) == 1
    with show.bar("runs" if alone else "searches", None if alone else len(tasks)) as progress:
        if alone:
            found = [search(*task, done=progress) for task in tasks]
        else:
            found = fan_out(search, tasks, jobs, progress)
    for note in dict.fromkeys(note for one in setups.values() for note in notes(one)):
        show.note(note)
    answers = []
    rows = []
    for i, name in enumerate(chosen):
        mine = found[i * repeat : (i + 1) * repeat]
        row = _row(name, mine)
        rows.append(row)
        entry: dict[str, Any] = {"policy": name, "goodput_rps": row.goodput_rps, "half_width_rps": row.half_width_rps}
        reached = [one.attainment for one in mine if one.attainment is not None]
        entry["attainment"] = interval(reached) if reached else None
        answers.append(entry | {"instances": row.instances, "limit": row.limit, "searches": mine})
    show.print(goodput_table(rows, goal))
    for i, name in enumerate(chosen):
        first = found[i * repeat]
        where = "even at the lowest rate tried" if first.rate_rps is None else "just above"
        show.print(f"{name}, {where}: {first.diagnosis.text}")
    if report is not None:
        _write_report(report, setups, rows, found[::repeat])
        show.wrote(report)
    document = {"schema": SCHEMA, "penstock": penstock.__version__, "goal": goal, "tolerance": tolerance}
    show.json(document | {"seeds": seeds(setup, repeat), "setup": setup.plain(), "policies": answers})


def _row(name: str, searches: list[Goodput]) -> GoodputRow:
    """Mean over seeds; a seed on which no rate met the goal counts as 0."""
    from collections import Counter

    from penstock.report.repeat import interval
    from penstock.report.tables import GoodputRow

    limit = Counter(one.limit for one in searches).most_common(1)[0][0]
    met = [one for one in searches if one.rate_rps is not None]
    if not met:
        return GoodputRow(name, None, None, searches[0].instances, limit)
    rate = interval([one.rate_rps or 0.0 for one in searches])
    # The table has no room for the interval of the attainment, so the mean of several stands in the JSON only.
    reached = met[0].attainment if len(searches) == 1 else None
    return GoodputRow(name, rate.mean, reached, searches[0].instances, limit, rate.half_width)


def _write_report(path: str, setups: dict[str, Setup], rows: list[GoodputRow], searches: list[Goodput]) -> None:
    """A page of one run a policy at its goodput (of the first seed)."""
    from penstock.experiment.build import run
    from penstock.experiment.traffic import slos
    from penstock.report.html import write_html

    runs = {}
    for one, found in zip(setups.values(), searches, strict=True):
        rate = found.rate_rps if found.rate_rps is not None else min(e.rate_rps for e in found.evaluations)
        runs[f"{one.policy} @ {rate:.3g}/s"] = run(one.at_rate(rate), found.seed)
    said = []
    for row in rows:
        spread = "" if row.half_width_rps is None else f" ± {row.half_width_rps:.2g}"
        rate_text = "no rate" if row.goodput_rps is None else f"{row.goodput_rps:.3g}{spread} requests/s"
        said.append(f"{row.policy} sustains {rate_text}")
    setup = next(iter(setups.values()))
    trace = next(iter(runs.values())).trace
    conclusion = f"With {searches[0].goal:.0%} of requests within the SLO, {'; '.join(said)}."
    write_html(path, runs, slos(setup, trace), title="Penstock: goodput", conclusion=conclusion)
