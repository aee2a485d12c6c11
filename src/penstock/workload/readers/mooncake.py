"""Mooncake traces: JSON lines with hashes of prompt blocks (FAST'25, Apache-2.0)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from penstock.core.errors import PenstockError
from penstock.workload.assemble import OnZero, assemble
from penstock.workload.files import read_bytes
from penstock.workload.jsonlines import decode_rows, ragged
from penstock.workload.trace import Trace

BLOCK_TOKENS = 512

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
_Hash = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class Row(msgspec.Struct):
    """One request; further fields are not looked at."""

    timestamp: float
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: list[_Hash] = []


def read(path: Path, *, on_zero: OnZero = "skip", block_tokens: int = BLOCK_TOKENS) -> Trace:
    """Read ``{"timestamp": ms, "input_length": .., "output_length": .., "hash_ids": [..]}`` per line.

    Source: Qin et al., Mooncake (FAST'25). ``timestamp`` is milliseconds; one hash stands for ``block_tokens`` prompt
    tokens (512 in the published files), the last one for a partly filled block. Without any ``hash_ids`` the trace has
    no prefixes.

    Raises
    ------
    PenstockError
        Naming file, line and reason of the first malformed row.
    """
    rows, lines = decode_rows(path, read_bytes(path), Row)
    if not rows:
        raise PenstockError(f"{path} holds no usable request", "give a trace with rows")
    prompt = np.array([row.input_length for row in rows], np.int64)
    hash_lists = [row.hash_ids for row in rows]
    counts = np.array([len(hashes) for hashes in hash_lists], np.int64)
    surplus = int(np.count_nonzero(counts > -(-prompt // block_tokens)))
    notes = () if not surplus else (f"{surplus} requests have more hashes than prompt blocks of {block_tokens} tokens",)
    return assemble(
        path,
        np.array([row.timestamp for row in rows], np.float64) / 1e3,
        prompt,
        np.array([row.output_length for row in rows], np.int64),
        line_of=lambda row: int(lines[row]),
        on_zero=on_zero,
        prefixes=ragged(hash_lists, block_tokens) if counts.any() else None,
        notes=notes,
    )
