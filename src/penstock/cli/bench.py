"""``penstock bench``: replay a trace against a server, and report as a simulation does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.options import OUTPUT, JsonFile, Quiet, ReportFile, takes_traffic

if TYPE_CHECKING:
    from penstock.cli.show import Show
    from penstock.experiment.setup import Setup
    from penstock.live.load.endpoint import Endpoint
    from penstock.live.load.measured import ClientFigures
    from penstock.live.load.replay import Plan, Replay
    from penstock.report.metrics import RunMetrics
    from penstock.sim.result import SimResult

SCHEMA = "penstock.bench/1"
SERVER = "Server"
FAILED, INTERRUPTED = 1, 130


@takes_traffic
def bench(
    setup: Setup,
    url: Annotated[
        str, typer.Option(help="Server with an OpenAI-compatible API.", rich_help_panel=SERVER)
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Model to ask for; the first that the server lists.", rich_help_panel=SERVER)
    ] = None,
    endpoint: Annotated[str, typer.Option(help="completions or chat.", rich_help_panel=SERVER)] = "completions",
    prompt: Annotated[
        str,
        typer.Option(help="tokens (ids), text, or auto: tokens where the server takes them.", rich_help_panel=SERVER),
    ] = "auto",
    vocab: Annotated[
        str, typer.Option(help="Token ids that prompts are made of.", metavar="LOW-HIGH", rich_help_panel=SERVER)
    ] = "32-126",
    natural_end: Annotated[
        bool,
        typer.Option("--natural-end", help="Let the model end its output (else ignore_eos).", rich_help_panel=SERVER),
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Prompts that no earlier run sent; equal seeds send equal ones, which a prefix cache may hold.",
            rich_help_panel=SERVER,
        ),
    ] = False,
    body: Annotated[
        str | None,
        typer.Option(help="JSON object merged into every request.", metavar="JSON", rich_help_panel=SERVER),
    ] = None,
    send_slo: Annotated[
        bool,
        typer.Option("--send-slo", help="Tell the server each request's targets (Penstock).", rich_help_panel=SERVER),
    ] = False,
    api_key: Annotated[
        str | None,
        typer.Option(help="Bearer token.", envvar="PENSTOCK_API_KEY", rich_help_panel=SERVER),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(help="Requests in flight at most; 0 = no limit (open loop).", min=0, rich_help_panel=SERVER)
    ] = 0,
    warmup: Annotated[
        int, typer.Option(help="Requests sent beforehand and not counted.", min=0, rich_help_panel=SERVER)
    ] = 1,
    timeout: Annotated[
        str, typer.Option(help="A request that takes longer fails.", metavar="TIME", rich_help_panel=SERVER)
    ] = "10min",
    name: Annotated[
        str | None, typer.Option(help="Name of the run in tables and files.", rich_help_panel=OUTPUT)
    ] = None,
    json: JsonFile = None,
    report: ReportFile = None,
    save: Annotated[
        str | None, typer.Option(help="Write one JSON line a request.", metavar="FILE", rich_help_panel=OUTPUT)
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(
            help="Compare with this --json file of simulate or bench.", metavar="FILE", rich_help_panel=OUTPUT
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Replay a trace against a server, at the trace's own times, and report as simulate does.

    Requests are sent when the trace says, whether or not earlier ones were answered; TTFT counts from that time.

    Exit code 1: some request failed.

    penstock bench --url http://127.0.0.1:8000 --synthetic azure-conv --rate 4 -n 500

    penstock bench --trace azure_conv_2023.csv --duration 5min --json real.json --beside simulated.json
    """
    from penstock.cli.show import Show, check_writable
    from penstock.experiment.parse import target
    from penstock.experiment.traffic import build_trace, slos
    from penstock.live.load.beside import read_reference
    from penstock.live.load.endpoint import endpoint as endpoint_at
    from penstock.live.load.prompts import parse_vocab
    from penstock.live.load.replay import Plan

    show = Show(quiet, json)
    check_writable(report, save)
    reference = None if beside is None else read_reference(beside)
    at = endpoint_at(url, api_key, endpoint)
    trace = build_trace(setup)
    plan = Plan(
        at=at,
        trace=trace,
        model=model,
        form=_form(prompt),
        vocab=parse_vocab(vocab),
        seed=setup.seed,
        fresh=fresh,
        natural_end=natural_end,
        body=_merged(body),
        slos=slos(setup, trace) if send_slo else None,
        concurrency=concurrency,
        timeout_s=target(timeout, "--timeout"),
        warm_up=warmup,
        deadlines=slos(setup, trace) if setup.slo_form == "deadline" else None,
    )
    done, result = _measure(show, plan, name or at.name)
    _report(show, setup, plan, done, result, report, save, beside, reference)
    if done.interrupted:
        raise typer.Exit(INTERRUPTED)
    if any(stream.error is not None for stream in done.loop.streams):
        raise typer.Exit(FAILED)


def _form(text: str) -> Any:
    from penstock.core.errors import PenstockError

    if text not in ("auto", "tokens", "text"):
        raise PenstockError(f"--prompt {text!r} is unknown", "give tokens, text or auto")
    return None if text == "auto" else text


def _merged(text: str | None) -> dict[str, Any] | None:
    """The JSON object of ``--body``."""
    import msgspec

    from penstock.core.errors import PenstockError

    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise PenstockError(f"--body is no JSON object ({error})", """give one, as '{"temperature": 0.7}'""") from None


