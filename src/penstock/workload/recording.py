"""Our own recording: JSON lines, one request per line, after one line that names format, version and units.

::

    {"format":"penstock-recording","version":1,"units":{"arrival_s":"seconds since the first arrival",...},...}
    {"arrival_s":0.0,"prompt_tokens":374,"output_tokens":44,"slo_class":"chat"}
    {"arrival_s":0.25,"prompt_tokens":1024,"output_tokens":9,"slo_class":"chat","prefix":[17,18]}

The first line may name targets of its classes, ``"class_slos":{"chat":{"ttft_s":0.5,"tpot_s":0.04}}``; null is none.

Line-wise, so that a gateway can append while it runs and a crash costs at most the last line; text, so that a user can
grep it. Numbers are written in the shortest form that reads back to the same float64.
"""

from __future__ import annotations

import gzip
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Annotated, BinaryIO, cast

import msgspec
import numpy as np

from penstock.core.errors import PenstockError
from penstock.core.types import Slo
from penstock.workload.assemble import OnZero, assemble
from penstock.workload.files import read_bytes, row_error
from penstock.workload.jsonlines import decode_rows, ragged, reason
from penstock.workload.trace import Trace

FORMAT = "penstock-recording"
VERSION = 1
UNITS = {
    "arrival_s": "seconds since the first arrival",
    "prompt_tokens": "tokens",
    "output_tokens": "tokens",
    "prefix": "one hash per block_tokens leading prompt tokens",
}

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
_Hash = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class Targets(msgspec.Struct, forbid_unknown_fields=True):
    """An SLO as JSON can hold it: seconds, None for no target."""

    ttft_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    tpot_s: Annotated[float, msgspec.Meta(gt=0)] | None = None

    @classmethod
    def of(cls, slo: Slo) -> Targets:
        """From the form that the rest of the program holds."""
        return cls(*(x if math.isfinite(x) else None for x in (slo.ttft_s, slo.tpot_s)))

    def slo(self) -> Slo:
        """The inverse of :meth:`of`."""
        return Slo(*(math.inf if x is None else x for x in (self.ttft_s, self.tpot_s)))


class Header(msgspec.Struct, omit_defaults=True):
    """First line of a recording. ``requests`` is absent where the writer did not know the count in advance."""

    format: str = ""
    version: int = 0
    units: dict[str, str] = {}
    class_names: list[str] = []
    block_tokens: int | None = None
    requests: int | None = None
    source: str | None = None
    notes: list[str] = []
    class_slos: dict[str, Targets] = {}


class Row(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """One request."""

    arrival_s: float
    prompt_tokens: _Tokens
    output_tokens: _Tokens
    slo_class: str = "default"
    prefix: list[_Hash] = []


class RecordingWriter:
    """Appends requests to a recording as they finish, in any order of arrival; a context manager.

    Parameters
    ----------
    path : Path
        Overwritten; gzip-compressed where the name ends in ``.gz``.
    class_names : sequence of str
        Every SLO class that rows may name.
    block_tokens : int, optional
        Tokens per prefix hash, where rows carry hashes.
    requests : int, optional
        The number of rows to come, where known; a reader then notices a file that was cut short.
    """

    def __init__(
        self,
        path: Path,
        class_names: Sequence[str] = ("default",),
        *,
        block_tokens: int | None = None,
        requests: int | None = None,
        source: str | None = None,
        notes: Sequence[str] = (),
        class_slos: Mapping[str, Slo] | None = None,
    ) -> None:
        try:
            # filename="" and mtime=0 keep the bytes of equal recordings equal.
            file = path.open("wb")
        except OSError as error:
            raise PenstockError(f"cannot write {path} ({error.strerror})", "choose another place") from None
        self._raw = file
        gz = gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0) if _is_gz(path) else None
        self._file = file if gz is None else cast("BinaryIO", gz)
        self._classes = frozenset(class_names)
        self._encoder = msgspec.json.Encoder()
        own = {name: Targets.of(slo) for name, slo in (class_slos or {}).items()}
        header = Header(FORMAT, VERSION, UNITS, list(class_names), block_tokens, requests, source, list(notes), own)
        self._line(header)

    def write(self, row: Row) -> None:
        """Append one request; it reaches the operating system with the next ``flush`` or on close."""
        if row.slo_class not in self._classes:
            raise ValueError(f"class {row.slo_class!r} is not in the header")
        self._line(row)

    def flush(self) -> None:
        """Hand what is written so far to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Finish the file."""
        self._file.close()
        self._raw.close()

    def __enter__(self) -> RecordingWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _line(self, value: Header | Row) -> None:
        self._file.write(self._encoder.encode(value) + b"\n")


