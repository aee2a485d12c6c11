"""The figures that tables show: name, where it is found, how it reads, and which direction is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penstock.report.metrics import RunMetrics
from penstock.report.repeat import RepeatedMetrics, flatten

Metrics = RunMetrics | RepeatedMetrics
Cell = tuple[float, float | None]
"""A value and the half-width of its confidence interval, if repeated."""


@dataclass(frozen=True)
class Column:
    """One figure. ``key`` is its dotted name; ``better`` is +1 for more, -1 for less, 0 for neither."""

    key: str
    title: str
    write: Callable[[float], str]
    better: int = -1
    note: str = ""


def percent(x: float) -> str:
    """A share as percent, with the decimals that tell near-misses from 100 %."""
    if x in (0, 1):
        return f"{x:.0%}"
    return ">99.9%" if 0.9995 <= x < 1 else "<0.1%" if 0 < x < 0.0005 else f"{x:.1%}"


def seconds(x: float, like: float | None = None) -> str:
    """A duration with three digits: µs, ms, s, min or h; in the unit that suits ``like`` if given."""
    size = abs(x if like is None else like)
    if size == 0:
        return "0 s"
    for limit, unit, scale in ((0.9995e-3, "µs", 1e6), (0.9995, "ms", 1e3), (599.5, "s", 1.0), (35_970, "min", 1 / 60)):
        if size < limit:
            return f"{_digits(x * scale)} {unit}"
    return f"{_digits(x / 3600)} h"


def number(x: float) -> str:
    """A count or rate: thousands separated, three digits below 100."""
    return f"{x:,.0f}" if abs(x) >= 100 or x == int(x) else _digits(x)


def amount(x: float) -> str:
    """A count in short: 12.3k, 4.56M, 7.89G."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(x) >= limit:
            return f"{_digits(x / (limit if limit != 1e4 else 1e3))}{unit}"
    return number(x)


def _digits(x: float) -> str:
    size = abs(x)
    return (
        f"{x:,.0f}" if size >= 99.95 else f"{x:.1f}" if size >= 9.995 else f"{x:.2f}" if size >= 0.0995 else f"{x:.3g}"
    )


COMPARISON = (
    Column("attainment", "SLO met", percent, +1, "share of all requests that met TTFT and TPOT"),
    Column("goodput_rps", "Goodput req/s", number, +1, "requests that met every target per simulated second"),
    Column("ttft_s.p50", "TTFT p50", seconds),
    Column("ttft_s.p99", "TTFT p99", seconds),
    Column("tpot_s.p50", "TPOT p50", seconds),
    Column("tpot_s.p99", "TPOT p99", seconds),
    Column("itl_s.p99", "ITL p99", seconds),
    Column("e2e_s.p99", "E2E p99", seconds),
    Column("output_tokens_per_s", "Output tok/s", number, +1),
    Column("joules_per_token", "Energy J/tok", number, -1, "joules of all instances, idle ones too, per output token"),
    Column("preemptions", "Preempted", number),
    Column("migrations", "Migrated", number, 0),
    Column("flips", "Flips", number, 0),
    Column(
        "resident_cv", "Imbalance", number, -1, "coefficient of variation of resident tokens across decode instances"
    ),
)


COMPACT = tuple(c for c in COMPARISON if c.key not in ("ttft_s.p50", "tpot_s.p50", "e2e_s.p99"))
"""What fits a terminal 100 characters wide."""


def cells(metrics: Metrics, columns: Sequence[Column] = COMPARISON) -> list[Cell | None]:
    """The values of the columns, None where the run has no sample."""
    if isinstance(metrics, RepeatedMetrics):
        found = [metrics.figures.get(column.key) for column in columns]
        return [None if f is None else (f.mean, f.half_width) for f in found]
    flat = flatten(metrics)
    return [(flat[column.key], None) if column.key in flat else None for column in columns]


def write_cell(column: Column, cell: Cell | None, joint: str = " ± ") -> str:
    """A cell as text: ``97.1%``, ``41.2 ms ± 1.3 ms`` or a dash."""
    if cell is None:
        return "–"
    value, half_width = cell
    if half_width is None:
        return column.write(value)
    within = seconds(half_width, like=value) if column.write is seconds else column.write(half_width)
    return f"{column.write(value)}{joint}{within}"


def best(columns: Sequence[Column], rows: Sequence[Sequence[Cell | None]]) -> list[set[int]]:
    """For each column, the rows that read best; none where all read alike or where no direction is better."""
    winners: list[set[int]] = []
    for c, column in enumerate(columns):
        read = {i: (cell[0], column.write(cell[0])) for i, row in enumerate(rows) if (cell := row[c]) is not None}
        top = max((value * column.better for value, _ in read.values()), default=0.0)
        texts = {text for value, text in read.values() if value * column.better == top}
        won = {i for i, (_, text) in read.items() if text in texts}
        winners.append(won if column.better and len(rows) > 1 and len(won) < len(rows) else set())
    return winners
