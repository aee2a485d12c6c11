"""The table of ``simulate --repeat``: every figure as a mean over seeds with its interval."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.table import Table

from penstock.report.columns import number, percent, seconds
from penstock.report.repeat import RepeatedMetrics

SHARES = {"attainment": "SLO met", "ttft_attainment": "TTFT met", "tpot_attainment": "TPOT met"}
DURATIONS = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "itl_s": "ITL",
    "e2e_s": "E2E",
    "queueing_s": "Queueing",
    "decode_wait_s": "Decode wait",
    "migration_pause_s": "Migration pause",
}
LEVELS = ("mean", "p50", "p90", "p99")
COUNTS = {
    "goodput_rps": "Goodput, req/s",
    "throughput_rps": "Throughput, req/s",
    "output_tokens_per_s": "Output, tok/s",
    "preemptions": "Preemptions",
    "migrations": "Migrations",
    "flips": "Flips",
    "rejected": "Rejected",
    "unfinished": "Unfinished",
    "resident_cv": "Imbalance",
}


def repeated_table(repeated: RepeatedMetrics) -> Table:
    """One row a figure: mean, 95 % half-width, least and most over the seeds. Figures without a sample are left out."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption=f"{repeated.policy}, {repeated.repeats} seeds: means with 95 % confidence intervals (Student t).",
        caption_justify="left",
    )
    table.add_column("Figure")
    for title in ("mean", "±", "least", "most"):
        table.add_column(title, justify="right")
    for key, title in SHARES.items():
        _row(table, repeated, key, title, percent)
    for key, title in DURATIONS.items():
        for level in LEVELS:
            _row(table, repeated, f"{key}.{level}", f"{title} {level}", seconds)
    for key, title in COUNTS.items():
        _row(table, repeated, key, title, number)
    return table


def _row(table: Table, repeated: RepeatedMetrics, key: str, title: str, write: Callable[[float], str]) -> None:
    figure = repeated.figures.get(key)
    if figure is None:
        return
    within = figure.half_width
    alike = seconds(within, like=figure.mean) if write is seconds and within is not None and figure.mean else None
    spread = "–" if within is None else alike or write(within)
    table.add_row(title, write(figure.mean), spread, write(figure.min), write(figure.max))
