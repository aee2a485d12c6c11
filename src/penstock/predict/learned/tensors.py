"""Reading and writing the safetensors format with numpy alone: float32 tensors, and a note in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.core.errors import PenstockError

F32 = NDArray[np.float32]

_TYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
_NOTE = "penstock"


def write_tensors(path: str | Path, tensors: Mapping[str, F32], note: Mapping[str, Any] | None = None) -> None:
    """Write tensors as float32.

    Parameters
    ----------
    path : str or Path
        File to write; its folder exists.
    tensors : mapping of name to float32 array
    note : mapping, optional
        Anything that JSON can say; :func:`read_note` gives it back.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _NOTE: json.dumps(note or {})}}
    at = 0
    for name, tensor in tensors.items():
        size = 4 * tensor.size
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    data = b"".join(np.ascontiguousarray(tensor, dtype="<f4").tobytes() for tensor in tensors.values())
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_tensors(path: str | Path) -> tuple[dict[str, F32], dict[str, Any]]:
    """All tensors as float32, and the note.

    Raises
    ------
    PenstockError
        There is no such file, or it is not one of ours.
    """
    try:
        raw = Path(path).read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:begin])
        note = json.loads(header.pop("__metadata__", {}).get(_NOTE, "{}"))
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            flat = np.frombuffer(raw[begin + start : begin + end], dtype=_TYPES[entry["dtype"]])
            tensors[name] = flat.astype(np.float32).reshape(entry["shape"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PenstockError(
            f"cannot read the tensors of {path} ({type(error).__name__}: {error})", "train it anew"
        ) from None
    return tensors, note