def _measure(show: Show, plan: Plan, name: str) -> tuple[Replay, SimResult]:
    import uvloop

    from penstock.cli.progress import running
    from penstock.live.load.measured import as_result
    from penstock.live.load.replay import replay

    with running(show, "requests") as progress:
        done = uvloop.run(replay(plan, progress))
    return done, as_result(done.trace, done.loop, done.end_s, name, plan.deadlines)


def _report(
    show: Show,
    setup: Setup,
    plan: Plan,
    done: Replay,
    result: SimResult,
    report: str | None,
    save: str | None,
    beside: str | None,
    reference: dict[str, float] | None,
) -> None:
    """Print, and write every file that was asked for."""
    import msgspec

    import penstock
    from penstock.experiment.traffic import slos
    from penstock.live.load.measured import client_figures, failures
    from penstock.report.metrics import summarize
    from penstock.report.tables import run_table

    targets = slos(setup, plan.trace)
    run = summarize(result, targets)
    client, failed = client_figures(done.loop, done.cpu_s), failures(done.loop.streams)
    notes = [*plan.trace.notes, *done.notes, *_remarks(client)]
    for note in notes:
        show.note(note)
    show.print(run_table(run), _about_client(client))
    for kind, failure in failed.items():
        show.print(f"failed: {failure.count:,} × {kind}" + (f" ({failure.example})" if failure.example else ""))
    document: dict[str, Any] = {"schema": SCHEMA, "penstock": penstock.__version__, **msgspec.to_builtins(run)}
    document |= {"errors": failed, "client": client, "seed": setup.seed, "notes": notes}
    document |= {"interrupted": done.interrupted, "server": _server(plan.at, done), "setup": _setup(setup, plan)}
    if beside is not None and reference is not None:
        document["beside"] = {"reference": beside, "rows": _beside(show, run, reference, beside)}
    if save is not None:
        from penstock.cli.show import writing
        from penstock.live.load.records import write_records

        with writing(save), open(save, "wb") as file:
            write_records(file, done.loop, result)
        show.wrote(save)
    if report is not None:
        from penstock.report.html import write_html

        write_html(report, {run.policy: result}, targets, {run.policy: run}, title=f"Penstock: {run.policy}")
        show.wrote(report)
    show.json(document)


def _beside(show: Show, run: RunMetrics, reference: dict[str, float], path: str) -> Any:
    import os

    from penstock.live.load.beside import beside, beside_table

    rows = beside(run, reference)
    show.print(beside_table(rows, "measured", os.path.basename(path)))
    return rows


def _remarks(client: ClientFigures) -> list[str]:
    """What a reader must know to read the figures right."""
    from penstock.live.load.replay import LATE_S
    from penstock.report.columns import seconds

    found = []
    lag = client.send_lag_s.p99
    if lag is not None and lag > LATE_S:
        found.append(
            f"WARNING: requests were sent late (P99 {seconds(lag)}, target {seconds(LATE_S)}): the load was not quite "
            "the trace's; free this machine, or split the load"
        )
    if client.held:
        found.append(
            f"{client.held:,} requests waited for a place under --concurrency (up to {seconds(client.held_max_s)}); "
            "their times count from when they got one"
        )
    if client.short:
        found.append(f"{client.short:,} answers ended before the output length asked for")
    if client.counted.keys() - {"token_ids"}:
        ways = {"token_ids": "by their ids", "usage": "by the server's usage", "chunks": "one for each chunk"}
        said = ", ".join(f"{ways[way]} in {count:,} requests" for way, count in client.counted.items())
        found.append(f"tokens were counted {said}; ITL is then the gap between chunks")
    return found


def _about_client(client: ClientFigures) -> str:
    from penstock.report.columns import seconds

    lag = client.send_lag_s
    parts = ["client:"]
    if lag.p50 is not None and lag.p99 is not None:
        parts.append(f"send lag {seconds(lag.p50)} P50, {seconds(lag.p99)} P99")
    parts.append("tokens counted by " + (", ".join(sorted(client.counted)) or "nothing: none came"))
    if client.cpu_us_per_token is not None:
        parts.append(f"{client.cpu_us_per_token:.1f} µs CPU a token")
    return parts[0] + " " + "; ".join(parts[1:])


def _server(at: Endpoint, done: Replay) -> dict[str, Any]:
    d = done.dialect
    return {
        "url": at.origin + at.prefix,
        "endpoint": at.kind,
        "model": done.served.id,
        "max_model_len": done.served.max_model_len,
        "prompt": d.form,
        "returns_token_ids": d.ids,
    }


def _setup(setup: Setup, plan: Plan) -> dict[str, Any]:
    """What the command line said."""
    from math import isfinite

    plain = setup.plain()
    kept = {key: plain[key] for key in ("workload", "slo", "slo_classes", "slo_form", "seed")}
    return kept | {
        "vocab": f"{plan.vocab[0]}-{plan.vocab[-1]}",
        "fresh": plan.fresh,
        "natural_end": plan.natural_end,
        "body": plan.body,
        "send_slo": plan.slos is not None,
        "concurrency": plan.concurrency,
        "timeout_s": plan.timeout_s if isfinite(plan.timeout_s) else None,
        "warmup": plan.warm_up,
    }
