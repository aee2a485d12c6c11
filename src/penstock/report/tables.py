"""Tables for the terminal: one run, several policies side by side, goodput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from penstock.report.columns import (
    COMPACT,
    Column,
    Metrics,
    amount,
    best,
    cells,
    number,
    percent,
    seconds,
    write_cell,
)
from penstock.report.metrics import InstanceMetrics, RunMetrics, Spread
from penstock.report.words import conclude, missed_target

GOAL = 0.9
"""Attainment that the field asks for; below it a table shows red."""
SHOW_INSTANCES = 16
"""Instances listed one by one; of a larger cluster the busiest are."""
EXPENDABLE = (
    "itl_s.p99",
    "joules_per_token",
    "output_tokens_per_s",
    "flips",
    "resident_cv",
    "preemptions",
    "migrations",
    "goodput_rps",
)
"""Columns that a narrow terminal does without, the first to go first."""


class GoodputRow(msgspec.Struct, frozen=True):
    """The highest rate a policy sustains.

    ``goodput_rps`` is the highest request rate with attainment of at least the goal (None: not even the lowest rate
    tried), ``attainment`` the attainment there, ``limit`` the target that is missed first above it ("TTFT", "TPOT").
    ``half_width_rps`` is a 95 % confidence half-width if repeated.
    """

    policy: str
    goodput_rps: float | None
    attainment: float | None
    instances: int
    limit: str = ""
    half_width_rps: float | None = None


def run_table(run: RunMetrics) -> RenderableType:
    """One run: a sentence, latencies, SLO classes, and what every instance did (where that was seen)."""
    parts: list[RenderableType] = [_head(run), _latency_table(run), _class_table(run)]
    if run.instances:
        parts.append(_instance_table(run))
    counts = [("throughput", f"{number(run.throughput_rps)} req/s"), ("goodput", f"{number(run.goodput_rps)} req/s")]
    counts += [("output", f"{number(run.output_tokens_per_s)} tok/s")]
    if run.preemptions is not None:
        counts += [("preemptions", number(run.preemptions))]
    if run.migrations is not None:
        counts += [("migrations", f"{number(run.migrations)} ({amount(run.migrated_tokens or 0)} tokens)")]
    if run.flips is not None:
        counts += [("flips", number(run.flips))]
    if run.resident_cv is not None:
        counts.append(("imbalance", number(run.resident_cv)))
    if run.joules_per_request is not None and run.joules_per_token is not None:
        a_token = f"{number(run.joules_per_token)} J/tok"
        counts.append(("energy", f"{number(run.joules_per_request)} J/request, {a_token}"))
    if run.finetune_tokens_per_s is not None:
        counts.append(("fine-tuned", f"{number(run.finetune_tokens_per_s)} tok/s"))
    counts += [(f"rejected: {reason}", number(n)) for reason, n in run.reject_reasons.items()]
    counts += [(f"migration failed: {reason}", number(n)) for reason, n in (run.failed_migrations or {}).items()]
    line = Text("  ").join([Text.assemble((f"{name} ", "dim"), value) for name, value in counts])
    return Group(*parts, line, Text(_took(run), style="dim"))


def comparison_table(
    runs: Mapping[str, Metrics], columns: Sequence[Column] = COMPACT, width: int | None = None
) -> Table:
    """One row a run under its name, the best value of each column in bold green; ± is a 95 % interval over seeds.

    Where that is wider than ``width`` characters, columns are left out, the least telling first, and the caption says
    which.
    """
    table = _comparison(runs, columns, [])
    left_out: list[Column] = []
    for key in EXPENDABLE:
        if width is None or _width(table) <= width:
            break
        found = [c for c in columns if c.key == key]
        if not found or not any(_tells(cells(metrics, found)[0]) for metrics in runs.values()):
            continue
        left_out += found
        columns = [c for c in columns if c.key != key]
        table = _comparison(runs, columns, left_out)
    return table


def _width(table: Table) -> int:
    console = Console(width=1000)
    return Measurement.get(console, console.options, table).maximum


def _comparison(runs: Mapping[str, Metrics], columns: Sequence[Column], left_out: Sequence[Column]) -> Table:
    rows = {name: cells(metrics, columns) for name, metrics in runs.items()}
    keep = [c for c in range(len(columns)) if any(_tells(row[c]) for row in rows.values()) or c < 2]
    columns = [columns[c] for c in keep]
    rows = {name: [row[c] for c in keep] for name, row in rows.items()}
    winners = best(columns, list(rows.values()))
    caption = f"No room for {', '.join(c.title for c in left_out)}: widen the terminal." if left_out else None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption=caption, caption_justify="left")
    table.add_column("Policy", no_wrap=True)
    for column in columns:
        table.add_column(column.title.replace(" ", "\n", 1), justify="right", no_wrap=True)
    table.add_column("Missed\nmost")
    for i, (name, row) in enumerate(rows.items()):
        written = [
            Text(write_cell(column, cell, "\n± "), style="bold green" if i in winners[c] else "")
            for c, (column, cell) in enumerate(zip(columns, row, strict=True))
        ]
        table.add_row(Text(name, style="bold"), *written, missed_target(runs[name]) or "nothing")
    return table


def plain_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows of text under their heads, the first column to the left."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, title in enumerate(titles):
        table.add_column(title.replace(" ", "\n", 1), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def goodput_table(rows: Sequence[GoodputRow], goal: float = GOAL) -> Table:
    """Highest sustained rate by policy, with a bar and the rate per instance; the best in bold green."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption=f"Goodput: the highest request rate with attainment of at least {goal:.0%}.",
        caption_justify="left",
    )
    table.add_column("Policy", no_wrap=True)
    for title in ("Goodput\nreq/s", "per\ninstance", "SLO met\nthere"):
        table.add_column(title, justify="right")
    table.add_column("")
    table.add_column("Limited\nby")
    top = max((row.goodput_rps or 0.0 for row in rows), default=0.0)
    for row in rows:
        rate = row.goodput_rps
        style = "bold green" if rate is not None and rate == top and len(rows) > 1 else ""
        written = "none" if rate is None else number(rate)
        if rate is not None and row.half_width_rps is not None:
            written += f" ± {number(row.half_width_rps)}"
        table.add_row(
            Text(row.policy, style="bold"),
            Text(written, style=style),
            "–" if rate is None or not row.instances else number(rate / row.instances),
            "–" if row.attainment is None else percent(row.attainment),
            Text("█" * round(20 * (rate or 0) / top) if top else "", style="blue"),
            row.limit or "–",
        )
    return table


