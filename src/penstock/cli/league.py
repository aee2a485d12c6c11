"""``penstock league``: every policy on every built-in workload, beside a bound that none can pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.options import OUTPUT, Jobs, JsonFile, Quiet, ReportFile

if TYPE_CHECKING:
    from penstock.league.play import League

SCHEMA = "penstock.league/1"


def league(
    policies: Annotated[
        str | None, typer.Option(help="Only these policies, with commas between (penstock policies).")
    ] = None,
    workloads: Annotated[
        str | None, typer.Option(help="Only these workloads, as azure-conv,three-phase.", metavar="NAMES")
    ] = None,
    mooncake: Annotated[
        str | None, typer.Option(help="Play a Mooncake trace file too (it is not built in).", metavar="FILE")
    ] = None,
    gpus: Annotated[int, typer.Option(help="Instances of one GPU each, the same for every policy.")] = 8,
    model: Annotated[str, typer.Option(help="Built-in model (penstock models).")] = "llama-3.1-8b",
    hardware: Annotated[str, typer.Option(help="Accelerator (penstock hardware).")] = "a100-80g",
    split: Annotated[
        int | None, typer.Option(help="Prefill instances, instead of the best split per workload.")
    ] = None,
    slo_form: Annotated[str, typer.Option(help="mean: TTFT and mean TPOT; deadline: every token in time.")] = "mean",
    goal: Annotated[float, typer.Option(help="Share of requests that must meet the SLO.")] = 0.9,
    tolerance: Annotated[float, typer.Option(help="Relative precision of the goodput.")] = 0.02,
    quick: Annotated[
        bool, typer.Option("--quick", help="Three workloads, a quarter of the requests, one split: a minute.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of traces and predictors.")] = 0,
    jobs: Jobs = 0,
    json: JsonFile = None,
    report: ReportFile = None,
    markdown: Annotated[
        str | None, typer.Option(help="Write the tables as Markdown.", metavar="FILE", rich_help_panel=OUTPUT)
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="Write every result to this file at once; broken off and run again, the league goes on from there.",
            metavar="FILE",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Play every policy on every built-in workload with the same GPUs, and set each beside the clairvoyant bound.

    penstock league --report league.html

    penstock league --policies mixed,least-kv,ares --workloads azure-conv,reasoning
    """
    import msgspec

    import penstock
    from penstock.cli.progress import running
    from penstock.cli.show import Show, check_writable, writing
    from penstock.experiment.parse import names
    from penstock.experiment.setup import check, replace
    from penstock.league.entries import base_setup, chosen_entries, chosen_policies
    from penstock.league.play import play
    from penstock.league.tables import conclusion, details_table, standing_table
    from penstock.league.tables import markdown as as_markdown

    show = Show(quiet, json)
    check_writable(report, markdown)
    base = replace(base_setup(gpus, model, hardware, seed), slo_form=slo_form)
    check(base)
    entries = chosen_entries(None if workloads is None else names(workloads, "workload"), mooncake, quick)
    chosen, left_out = chosen_policies(None if policies is None else names(policies, "policy"))
    for name, why in left_out.items():
        show.note(f"{name} does not play: {why}")
    with running(show, "searches") as done:
        played = play(
            base, entries, chosen, left_out=left_out, split=split, goal=goal, tolerance=tolerance, quick=quick,
            jobs=jobs, done=done, keep=keep,
        )  # fmt: skip
    if played.missing > 0:
        rest = "" if keep is None else "; the same command goes on from here"
        show.note(f"broken off: {played.missing} searches are missing below{rest}")
    show.print(conclusion(played))
    show.print(standing_table(played), *(details_table(played, ground.name) for ground in played.grounds))
    for row in played.rows:
        if row.problem:
            show.note(f"{row.policy} on {row.workload}: {row.problem}")
    if markdown is not None:
        with writing(markdown), open(markdown, "w", encoding="utf-8") as file:
            file.write(as_markdown(played))
        show.wrote(markdown)
    if report is not None:
        _write_report(report, played)
        show.wrote(report)
    document: dict[str, Any] = {"schema": SCHEMA, "penstock": penstock.__version__, "conclusion": conclusion(played)}
    show.json(document | {"setup": base.plain()} | msgspec.to_builtins(played))
    if played.missing > 0:
        raise typer.Exit(130)


def _write_report(path: str, played: League) -> None:
    from penstock.cli.figures_page import write_page
    from penstock.league.figure import shares_figure
    from penstock.league.tables import conclusion, legend, standing, standing_titles

    write_page(
        path,
        "Penstock: league",
        conclusion(played),
        legend(played),
        (standing_titles(played), standing(played)),
        {"Goodput as a share of the clairvoyant bound": shares_figure(played)},
    )
