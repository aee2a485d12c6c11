"""JSON lines as typed rows, with the line number wherever a row is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from penstock.workload.files import row_error
from penstock.workload.trace import I64, PrefixHashes

Row = TypeVar("Row")


def decode_rows(path: Path, data: bytes, row_type: type[Row], first_line: int = 1) -> tuple[list[Row], I64]:
    """Every non-blank line decoded as ``row_type``.

    Parameters
    ----------
    data : bytes
        The lines; ``path`` is only for messages.
    first_line : int
        Line number of the first line of ``data``.

    Returns
    -------
    rows, lines
        The decoded rows and the 1-based line of each, int64[n].

    Raises
    ------
    PenstockError
        Naming file, line and reason of the first row that is not JSON or not of the type.
    """
    decoder = msgspec.json.Decoder(row_type)
    rows: list[Row] = []
    lines: list[int] = []
    for line, text in enumerate(data.split(b"\n"), first_line):
        stripped = text.strip()
        if not stripped:
            continue
        try:
            rows.append(decoder.decode(stripped))
        except msgspec.MsgspecError as error:
            raise row_error(path, line, reason(error)) from None
        lines.append(line)
    return rows, np.array(lines, dtype=np.int64)


def reason(error: msgspec.MsgspecError) -> str:
    """The message of msgspec with the field first: ``output_length: expected `int` >= 0``."""
    text, _, where = str(error).partition(" - at `$.")
    text = text[:1].lower() + text[1:]
    return f"{where.rstrip('`')}: {text}" if where else text.replace("JSON is", "the JSON is").replace("jSON", "JSON")


def ragged(lists: Sequence[Sequence[int]], block_tokens: int) -> PrefixHashes:
    """Per-request hash lists as one ``PrefixHashes``."""
    offsets = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(hashes) for hashes in lists], out=offsets[1:])
    values = np.fromiter(chain.from_iterable(lists), np.int64, count=int(offsets[-1]))
    return PrefixHashes(values, offsets, block_tokens)
