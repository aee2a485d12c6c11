"""The event log: what the controller was told, when, and what it answered. JSON lines, one event a line.

::

    {"format":"penstock-events","version":1,"units":{"t":"seconds",...},"setup":{...},"class_names":["default"],...}
    {"t":0.0,"event":{"type":"InstanceUp","instance":0,...},"actions":[]}
    {"t":0.25,"event":{"type":"RequestArrived","request":0,...},"actions":[{"type":"Prefill","request":0,"instance":1}]}

The header says with what the controller was built (``setup``, whose fields belong to whoever wrote the log), so a log
is a complete experiment: ``penstock replay`` feeds the events to a fresh controller and compares the actions, byte for
byte. Floats are written in the shortest form that reads back to the same float64; an infinite target is ``null``.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import msgspec

from penstock.core.actions import Action, AnyAction
from penstock.core.errors import PenstockError
from penstock.core.events import (
    Aborted,
    DecodeStarted,
    Event,
    Finished,
    FlipOrdered,
    InstanceDown,
    InstanceHeld,
    InstanceSlow,
    InstanceUp,
    Interrupted,
    MigrationDone,
    MigrationFailed,
    MoveOrdered,
    PolicyChosen,
    Preempted,
    PrefillDone,
    RequestArrived,
    Tick,
)
from penstock.core.types import Slo

FORMAT = "penstock-events"
VERSION = 1
UNITS = {
    "t": "seconds on the controller's clock",
    "*_s": "seconds",
    "*_tokens": "tokens",
    "*_blocks": "KV blocks of block_size tokens",
    "predicted_remaining": "tokens, -1 where the world predicts nothing",
    "slo": "seconds, null for no target",
}


class Header(msgspec.Struct, frozen=True):
    """First line of a log.

    ``setup`` rebuilds the controller (for logs of ``penstock simulate``: :class:`penstock.experiment.setup.Setup`).
    ``class_names`` names the SLO classes; ``block_tokens`` is the number of prompt tokens under one prefix hash.
    ``penstock`` is the release that wrote it; ``files`` holds the SHA-256 of files that the setup names, by path.
    """

    format: str = FORMAT
    version: int = VERSION
    penstock: str = ""
    units: dict[str, str] = msgspec.field(default_factory=lambda: dict(UNITS))
    setup: dict[str, Any] = {}
    seed: int = 0
    class_names: tuple[str, ...] = ("default",)
    block_tokens: int | None = None
    source: str = ""
    files: dict[str, str] = {}


class Entry(msgspec.Struct, frozen=True):
    """One line, read back: at ``t`` seconds the event, and the bytes of the recorded list of actions."""

    t: float
    event: Event
    actions: bytes
    line: int


class _WrittenSlo(msgspec.Struct):
    ttft_s: float | None = None
    tpot_s: float | None = None


class _WrittenArrival(msgspec.Struct, tag="RequestArrived"):
    """An arrival as JSON can hold it: there is no infinity."""

    request: int
    prompt_tokens: int
    slo: _WrittenSlo
    slo_class: int = 0
    prefix: tuple[int, ...] = ()
    movable: bool = True
    in_place: bool = False

    def read(self) -> RequestArrived:
        endless = float("inf")
        ttft_s, tpot_s = self.slo.ttft_s, self.slo.tpot_s
        slo = Slo(endless if ttft_s is None else ttft_s, endless if tpot_s is None else tpot_s)
        return RequestArrived(
            self.request, self.prompt_tokens, slo, self.slo_class, self.prefix, self.movable, self.in_place
        )


_WrittenEvent = (
    _WrittenArrival
    | PrefillDone
    | DecodeStarted
    | Finished
    | Aborted
    | Preempted
    | MigrationDone
    | MigrationFailed
    | MoveOrdered
    | Interrupted
    | InstanceHeld
    | FlipOrdered
    | PolicyChosen
    | InstanceUp
    | InstanceDown
    | InstanceSlow
    | Tick
)


class _Line(msgspec.Struct):
    t: float
    event: _WrittenEvent
    actions: msgspec.Raw


class _Written(msgspec.Struct):
    t: float
    event: Event
    actions: Sequence[Action]


_ENCODER = msgspec.json.Encoder()
_ACTIONS = msgspec.json.Decoder(list[AnyAction])


def encode_actions(actions: Sequence[Action]) -> bytes:
    """The actions as they stand in a log; equal bytes mean equal actions in equal order."""
    return _ENCODER.encode(actions)


def decode_actions(text: bytes) -> list[AnyAction]:
    """The other way."""
    return _ACTIONS.decode(text)


class EventLog:
    """Writes a log; a context manager. Give it to ``simulate(log=...)``.

    Parameters
    ----------
    path : Path or str
        Overwritten; gzip-compressed where the name ends in ``.gz``. Equal logs are equal files.
    header : Header

    Raises
    ------
    PenstockError
        The file cannot be opened for writing.
    """

    def __init__(self, path: Path | str, header: Header) -> None:
        path = Path(path)
        try:
            self._raw = path.open("wb")
        except OSError as error:
            raise PenstockError(f"cannot write {path} ({error.strerror})", "choose another place") from None
        self._file: BinaryIO = self._raw
        if path.suffix == ".gz":
            packed = gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=self._raw, mtime=0)
            self._file = cast("BinaryIO", packed)
        self._file.write(_ENCODER.encode(header) + b"\n")

    def write(self, now: float, event: Event, actions: Sequence[Action]) -> None:
        """Append one event at ``now`` seconds and the controller's answer to it."""
        self._file.write(_ENCODER.encode(_Written(now, event, actions)) + b"\n")

    def close(self) -> None:
        """Finish the file."""
        self._file.close()
        self._raw.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class LogReader:
    """Reads a log: ``header`` at once, entries by iterating (once).

    Raises
    ------
    PenstockError
        The file is missing, damaged or not a log; iterating: a malformed line, with its number. A last line without its
        line break that is not whole is a recorder that was killed: it is left out, and ``cut`` says so.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.cut = False
        try:
            self._raw = self.path.open("rb")
        except OSError as error:
            raise PenstockError(f"cannot read {self.path} ({error.strerror})", "give the path of a log") from None
        packed = self._raw.read(2) == b"\x1f\x8b"
        self._raw.seek(0)
        self._file = cast("BinaryIO", gzip.GzipFile(fileobj=self._raw)) if packed else self._raw
        self.header = self._header()

    def __iter__(self) -> Iterator[Entry]:
        decoder = msgspec.json.Decoder(_Line)
        try:
            for number, text in enumerate(self._file, 2):
                try:
                    line = decoder.decode(text)
                except msgspec.MsgspecError as error:
                    if not text.endswith(b"\n"):
                        self.cut = True
                        return
                    raise self._problem(number, str(error)) from None
                event = line.event
                read = event.read() if isinstance(event, _WrittenArrival) else event
                yield Entry(line.t, read, bytes(line.actions), number)
        except (OSError, EOFError) as error:
            raise PenstockError(f"{self.path} is damaged ({error})", "record or copy it again") from None
        finally:
            self._raw.close()

    def _header(self) -> Header:
        try:
            text = self._file.readline()
        except (OSError, EOFError) as error:
            raise PenstockError(f"{self.path} is damaged ({error})", "record or copy it again") from None
        try:
            header = msgspec.json.decode(text, type=Header)
        except msgspec.MsgspecError as error:
            raise self._problem(1, f"not the header of an event log ({error})") from None
        if header.format != FORMAT or b'"format"' not in text:
            raise self._problem(1, f'not the header of an event log (no "format": "{FORMAT}")')
        if header.version != VERSION:
            raise PenstockError(
                f"{self.path}: version {header.version}, this release reads {VERSION}", "update penstock"
            )
        return header

    def _problem(self, line: int, text: str) -> PenstockError:
        return PenstockError(f"{self.path.name}:{line}: {text}", "give a log written by penstock simulate --record")