def write_recording(trace: Trace, path: Path | str) -> None:
    """Write a trace as a recording (``.gz`` compresses); ``read_recording`` gives back an equal trace.

    Raises
    ------
    PenstockError
        Where the file cannot be written.
    """
    prefixes = trace.prefixes
    columns = (trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist())
    classes = [trace.class_names[index] for index in trace.slo_class.tolist()]
    hashes: list[list[int]] | None = None
    if prefixes is not None:
        bounds, values = prefixes.offsets.tolist(), prefixes.values.tolist()
        hashes = [values[start:stop] for start, stop in itertools.pairwise(bounds)]
    with RecordingWriter(
        Path(path),
        trace.class_names,
        block_tokens=None if prefixes is None else prefixes.block_tokens,
        requests=len(trace),
        source=trace.source,
        notes=trace.notes,
        class_slos=trace.class_slos,
    ) as writer:
        for i, (arrival_s, prompt, output, slo_class) in enumerate(zip(*columns, classes, strict=True)):
            writer.write(Row(arrival_s, prompt, output, slo_class, [] if hashes is None else hashes[i]))


def read_recording(path: Path | str, *, on_zero: OnZero = "skip") -> Trace:
    """Read a recording.

    A last line without its line break that is not whole JSON is a recorder that was killed: it is left out and a note
    says so. Any other malformed line is an error.

    Raises
    ------
    PenstockError
        Naming file, line and reason; also for a newer version, an unknown class, or fewer rows than announced.
    """
    path = Path(path)
    first, _, body = read_bytes(path).partition(b"\n")
    header = _header(path, first)
    notes = list(header.notes)
    if header.requests is None and (cut := _half_line(body)):
        body = body[:-cut]
        notes.append("left out the last line, which was cut short")
    rows, lines = decode_rows(path, body, Row, first_line=2)
    if header.requests is not None and header.requests != len(rows):
        raise PenstockError(
            f"{path} announces {header.requests} requests and holds {len(rows)}", "record or copy again"
        )
    if not rows:
        raise PenstockError(f"{path} has a header but no requests", "give a recording with requests")
    index = {name: i for i, name in enumerate(header.class_names)}
    for row, line in zip(rows, lines, strict=True):
        if row.slo_class not in index:
            known = ", ".join(header.class_names)
            raise row_error(path, int(line), f'slo_class "{row.slo_class}" is not in the header ({known})')
        if row.prefix and header.block_tokens is None:
            raise row_error(path, int(line), "prefix hashes, but the header has no block_tokens", "fix the header")
    trace = assemble(
        path,
        np.array([row.arrival_s for row in rows], np.float64),
        np.array([row.prompt_tokens for row in rows], np.int64),
        np.array([row.output_tokens for row in rows], np.int64),
        line_of=lambda row: int(lines[row]),
        on_zero=on_zero,
        slo_class=np.array([index[row.slo_class] for row in rows], np.int16),
        class_names=tuple(header.class_names),
        prefixes=None if header.block_tokens is None else ragged([row.prefix for row in rows], header.block_tokens),
        source=header.source,
        notes=tuple(notes),
    )
    own = {name: targets.slo() for name, targets in header.class_slos.items() if name in index}
    return replace(trace, class_slos=own) if own else trace


def _header(path: Path, line: bytes) -> Header:
    try:
        header = msgspec.json.decode(line, type=Header)
    except msgspec.MsgspecError as error:
        raise row_error(path, 1, f"not the header of a recording ({reason(error)})", "restore the first line") from None
    if header.format != FORMAT:
        raise row_error(path, 1, f'format is "{header.format}", expected "{FORMAT}"', "restore the first line")
    if header.version != VERSION:
        raise row_error(path, 1, f"version {header.version}, this release reads {VERSION}", "update penstock")
    if not header.class_names or (header.block_tokens is not None and header.block_tokens < 1):
        raise row_error(path, 1, "class_names is empty or block_tokens below 1", "restore the first line")
    return header


def _half_line(body: bytes) -> int:
    """Bytes of an unfinished last line, 0 where the last line is whole."""
    last = body.rpartition(b"\n")[2]
    if not last.strip():
        return 0
    try:
        msgspec.json.decode(last)
    except msgspec.DecodeError:
        return len(last)
    return 0


def _is_gz(path: Path) -> bool:
    return path.suffix == ".gz"
