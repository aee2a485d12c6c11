"""``penstock simulate``: one policy, one cluster, one workload."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.options import OUTPUT, Jobs, JsonFile, Quiet, Repeat, ReportFile, takes_setup

if TYPE_CHECKING:
    from penstock.cli.show import Show
    from penstock.experiment.setup import Setup
    from penstock.report.metrics import RunMetrics
    from penstock.sim.result import SimResult

SCHEMA = "penstock.simulate/1"


@takes_setup
def simulate(
    setup: Setup,
    policy: Annotated[str, typer.Option(help="Policy (penstock policies).")] = "auto",
    set: Annotated[list[str] | None, typer.Option(help="Option of the policy, as horizon=4096; repeat it.")] = None,
    json: JsonFile = None,
    report: ReportFile = None,
    csv: Annotated[
        str | None, typer.Option(help="Write one row a request.", metavar="FILE", rich_help_panel=OUTPUT)
    ] = None,
    record: Annotated[
        str | None,
        typer.Option(help="Write the event log, for replay (.gz packs).", metavar="FILE", rich_help_panel=OUTPUT),
    ] = None,
    repeat: Repeat = 1,
    jobs: Jobs = 0,
    stepping: Annotated[bool, typer.Option("--stepping", help="Take every engine step (slow; the oracle).")] = False,
    quiet: Quiet = False,
) -> None:
    """Simulate one policy on a trace or synthetic traffic.

    Default SLO: TTFT within 1 s, TPOT within 50 ms. Times take units: 50ms, 1.5s, 2min.

    penstock simulate --rate 12 --policy ares --set horizon=4096

    penstock simulate --trace azure_conv_2023.csv --prefill 2 --decode 2 --json out.json --report out.html

    penstock simulate --synthetic reasoning --rate 2 --tpot 30ms --fault down:3@60s,up:3@120s --repeat 5
    """
    from penstock.cli.show import Show, check_writable
    from penstock.experiment.build import notes, with_policy
    from penstock.experiment.floors import check_reachable
    from penstock.experiment.settings import options_of
    from penstock.experiment.setup import replace

    show = Show(quiet, json)
    check_writable(report, csv, record)
    options = options_of([policy], set or [])
    setup = replace(with_policy(setup, policy, options[policy]), stepping=stepping)
    check_reachable(setup)
    said = notes(setup)
    result, first = _first_run(show, setup, record, said)
    for note in said:
        show.note(note)
    document = _document(show, setup, result, first, said, repeat, jobs)
    if csv is not None:
        from penstock.experiment.traffic import slos
        from penstock.report.export import write_requests_csv

        write_requests_csv(csv, result, slos(setup, result.trace))
        show.wrote(csv)
    if report is not None:
        from penstock.experiment.traffic import slos
        from penstock.report.html import write_html

        name = setup.policy
        write_html(report, {name: result}, slos(setup, result.trace), {name: first}, title=f"Penstock: {name}")
        show.wrote(report)
    if record is not None:
        show.wrote(record)
    show.json(document)


def _first_run(show: Show, setup: Setup, record: str | None, said: list[str]) -> tuple[SimResult, RunMetrics]:
    """The run that tables, files and the log are about."""
    from penstock.experiment.build import log_header, run
    from penstock.experiment.traffic import build_trace, slos
    from penstock.report.metrics import summarize

    trace = build_trace(setup)
    said.extend(trace.notes)
    with show.bar("simulating", len(trace)) as progress:
        if record is None:
            result = run(setup, progress=progress)
        else:
            from penstock.core.eventlog import EventLog

            with EventLog(record, log_header(setup, trace)) as log:
                result = run(setup, log=log, progress=progress)
    return result, summarize(result, slos(setup, trace))


def _document(
    show: Show, setup: Setup, result: SimResult, first: RunMetrics, said: list[str], repeat: int, jobs: int
) -> dict[str, Any]:
    """Print the tables, and return what ``--json`` writes: the figures of the first run at the top level."""
    import msgspec

    import penstock
    from penstock.experiment.binding import explain
    from penstock.experiment.repeat import seeds
    from penstock.report.tables import run_table

    diagnosis = explain(setup, result.trace, first)
    document: dict[str, Any] = {"schema": SCHEMA, "penstock": penstock.__version__, **msgspec.to_builtins(first)}
    document |= {"seed": setup.seed, "diagnosis": diagnosis, "notes": said, "setup": setup.plain()}
    every = seeds(setup, repeat)
    if repeat == 1:
        show.print(run_table(first), diagnosis.text)
        return document

    from penstock.cli.repeated import repeated_table
    from penstock.experiment.repeat import fan_out, measure, repeats_differ
    from penstock.report.repeat import combine

    if not repeats_differ(setup):
        show.note("the trace is recorded and nothing is random: all seeds give the same run (add --noise or --cv)")
    with show.bar("seeds", repeat - 1) as progress:
        rest = fan_out(measure, [(setup, seed) for seed in every[1:]], jobs, progress)
    together = combine([first, *rest])
    show.print(repeated_table(together), f"Seed {setup.seed}: {diagnosis.text}")
    return document | {"repeated": together}
