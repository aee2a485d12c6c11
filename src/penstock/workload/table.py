"""CSV columns as arrays: polars on the fast path, a row-by-row reader wherever anything looks odd.

Both paths accept the same files and give the same arrays (a test compares them). The slow path exists because a
column-wise parser knows *that* a value is wrong, and the user needs to know on which line and why.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from penstock.core.errors import PenstockError
from penstock.workload.files import read_bytes, row_error
from penstock.workload.trace import F64, I64

if TYPE_CHECKING:
    import polars as pl

Kind = Literal["tokens", "seconds", "timestamp"]

_MAX_TOKENS = 2**40  # far above any context, far below where a float64 stops being exact


@dataclass(frozen=True)
class Column:
    """One column to read: its header and how its text is to be understood.

    ``tokens`` is a whole number >= 0, ``seconds`` any finite number, ``timestamp`` a date and time (taken as UTC
    where it names no offset) with up to nine decimals.
    """

    name: str
    kind: Kind


@dataclass(frozen=True)
class Table:
    """Columns in file order. ``tokens`` are int64[n], ``seconds`` float64[n], ``timestamp`` int64[n] nanoseconds."""

    columns: dict[str, F64 | I64]
    lines: I64 | None  # line of each row, where it is not simply row + 2

    def line_of(self, row: int) -> int:
        """1-based line of the file for a 0-based row."""
        return row + 2 if self.lines is None else int(self.lines[row])

    def tokens(self, name: str) -> I64:
        """A ``tokens`` or ``timestamp`` column, int64[n]."""
        return self.columns[name].astype(np.int64, copy=False)

    def seconds(self, name: str) -> F64:
        """A ``seconds`` column, float64[n]."""
        return self.columns[name].astype(np.float64, copy=False)


def header_fields(line: str) -> list[str]:
    """Fields of a CSV header, stripped."""
    return [field.strip() for field in next(csv.reader([line]), [])]


def read_table(path: Path, columns: Sequence[Column], *, fast: bool = True) -> Table:
    """Read the named columns (matched without regard to case) of a CSV file with a header line.

    Blank lines hold no request and are passed over; every other line becomes a row or an error.

    Raises
    ------
    PenstockError
        Naming file, line and reason: a value of the wrong kind, NaN, a negative length, a short or long row, a missing
        or repeated column, a header without rows.
    """
    data = read_bytes(path)
    if fast:
        table = _read_fast(data, columns)
        if table is not None:
            return table
    return _read_rows(path, data.decode("utf-8"), columns)


def _read_fast(data: bytes, columns: Sequence[Column]) -> Table | None:
    """The whole table at once, or None where a line-by-line look is needed."""
    import polars as pl  # 0.25 s: only who reads a file pays

    try:
        frame = pl.read_csv(data, infer_schema=False)
    except (pl.exceptions.PolarsError, UnicodeDecodeError):
        return None
    names = [name.strip().lower() for name in frame.columns]
    wanted = [column.name.lower() for column in columns]
    if any(names.count(name) != 1 for name in wanted) or any("_duplicated_" in name for name in names):
        return None
    # Equality rules out blank lines and line breaks inside quotes, so that row i is line i + 2.
    text_lines = data.count(b"\n") + (not data.endswith(b"\n"))
    if frame.height == 0 or frame.height + 1 != text_lines:
        return None
    out: dict[str, F64 | I64] = {}
    for column, name in zip(columns, wanted, strict=True):
        series = _parse_series(frame.to_series(names.index(name)), column.kind)
        if series is None:
            return None
        out[column.name] = series
    return Table(out, None)


def _parse_series(text: pl.Series, kind: Kind) -> F64 | I64 | None:
    import polars as pl

    text = text.str.strip_chars()
    if kind == "timestamp":
        plain = text.str.strip_suffix("+00:00").str.strip_suffix("Z").str.replace("T", " ", literal=True)
        when = plain.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", strict=False, time_unit="ns").cast(pl.Int64)
        if when.null_count() or plain.str.contains(r"^(1[7-9]|20|21)\d\d-").not_().any():
            return None
        return when.to_numpy().astype(np.int64)
    numbers = text.cast(pl.Float64, strict=False)
    if numbers.null_count():
        return None
    values = numbers.to_numpy().astype(np.float64)
    if not np.isfinite(values).all():
        return None
    if kind == "seconds":
        return values
    if values.min() < 0 or values.max() > _MAX_TOKENS or np.any(values != np.floor(values)):
        return None
    return values.astype(np.int64)


def _read_rows(path: Path, text: str, columns: Sequence[Column]) -> Table:
    """Row by row: the authority on what is accepted, and on the line where it is not."""
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        header = [field.strip() for field in next((fields for fields in reader if fields), [])]
        where = _locate(path, header, columns)
        values: list[list[float]] = [[] for _ in columns]
        lines: list[int] = []
        last = reader.line_num
        for fields in reader:
            line, last = last + 1, reader.line_num  # a quoted field may span lines: report the first one
            if not fields or (len(fields) == 1 and not fields[0].strip()):
                continue
            if len(fields) > len(header):
                raise row_error(path, line, f"the row has {len(fields)} fields, the header {len(header)}")
            for column, index, out in zip(columns, where, values, strict=True):
                if index >= len(fields):
                    raise row_error(path, line, f"the row has {len(fields)} fields, {column.name} is missing")
                try:
                    out.append(_parse(fields[index].strip(), column.kind))
                except ValueError as error:
                    raise row_error(path, line, f'{column.name} is "{fields[index]}", {error}') from None
            lines.append(line)
    except csv.Error as error:
        raise row_error(path, reader.line_num, f"not valid CSV ({error})") from None
    if not lines:
        raise PenstockError(f"{path} has a header but no rows", "give a trace with rows")
    arrays: dict[str, F64 | I64] = {}
    for column, out in zip(columns, values, strict=True):
        arrays[column.name] = (
            np.array(out, dtype=np.float64) if column.kind == "seconds" else np.array(out, dtype=np.int64)
        )
    return Table(arrays, np.array(lines, dtype=np.int64))


def _locate(path: Path, header: list[str], columns: Sequence[Column]) -> list[int]:
    lowered = [name.lower() for name in header]
    where = []
    for column in columns:
        count = lowered.count(column.name.lower())
        if count != 1:
            problem = f'the header has no column "{column.name}"' if count == 0 else f'column "{column.name}" repeats'
            raise row_error(path, 1, f"{problem} (it has {', '.join(header)})", "fix the header")
        where.append(lowered.index(column.name.lower()))
    return where


def _parse(text: str, kind: Kind) -> float:
    """One value; ValueError says what was expected."""
    if kind == "timestamp":
        return _nanoseconds(text)
    expected = "a whole number of tokens, 0 or more" if kind == "tokens" else "a number of seconds"
    try:
        # Python would take 1_000 and non-ASCII digits, which no other reader does.
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"expected {expected}")
    if kind == "seconds":
        return value
    if value < 0 or value != math.floor(value) or value > _MAX_TOKENS:
        raise ValueError(f"expected {expected}")
    return int(value)


def _nanoseconds(text: str) -> int:
    """Nanoseconds since 1970 of an ISO date and time; Python's own parser keeps only six decimals."""
    whole, dot, rest = text.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    try:
        if len(whole) < len("2023-11-16 18:15:46") or (dot and not digits) or len(digits) > 9:
            raise ValueError
        when = datetime.fromisoformat(whole + rest[len(digits) :])
        if not 1700 <= when.year <= 2200:  # beyond, nanoseconds do not fit 64 bits
            raise ValueError
    except ValueError:
        raise ValueError("expected a date and time such as 2023-11-16 18:15:46.6805900") from None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    since = when - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86400 + since.seconds) * 10**9 + int(digits.ljust(9, "0") or "0")
