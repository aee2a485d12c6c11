"""Replay of an event log: through a fresh controller of the same setup, or its workload under another policy."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from penstock.core.errors import PenstockError
from penstock.core.eventlog import Header, LogReader, encode_actions
from penstock.core.events import Finished, RequestArrived
from penstock.experiment.build import build_controller, digests
from penstock.experiment.setup import Setup, setup_from_plain
from penstock.workload.trace import PrefixHashes, Trace


class Difference(msgspec.Struct, frozen=True):
    """The first event that the controller now answers otherwise: line of the log, time (s), event, both answers."""

    line: int
    t: float
    event: str
    recorded: str
    replayed: str


class Replay(msgspec.Struct, frozen=True):
    """What came of feeding a log to a fresh controller.

    ``identical`` is True if the actions of every event are the same, byte for byte. ``cut`` says that the last line was
    not whole and was left out.
    """

    policy: str
    events: int
    actions: int
    identical: bool
    difference: Difference | None
    cut: bool


class Workload(msgspec.Struct, frozen=True):
    """Requests found in a log. ``left_out`` never finished in it, so that their output length is unknown."""

    trace: Trace
    left_out: int


def recorded_setup(header: Header, path: Path | str) -> Setup:
    """The setup in a log's header.

    Raises
    ------
    PenstockError
        It cannot be read, or a file that it names (a profile, a ``config.json``) is not what it was.
    """
    setup = setup_from_plain(header.setup)
    now = digests(setup)
    for file, digest in header.files.items():
        if now.get(file) != digest:
            raise PenstockError(f"{path} was recorded with another {file}", "restore that file, or record again")
    return setup


def replay(path: Path | str) -> Replay:
    """Feed the events of a log to a fresh controller of the same setup, and compare what it does.

    Stops at the first difference. An event that does not fit the controller's books is a difference, too.

    Raises
    ------
    PenstockError
        The log cannot be read, or its setup cannot be built.
    """
    reader = LogReader(path)
    setup = recorded_setup(reader.header, path)
    controller = build_controller(setup)
    events = actions = 0
    difference = None
    for entry in reader:
        events += 1
        try:
            answer = controller.handle(entry.event, entry.t)
            found = encode_actions(answer)
            actions += len(answer)
        except Exception as error:  # a log that somebody edited can break the books in any way
            found = f"{type(error).__name__}: {error}".encode()
        if found != entry.actions:
            kind = type(entry.event).__name__
            difference = Difference(entry.line, entry.t, kind, entry.actions.decode(), found.decode())
            break
    return Replay(setup.policy, events, actions, difference is None, difference, reader.cut)


def workload(path: Path | str) -> Workload:
    """The requests of a log as a trace: arrivals and prompts as they came, outputs as they finished.

    Requests that did not finish (refused, aborted, still running at the end) have no known output length and are left
    out; so are those that the recorded world refused before its controller saw them.

    Raises
    ------
    PenstockError
        The log cannot be read, or no request finished in it.
    """
    reader = LogReader(path)
    arrived: dict[int, tuple[float, RequestArrived]] = {}
    outputs: dict[int, int] = {}
    for entry in reader:
        event = entry.event
        if isinstance(event, RequestArrived):
            arrived[event.request] = entry.t, event
        elif isinstance(event, Finished):
            outputs[event.request] = event.generated
    rows = sorted(
        (time, event.request, event) for request, (time, event) in arrived.items() if outputs.get(request, 0) > 0
    )
    if not rows:
        raise PenstockError(f"no request of {path} finished", "record a longer run")
    events = [event for _, _, event in rows]
    header = reader.header
    prefixes = None
    if header.block_tokens is not None:
        offsets = np.concatenate([[0], np.cumsum([len(event.prefix) for event in events])]).astype(np.int64)
        values = np.array([h for event in events for h in event.prefix], np.int64)
        prefixes = PrefixHashes(values, offsets, header.block_tokens)
    arrival = np.array([time for time, _, _ in rows], np.float64)
    left_out = len(arrived) - len(rows)
    said = (f"{left_out} requests that did not finish are left out",) if left_out else ()
    trace = Trace(
        arrival - arrival[0],
        np.array([event.prompt_tokens for event in events], np.int64),
        np.array([outputs[event.request] for event in events], np.int64),
        np.array([event.slo_class for event in events], np.int16),
        tuple(header.class_names),
        prefixes,
        source=f"requests of {Path(path).name}",
        notes=said,
    )
    return Workload(trace, left_out)
