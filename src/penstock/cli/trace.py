"""``penstock trace``: look at traces, make them, convert them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cli.options import JsonFile, Quiet, ReportFile

if TYPE_CHECKING:
    from penstock.cli.show import Show
    from penstock.workload.trace import Trace

app = typer.Typer(no_args_is_help=True, help="Describe, make and convert traces.")

TraceFile = Annotated[str, typer.Argument(help="Trace file or ServeGen folder; the format is detected.")]
Format = Annotated[str | None, typer.Option(help="Format, where detection errs.")]
Rate = Annotated[float | None, typer.Option(help="Mean requests/s.")]
Start = Annotated[str, typer.Option(help="Skip this much.", metavar="TIME")]
Duration = Annotated[str | None, typer.Option(help="Keep this much.", metavar="TIME")]
Seed = Annotated[int, typer.Option(help="For what is drawn.")]
Count = Annotated[int | None, typer.Option("--requests", "-n", help="Keep at most this many.")]
Out = Annotated[str, typer.Argument(help="File to write, in Penstock's recording format (.gz packs).")]


@app.command()
def describe(
    path: TraceFile,
    format: Format = None,
    requests: Count = None,
    rate: Rate = None,
    start: Start = "0s",
    duration: Duration = None,
    seed: Seed = 0,
    json: JsonFile = None,
    report: ReportFile = None,
    quiet: Quiet = False,
) -> None:
    """Show what is in a trace: rate over time, lengths, burstiness, prefix reuse.

    penstock trace describe azure_conv_2023.csv --report trace.html
    """
    import dataclasses

    from penstock.cli.show import Show, check_writable
    from penstock.workload.describe import describe as summarise
    from penstock.workload.describe import render

    show = Show(quiet, json)
    check_writable(report)
    trace = _read(path, format, requests, rate, start, duration, seed)
    summary = summarise(trace)
    if not quiet:
        render(summary, trace, show.out)
    if report is not None:
        from penstock.cli.trace_page import write_trace_page

        write_trace_page(report, trace, summary)
        show.wrote(report)
    show.json({"schema": "penstock.trace/1", **dataclasses.asdict(summary)})


@app.command()
def make(
    spec: Annotated[
        str, typer.Argument(help="Profile, lengths as 512/128, or phases as azure-conv@300x4,reasoning@60.")
    ],
    out: Out,
    requests: Annotated[int | None, typer.Option("--requests", "-n", help="Number of requests.")] = None,
    rate: Annotated[float, typer.Option(help="Mean requests/s.")] = 8.0,
    cv: Annotated[float, typer.Option(help="Burstiness: 0 regular, 1 Poisson, above 1 bursts.")] = 1.0,
    duration: Duration = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Share of a class, as chat=0.8; repeat it.")
    ] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Draw a synthetic trace and write it to a file.

    penstock trace make azure-conv conv.jsonl.gz -n 5000 --rate 12 --cv 2
    """
    from penstock.cli.show import Show
    from penstock.experiment.parse import class_shares
    from penstock.experiment.parse import duration as seconds
    from penstock.workload.synthetic import synthesize

    length = None if duration is None else seconds(duration, "--duration")
    shares = class_shares(classes or [])
    trace = synthesize(spec, requests, rate, seed=seed, cv=cv, duration_s=length, classes=shares or None)
    _write(Show(quiet), trace, out)


@app.command()
def convert(
    path: TraceFile,
    out: Out,
    format: Format = None,
    requests: Count = None,
    rate: Rate = None,
    start: Start = "0s",
    duration: Duration = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Read a trace of any known format, cut or rescale it, and write Penstock's format.

    penstock trace convert azure_conv_2023.csv conv.jsonl.gz --start 10min --duration 5min
    """
    from penstock.cli.show import Show

    _write(Show(quiet), _read(path, format, requests, rate, start, duration, seed), out)


def _read(
    path: str, format: str | None, requests: int | None, rate: float | None, start: str, length: str | None, seed: int
) -> Trace:
    from penstock.experiment.parse import duration
    from penstock.workload.read import read_trace

    return read_trace(
        path,
        format=format,
        limit=requests,
        rate_rps=rate,
        start_s=duration(start, "--start"),
        duration_s=None if length is None else duration(length, "--duration"),
        seed=seed,
    )


def _write(show: Show, trace: Trace, out: str) -> None:
    from penstock.workload.recording import write_recording

    write_recording(trace, out)
    for note in trace.notes:
        show.note(note)
    show.wrote(f"{out}: {len(trace):,} requests, {trace.rate_rps:.3g}/s over {trace.duration_s:,.0f} s")
