"""Every event and action survives the log."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.core import actions as a
from penstock.core import events as e
from penstock.core.errors import PenstockError
from penstock.core.eventlog import EventLog, Header, LogReader, decode_actions, encode_actions
from penstock.core.types import MigrationLevel, Role, Slo

LOAD = e.Load(3, 1, 4567, 89, 0.012345678901234567)
EVENTS: list[e.Event] = [
    e.InstanceUp(0, Role.PREFILL, 100, 16, 256, (MigrationLevel.REPLAY, MigrationLevel.PRECOPY)),
    e.RequestArrived(1, 100, Slo(), 0, ()),
    e.RequestArrived(2, 100, Slo(0.1, float("inf")), 1, (17, -(2**62))),
    e.PrefillDone(1, 0, LOAD, 123.456),
    e.DecodeStarted(1, 2, LOAD),
    e.Preempted(1, 2, LOAD),
    e.MigrationDone(1, 2, 3, LOAD, LOAD),
    e.MigrationFailed(1, 2, 3, "source went down"),
    e.Finished(1, 3, 77, LOAD),
    e.Aborted(2),
    e.MoveOrdered(1, 3),
    e.Interrupted(1, 3, 9, "error 500"),
    e.InstanceHeld(3, True),
    e.FlipOrdered(3, Role.MIXED),
    e.PolicyChosen("ares", {"horizon": "4096"}),
    e.InstanceSlow(3, 1.5),
    e.InstanceDown(3, (4, 5), (0, 7)),
    e.Tick((0, 1), (LOAD, LOAD), (1, 2), (10, 20), (-1.0, 0.1 + 0.2)),
]
ACTIONS: list[a.Action] = [
    a.Prefill(1, 0),
    a.Decode(1, 2),
    a.Serve(1, 0),
    a.Migrate(1, 2, 3, MigrationLevel.HANDOFF, "variance"),
    a.Flip(2, Role.MIXED, "idle"),
    a.Reject(1, "queue is full"),
]


def kinds(base: type) -> set[str]:
    """Names of all subclasses."""
    found: list[type] = base.__subclasses__()
    return {kind.__name__ for kind in found}


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
def test_round_trip_of_every_kind(name: str, tmp_path: Path) -> None:
    assert {type(x).__name__ for x in EVENTS} == kinds(e.Event)
    assert {type(x).__name__ for x in ACTIONS} == kinds(a.Action)
    header = Header(penstock="1", setup={"policy": "x", "n": [1, 2.5]}, class_names=("a", "b"), block_tokens=16)
    with EventLog(tmp_path / name, header) as log:
        for i, event in enumerate(EVENTS):
            log.write(i / 3, event, ACTIONS[: i % 7])
    reader = LogReader(tmp_path / name)
    assert reader.header == header
    entries = list(reader)
    assert [entry.event for entry in entries] == EVENTS
    assert [entry.t for entry in entries] == [i / 3 for i in range(len(EVENTS))]
    for i, entry in enumerate(entries):
        assert entry.line == i + 2
        assert entry.actions == encode_actions(ACTIONS[: i % 7])
        assert decode_actions(entry.actions) == ACTIONS[: i % 7]


def test_not_a_log(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for content in (b"", b"hello\n", b"{}\n", b"[1]\n"):
        path.write_bytes(content)
        with pytest.raises(PenstockError, match=r"x\.jsonl:1"):
            LogReader(path)
