"""``penstock compare``: several policies (and rates) on the same requests, over all cores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.options import Jobs, JsonFile, Quiet, Repeat, ReportFile, takes_setup

if TYPE_CHECKING:
    from penstock.experiment.setup import Setup

SCHEMA = "penstock.compare/1"


@takes_setup
def compare(
    setup: Setup,
    policies: Annotated[
        str, typer.Option(help="Policies with commas between (penstock policies), or all.")
    ] = "round-robin,least-kv,ares,arrow,mixed",
    rates: Annotated[str | None, typer.Option(help="Sweep these rates, as 4,6,8.", metavar="R,R,...")] = None,
    set: Annotated[
        list[str] | None, typer.Option(help="Option, as ares.horizon=4096 or for all horizon=4096; repeat it.")
    ] = None,
    repeat: Repeat = 1,
    jobs: Jobs = 0,
    json: JsonFile = None,
    report: ReportFile = None,
    quiet: Quiet = False,
) -> None:
    """Compare policies on the same requests, noise and predictions.

    penstock compare --policies round-robin,least-kv,ares --rate 20 --repeat 5

    penstock compare --policies least-kv,arrow --rates 8,16,24 --report compare.html
    """
    import msgspec

    import penstock
    from penstock.cli.show import Show, check_writable
    from penstock.experiment.build import notes, with_policy
    from penstock.experiment.floors import check_reachable
    from penstock.experiment.parse import names
    from penstock.experiment.parse import rates as parse_rates
    from penstock.experiment.repeat import fan_out, measure_and_keep, repeats_differ, seeds
    from penstock.experiment.settings import options_of
    from penstock.experiment.traffic import build_trace, slos
    from penstock.policy.registry import PRESETS
    from penstock.report.classes import TITLES, class_rows
    from penstock.report.repeat import combine
    from penstock.report.tables import comparison_table, plain_table

    show = Show(quiet, json)
    check_writable(report)
    chosen = list(PRESETS) if policies.strip() == "all" else names(policies, "policy")
    options = options_of(chosen, set or [])
    sweep = parse_rates(rates) if rates is not None else [None]
    if rates is not None and setup.workload.rate_rps is not None:
        show.note("--rate is ignored: --rates gives the rates")
    setups: dict[str, Setup] = {}
    for rate in sweep:
        for name in chosen:
            one = with_policy(setup, name, options[name])
            setups[name if rate is None else f"{name} @ {rate:g}/s"] = one if rate is None else one.at_rate(rate)
    for one in setups.values():
        check_reachable(one)
    if setups and repeat > 1 and not any(repeats_differ(one) for one in setups.values()):
        show.note("the trace is recorded and nothing is random: all seeds give the same run (add --noise or --cv)")

    tasks = [
        (one, seed, report is not None and seed == setup.seed)
        for one in setups.values()
        for seed in seeds(setup, repeat)
    ]
    with show.bar("runs", len(tasks)) as progress:
        done = fan_out(measure_and_keep, tasks, jobs, progress)
    rows: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    kept = {}
    for i, (label, one) in enumerate(setups.items()):
        mine = done[i * repeat : (i + 1) * repeat]
        metrics = [m for m, _ in mine]
        rows[label] = metrics[0] if repeat == 1 else combine(metrics)
        if mine[0][1] is not None:
            kept[label] = mine[0][1]
        entry: dict[str, Any] = {
            "name": label,
            "policy": one.policy,
            "rate_rps": one.workload.rate_rps,
            "options": one.options,
        }
        entry |= {"result": metrics[0]} if repeat == 1 else {"result": metrics[0], "repeated": rows[label]}
        runs.append(entry)
    for note in dict.fromkeys(note for one in setups.values() for note in notes(one)):
        show.note(note)
    trace = build_trace(next(iter(setups.values())))
    swept = ", ".join(f"{rate:g}" for rate in sweep if rate is not None)
    said = f"{trace.source}: {len(trace):,} requests" + (f", at {swept} requests/s" if rates else "")
    show.print(said + (f", {repeat} seeds, ± 95 %" if repeat > 1 else ""))
    show.print(comparison_table(rows, width=show.out.width))
    by_class = class_rows(rows)
    if by_class:
        show.print(plain_table(TITLES, by_class))
    if report is not None:
        from penstock.report.html import write_html

        write_html(report, kept, slos(setup, trace), rows, title="Penstock: policies compared")
        show.wrote(report)
    document = {"schema": SCHEMA, "penstock": penstock.__version__, "seeds": seeds(setup, repeat)}
    show.json(document | {"setup": setup.plain(), "runs": msgspec.to_builtins(runs)})
