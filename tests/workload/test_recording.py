"""Our own recording: exact round trip, appending, files cut short."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.workload.read import read_trace
from penstock.workload.recording import RecordingWriter, Row, read_recording, write_recording
from penstock.workload.synthetic import synthesize
from penstock.workload.trace import PrefixHashes, Trace


def assert_equal(a: Trace, b: Trace) -> None:
    """Equal to the last bit, types included."""
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "slo_class"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype
        assert left.tolist() == right.tolist(), name
    assert (a.class_names, a.source, a.notes) == (b.class_names, b.source, b.notes)
    assert (a.prefixes is None) == (b.prefixes is None)
    if a.prefixes is not None and b.prefixes is not None:
        assert a.prefixes.block_tokens == b.prefixes.block_tokens
        assert a.prefixes.offsets.tolist() == b.prefixes.offsets.tolist()
        assert a.prefixes.values.tolist() == b.prefixes.values.tolist()


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Any valid trace."""
    n = draw(st.integers(1, 8))
    gaps = draw(st.lists(st.floats(0, 1e9), min_size=n, max_size=n))
    tokens = st.lists(st.integers(1, 2**40), min_size=n, max_size=n)
    names = draw(st.lists(st.text(), min_size=1, max_size=4, unique=True))
    classes = draw(st.lists(st.integers(0, len(names) - 1), min_size=n, max_size=n))
    prefixes = None
    if draw(st.booleans()):
        hashes = draw(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4), min_size=n, max_size=n))
        offsets = np.cumsum([0, *(len(h) for h in hashes)]).astype(np.int64)
        prefixes = PrefixHashes(np.array(list(itertools.chain(*hashes)), np.int64), offsets, draw(st.integers(1, 4096)))
    return Trace(
        arrival_s=np.cumsum([0.0, *gaps[1:]]),
        prompt_tokens=np.array(draw(tokens), np.int64),
        output_tokens=np.array(draw(tokens), np.int64),
        slo_class=np.array(classes, np.int16),
        class_names=tuple(names),
        prefixes=prefixes,
        source=draw(st.text()),
        notes=tuple(draw(st.lists(st.text(), max_size=2))),
    )


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trace=traces(), name=st.sampled_from(["r.jsonl", "r.jsonl.gz"]))
def test_round_trip_is_exact(tmp_path: Path, trace: Trace, name: str) -> None:
    write_recording(trace, tmp_path / name)
    assert_equal(trace, read_trace(tmp_path / name))


def test_equal_recordings_are_equal_bytes(tmp_path: Path) -> None:
    trace = synthesize("azure-conv", 50, seed=1)
    for name in ("a.gz", "b.gz", "a", "b"):
        write_recording(trace, tmp_path / name)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_header_names_format_version_and_units(tmp_path: Path) -> None:
    write_recording(synthesize("512/128", 3), tmp_path / "r")
    header = json.loads((tmp_path / "r").read_text().splitlines()[0])
    assert (header["format"], header["version"], header["requests"]) == ("penstock-recording", 1, 3)
    assert header["units"]["arrival_s"].startswith("seconds")


def record(path: Path) -> None:
    """Three requests in order of completion, count unknown in advance."""
    with RecordingWriter(path, ("chat", "batch"), block_tokens=16) as writer:
        writer.write(Row(7.5, 20, 2, "batch", [3, 4]))
        writer.flush()
        writer.write(Row(7.0, 10, 5, "chat"))
        writer.write(Row(9.0, 30, 0, "chat"))


def test_rows_in_order_of_completion(tmp_path: Path) -> None:
    record(tmp_path / "r")
    trace = read_recording(tmp_path / "r")
    assert trace.arrival_s.tolist() == [0.0, 0.5]
    assert [trace.class_names[i] for i in trace.slo_class] == ["chat", "batch"]
    assert trace.prefixes is not None and trace.prefixes.of(1) == (3, 4)
    assert len(trace.notes) == 2  # sorted; one zero output skipped
    with pytest.raises(PenstockError, match="r:4: zero output tokens"):
        read_recording(tmp_path / "r", on_zero="error")


def test_writer_refuses_an_unknown_class(tmp_path: Path) -> None:
    with RecordingWriter(tmp_path / "r") as writer, pytest.raises(ValueError, match="not in the header"):
        writer.write(Row(0.0, 1, 1, "chat"))
    with pytest.raises(PenstockError, match="cannot write"):
        RecordingWriter(tmp_path / "missing" / "r")


def test_last_line_cut_by_a_crash_is_left_out_with_a_note(tmp_path: Path) -> None:
    record(tmp_path / "r")
    whole = (tmp_path / "r").read_bytes()
    (tmp_path / "r").write_bytes(whole[:-10])
    trace = read_recording(tmp_path / "r")
    assert len(trace) == 2
    assert trace.notes[0] == "left out the last line, which was cut short"


def test_missing_rows_are_noticed_where_the_count_is_known(tmp_path: Path) -> None:
    write_recording(synthesize("512/128", 3), tmp_path / "r")
    lines = (tmp_path / "r").read_bytes().splitlines(keepends=True)
    (tmp_path / "r").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(PenstockError, match="announces 3 requests and holds 2"):
        read_recording(tmp_path / "r")


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (
            1,
            '{"format":"penstock-recording","version":2,"class_names":["chat"]}',
            "r:1: version 2, this release reads 1",
        ),
        (1, '{"format":"other","version":1}', 'r:1: format is "other"'),
        (1, '{"format":"penstock-recording","version":1}', "r:1: class_names is empty"),
        (1, "nonsense", "r:1: not the header of a recording"),
        (1, '{"format":"penstock-recording","version":1,"class_names":["chat","batch"]}', "r:2: prefix hashes, but"),
        (3, '{"arrival_s":1,"prompt_tokens":1,"output_tokens":1,"slo_class":"x"}', 'r:3: slo_class "x" is not in'),
        (3, '{"arrival_s":1,"prompt_tokens":-1,"output_tokens":1}', "r:3: prompt_tokens: expected `int` >= 0"),
        (3, '{"arrival_s":1,"prompt_tokens":1}', "r:3: object missing required field `output_tokens`"),
        (3, '{"arrival_s":1,"prompt_tokens":1,"output_tokens":1,"prefixes":[1]}', "r:3: object contains unknown field"),
        (3, "{", "r:3: "),
    ],
)
def test_malformed_lines(tmp_path: Path, line: int, text: str, message: str) -> None:
    record(tmp_path / "r")
    lines = (tmp_path / "r").read_text().splitlines()
    lines[line - 1] = text
    (tmp_path / "r").write_text("\n".join(lines) + "\n")
    with pytest.raises(PenstockError) as caught:
        read_recording(tmp_path / "r")
    assert str(caught.value).startswith(message)