def _head(run: RunMetrics) -> Text:
    said = conclude(run)
    if run.slo_form == "deadline":
        said += " Every token has its deadline, arrival + TTFT + i TPOT."
    return Text(said, style="bold " + ("green" if run.attainment >= GOAL else "red"))


def _took(run: RunMetrics) -> str:
    if run.events is None:
        return f"measured over {seconds(run.simulated_seconds)}"
    return f"{seconds(run.simulated_seconds)} simulated in {seconds(run.wall_seconds)}, {run.events:,} events"


def _latency_table(run: RunMetrics) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Latency")
    for title in ("mean", "p50", "p90", "p95", "p99", "max"):
        table.add_column(title, justify="right")
    rows = {"TTFT": run.ttft_s, "TPOT": run.tpot_s, "ITL": run.itl_s, "E2E": run.e2e_s}
    if run.instances:
        rows |= {"Queueing": run.queueing_s, "Decode wait": run.decode_wait_s}
    if run.lateness_s is not None:
        rows["Lateness"] = run.lateness_s
    if run.migrations:
        rows["Migration pause"] = run.migration_pause_s
    for name, spread in rows.items():
        table.add_row(name, *_spread(spread))
    return table


def _spread(s: Spread) -> list[str]:
    return ["–" if x is None else seconds(x) for x in (s.mean, s.p50, s.p90, s.p95, s.p99, s.max)]


def _class_table(run: RunMetrics) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("SLO class")
    titles = ("requests", "SLO met", "TTFT met", "TTFT target", "TTFT p99", "TPOT met", "TPOT target", "TPOT p99")
    for title in titles:
        table.add_column(title.replace(" ", "\n", 1), justify="right", no_wrap=True)
    rejects = any(c.rejected for c in run.classes.values())
    if rejects:
        table.add_column("re-\njected", justify="right", no_wrap=True)
    for name, c in run.classes.items():
        table.add_row(
            name,
            number(c.requests),
            _share(c.attainment),
            _share(c.ttft_attainment),
            "none" if c.ttft_target_s is None else seconds(c.ttft_target_s),
            "–" if c.ttft_s.p99 is None else seconds(c.ttft_s.p99),
            _share(c.tpot_attainment),
            "none" if c.tpot_target_s is None else seconds(c.tpot_target_s),
            "–" if c.tpot_s.p99 is None else seconds(c.tpot_s.p99),
            *([number(c.rejected)] if rejects else []),
        )
    return table


def _share(x: float | None) -> Text:
    return Text("–") if x is None else Text(percent(x), style="green" if x >= GOAL else "red")


def _instance_table(run: RunMetrics) -> Table:
    some = run.instances
    caption = None
    if len(some) > SHOW_INSTANCES:
        caption = f"The {SHOW_INSTANCES} busiest of {len(some)} instances."
        some = sorted(some, key=lambda i: -i.busy_share)[:SHOW_INSTANCES]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption=caption, caption_justify="left")
    table.add_column("Instance", no_wrap=True)
    titles = (
        "busy",
        "peak KV",
        "steps",
        "prefill tok",
        "decode tok",
        "pre- empt",
        "GB in",
        "GB out",
        "TTFT miss",
        "TPOT miss",
    )
    for title in titles:
        table.add_column(title.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for i in some:
        table.add_row(*_instance_row(i))
    return table


def _instance_row(i: InstanceMetrics) -> list[str]:
    counts = [amount(x) for x in (i.steps, i.prefill_tokens, i.decode_tokens, i.preemptions)]
    moved = [number(round(x / 1e9, 3)) for x in (i.bytes_in, i.bytes_out)]
    peak = "–" if i.peak_kv_share is None else percent(i.peak_kv_share)
    return [
        f"{i.instance} {i.role}",
        percent(i.busy_share),
        peak,
        *counts,
        *moved,
        number(i.ttft_misses),
        number(i.tpot_misses),
    ]


def _tells(cell: tuple[float, float | None] | None) -> bool:
    return cell is not None and cell[0] != 0
