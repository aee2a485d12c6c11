"""A measured run beside another one, figure by figure: how far a simulation is from the real thing, say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.table import Table

from penstock.core.errors import PenstockError
from penstock.report.columns import Column, number, percent, seconds
from penstock.report.metrics import RunMetrics
from penstock.report.repeat import flatten

COLUMNS = (
    *(
        Column(f"{key}.{level}", f"{title} {level}", seconds)
        for key, title in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL"), ("e2e_s", "E2E"))
        for level in ("mean", "p50", "p90", "p99")
    ),
    Column("attainment", "SLO met", percent),
    Column("throughput_rps", "Throughput req/s", number),
    Column("goodput_rps", "Goodput req/s", number),
    Column("output_tokens_per_s", "Output tok/s", number),
    Column("finished", "Finished", number),
)


class Row(msgspec.Struct, frozen=True):
    """One figure of both runs. ``error`` is reference / measured - 1: how far the reference is off."""

    key: str
    measured: float | None
    reference: float | None
    error: float | None


def read_reference(path: str) -> dict[str, float]:
    """The numbers of a results object (``simulate --json``, ``bench --json``) under their dotted names.

    Raises
    ------
    PenstockError
        The file cannot be read, or holds no results.
    """
    try:
        content = msgspec.json.decode(Path(path).read_bytes())
    except OSError as error:
        raise PenstockError(f"cannot read {path} ({error.strerror})", "give the --json file of a run") from None
    except msgspec.MsgspecError as error:
        raise PenstockError(f"{path} is not JSON ({error})", "give the --json file of a run") from None
    found: dict[str, float] = {}
    if isinstance(content, dict):
        _walk("", content, found)
    if "ttft_s.count" not in found:
        raise PenstockError(f"{path} holds no figures of a run", "give what penstock simulate or bench --json wrote")
    return found


def beside(run: RunMetrics, reference: dict[str, float]) -> list[Row]:
    """The figures of both runs, those left out that neither has."""
    mine, rows = flatten(run), []
    for column in COLUMNS:
        measured, other = mine.get(column.key), reference.get(column.key)
        if measured is None and other is None:
            continue
        error = other / measured - 1 if measured and other is not None else None
        rows.append(Row(column.key, measured, other, error))
    return rows


def beside_table(rows: list[Row], measured: str, reference: str) -> Table:
    """The rows as a table; what differs by more than 10 % is red."""
    columns = {column.key: column for column in COLUMNS}
    caption = "Error: the reference against what was measured."
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("Figure")
    for title in (measured, reference, "error"):
        table.add_column(title, justify="right", overflow="fold")
    for row in rows:
        column = columns[row.key]
        values = ["–" if x is None else column.write(x) for x in (row.measured, row.reference)]
        error = "–" if row.error is None else f"{row.error:+.1%}"
        table.add_row(column.title, *values, error, style="red" if abs(row.error or 0) > 0.1 else None)
    return table


def _walk(prefix: str, value: Any, found: dict[str, float]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _walk(f"{prefix}.{key}" if prefix else str(key), inner, found)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        found[prefix] = float(value)
