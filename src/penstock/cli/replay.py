"""``penstock replay``: the same controller again, or another policy on the recorded requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.options import JsonFile, Quiet, ReportFile

if TYPE_CHECKING:
    from penstock.cli.show import Show
    from penstock.experiment.setup import Setup

SCHEMA = "penstock.replay/1"


def replay(
    log: Annotated[str, typer.Argument(help="Event log, as written by penstock simulate --record.")],
    policy: Annotated[
        str | None, typer.Option(help="Simulate the recorded requests under this policy, beside the recorded one.")
    ] = None,
    set: Annotated[list[str] | None, typer.Option(help="Option of that policy, as horizon=4096; repeat it.")] = None,
    json: JsonFile = None,
    report: ReportFile = None,
    quiet: Quiet = False,
) -> None:
    """Feed a recorded event log to the same controller: same actions, byte for byte.

    Exit code 0 if they are, 1 if they differ (the first difference is shown).

    penstock replay run.jsonl.gz

    penstock replay run.jsonl.gz --policy ares --set horizon=4096 --report replay.html
    """
    import msgspec

    import penstock
    from penstock.cli.show import Show, check_writable
    from penstock.core.errors import PenstockError
    from penstock.experiment import replay as experiment

    show = Show(quiet, json)
    check_writable(report)
    if policy is None:
        if set or report is not None:
            raise PenstockError("--set and --report need another policy", "add --policy NAME")
        found = experiment.replay(log)
        if found.cut:
            show.note("the last line was cut short and is left out")
        if found.difference is None:
            show.print(f"{found.events:,} events replay to the same {found.actions:,} actions ({found.policy}).")
        else:
            d = found.difference
            show.print(
                f"{log}:{d.line}: {d.event} at {d.t:.6g} s is answered differently.",
                f"  recorded {d.recorded}",
                f"  replayed {d.replayed}",
            )
        show.json({"schema": SCHEMA, "penstock": penstock.__version__, **msgspec.to_builtins(found)})
        if not found.identical:
            raise typer.Exit(1)
        return
    _other_policy(show, log, policy, set or [], report)


def _other_policy(show: Show, log: str, policy: str, settings: list[str], report: str | None) -> None:
    import penstock
    from penstock.core.eventlog import LogReader
    from penstock.experiment import replay as experiment
    from penstock.experiment.build import notes, run, with_policy
    from penstock.experiment.settings import options_of
    from penstock.experiment.traffic import slos
    from penstock.report.metrics import summarize
    from penstock.report.tables import comparison_table

    header = LogReader(log).header
    recorded = experiment.recorded_setup(header, log)
    other = with_policy(recorded, policy, options_of([policy], settings)[policy])
    work = experiment.workload(log)
    if work.left_out:
        show.note(f"{work.left_out:,} requests did not finish in the log, so their length is unknown: left out")
    for note in notes(other):
        show.note(note)
    setups: dict[str, Setup] = {f"{recorded.policy} (recorded)": recorded, policy: other}
    results = {name: run(one, header.seed, trace=work.trace) for name, one in setups.items()}
    targets = slos(recorded, work.trace)
    rows: dict[str, Any] = {name: summarize(result, targets) for name, result in results.items()}
    show.print(f"{log}: {len(work.trace):,} requests, both policies simulated on the recorded cluster")
    show.print(comparison_table(rows, width=show.out.width))
    if report is not None:
        from penstock.report.html import write_html

        write_html(report, results, targets, rows, title=f"Penstock: {log} under {policy}")
        show.wrote(report)
    runs = [{"name": name, "policy": setups[name].policy, "result": rows[name]} for name in setups]
    document = {"schema": SCHEMA, "penstock": penstock.__version__, "left_out": work.left_out}
    show.json(document | {"setup": recorded.plain(), "runs": runs})
