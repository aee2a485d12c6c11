"""BurstGPT: GPT-3.5 and GPT-4 traffic of a campus (HPMLL/BurstGPT, CC-BY-4.0)."""

from __future__ import annotations

from pathlib import Path

from penstock.workload.assemble import OnZero, assemble
from penstock.workload.table import Column, read_table
from penstock.workload.trace import Trace

COLUMNS = (
    Column("Timestamp", "seconds"),
    Column("Request tokens", "tokens"),
    Column("Response tokens", "tokens"),
)


def read(path: Path, *, on_zero: OnZero = "skip") -> Trace:
    """Read ``Timestamp,[Session ID,Elapsed time,]Model,Request tokens,Response tokens,Total tokens,Log Type``.

    Source: Wang et al., BurstGPT (arXiv 2401.17644). ``Timestamp`` is seconds, not from 0 in the later files. Failed
    requests have 0 response tokens: ``on_zero="skip"`` leaves them out and counts them in ``Trace.notes``.

    Raises
    ------
    PenstockError
        Naming file, line and reason of the first malformed row; see ``read_table`` and ``assemble``.
    """
    table = read_table(path, COLUMNS)
    return assemble(
        path,
        table.seconds("Timestamp"),
        table.tokens("Request tokens"),
        table.tokens("Response tokens"),
        line_of=table.line_of,
        on_zero=on_zero,
    )
