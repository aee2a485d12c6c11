"""Reading the package's own catalogues, and errors that name close matches."""

from __future__ import annotations

import difflib
import json
from importlib.resources import files
from typing import Any

from penstock.core.errors import PenstockError

DTYPE_BYTES = {"fp32": 4.0, "tf32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "fp4": 0.5, "int4": 0.5}
"""Bytes of one number of each type."""


def dtype_bytes(dtype: str) -> float:
    """Bytes of one number of ``dtype``; raises :class:`PenstockError` for a type that is not in the table."""
    if dtype not in DTYPE_BYTES:
        raise unknown_name("number type", dtype, sorted(DTYPE_BYTES))
    return DTYPE_BYTES[dtype]


def catalogue_json(file: str) -> dict[str, Any]:
    """Contents of ``penstock/perf/catalogue/<file>``, a JSON object."""
    content = json.loads(files("penstock.perf").joinpath("catalogue", file).read_text())
    assert isinstance(content, dict)
    return content


def unknown_name(kind: str, name: str, known: list[str], also: str = "") -> PenstockError:
    """The error for a name that is not in a catalogue, with the nearest names (or all of them if none is near)."""
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    return PenstockError(f"unknown {kind} {name!r}", f"{hint} {also}".strip())
