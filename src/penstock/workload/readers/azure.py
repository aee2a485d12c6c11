"""Azure LLM inference traces, 2023 and 2024 (Azure Public Dataset, CC-BY-4.0)."""

from __future__ import annotations

from pathlib import Path

from penstock.workload.assemble import OnZero, assemble
from penstock.workload.table import Column, read_table
from penstock.workload.trace import Trace

COLUMNS = (
    Column("TIMESTAMP", "timestamp"),
    Column("ContextTokens", "tokens"),
    Column("GeneratedTokens", "tokens"),
)


def read(path: Path, *, on_zero: OnZero = "skip") -> Trace:
    """Read ``TIMESTAMP,ContextTokens,GeneratedTokens``; time becomes seconds since the first request.

    Source: Splitwise (ISCA'24, 2023 files) and DynamoLLM (HPCA'25, 2024 files). ``TIMESTAMP`` is wall time with up to
    seven decimals (100 ns), with or without ``+00:00``.

    Raises
    ------
    PenstockError
        Naming file, line and reason of the first malformed row; see ``read_table`` and ``assemble``.
    """
    table = read_table(path, COLUMNS)
    when_ns = table.tokens("TIMESTAMP")
    # Subtract before converting: nanoseconds since 1970 do not fit a float64 exactly.
    time_s = (when_ns - when_ns.min()) / 1e9
    return assemble(
        path,
        time_s,
        table.tokens("ContextTokens"),
        table.tokens("GeneratedTokens"),
        line_of=table.line_of,
        on_zero=on_zero,
    )
