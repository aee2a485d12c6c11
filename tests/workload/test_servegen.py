"""Traffic generated from ServeGen's per-client statistics."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.workload.read import read_trace

EARLY = {"input_tokens": "{5: 0.25, 7: 0.75}", "output_tokens": "{100: 1.0}", "reason_ratio": "{0.5: 1.0}"}
LATE = {"input_tokens": "{9: 2.0}", "output_tokens": "{200: 0.5, 0: 0.5}"}


def client(folder: Path, number: int, rows: str, dataset: object = None) -> Path:
    """Write one client."""
    trace = folder / f"chunk-{number}-trace.csv"
    trace.write_text(rows)
    content = {"0": EARLY, "1200": LATE} if dataset is None else dataset
    (folder / f"chunk-{number}-dataset.json").write_text(json.dumps(content))
    return trace


ROWS = "0,2,1,Gamma,1,0.5\n600,0,0,,0,0\n1200,4,3,Weibull,0.4,0.01\n"


def test_rates_and_lengths_per_window(tmp_path: Path) -> None:
    path = client(tmp_path, 3, ROWS)
    trace = read_trace(path, on_zero="skip", seed=1)
    early = trace.between(0, 599)
    assert len(early) == pytest.approx(1200, abs=4 * 35)
    assert set(early.prompt_tokens.tolist()) == {5, 7} and set(early.output_tokens.tolist()) == {100}
    assert np.mean(early.prompt_tokens == 7) == pytest.approx(0.75, abs=0.06)
    late = trace.between(1100, 1900)
    assert set(late.prompt_tokens.tolist()) == {9} and set(late.output_tokens.tolist()) == {200}
    assert np.all((trace.arrival_s < 601) | (trace.arrival_s > 1190))  # the silent window
    assert any(note.startswith("generated from ServeGen statistics of 1 client(s), seed 1") for note in trace.notes)
    skipped = next(note for note in trace.notes if note.startswith("skipped"))
    assert int(skipped.split()[1]) == pytest.approx(1200, rel=0.35)  # half of 4/s, in bursts of cv 3


def test_file_dataset_or_directory(tmp_path: Path) -> None:
    path = client(tmp_path, 3, ROWS)
    by_file = read_trace(path)
    for other in (tmp_path, tmp_path / "chunk-3-dataset.json"):
        assert np.array_equal(read_trace(other).arrival_s, by_file.arrival_s)
    # The second client starts later, so that time 0 is the same request in both traces.
    client(tmp_path, 10, "0,0,0,,0,0\n600,1,1,Exponential,,\n")
    both = read_trace(tmp_path)
    assert len(both) - len(by_file) == pytest.approx(600, abs=100)
    # A client's requests do not depend on which other clients there are.
    assert set(by_file.arrival_s.tolist()) < set(both.arrival_s.tolist())
    assert np.all(np.diff(both.arrival_s) >= 0)


def test_seed_stretch_and_rate(tmp_path: Path) -> None:
    path = client(tmp_path, 3, "".join(f"{600 * i},{i % 3 + 1},1,Gamma,2,0.5\n" for i in range(20)), {"0": EARLY})
    whole, other = read_trace(path, seed=1), read_trace(path, seed=2)
    assert not np.array_equal(whole.prompt_tokens[:100], other.prompt_tokens[:100])
    part = read_trace(path, seed=1, start_s=3000, duration_s=900)
    assert 0 < part.duration_s <= 900
    # The same requests as those of the whole day within that stretch.
    gaps = np.round(np.diff(part.arrival_s), 6).tobytes()
    assert gaps in np.round(np.diff(whole.arrival_s), 6).tobytes()
    scaled = read_trace(path, rate_rps=20.0)
    assert scaled.rate_rps == pytest.approx(20, rel=0.03)
    assert scaled.duration_s == pytest.approx(whole.duration_s, rel=0.01)  # not compressed: the time of day stays
    assert len(read_trace(path, limit=10)) == 10
    with pytest.raises(PenstockError, match="no requests in the chosen stretch"):
        read_trace(path, start_s=10**6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0,2,1,Gamma,1\n", r"chunk-0-trace\.csv:1: the row has 5 fields, expected 6"),
        ("0,2,1,Gamma,1,1\n600,x,1,Gamma,1,1\n", r"chunk-0-trace\.csv:2: could not convert"),
        ("0,-2,1,Gamma,1,1\n", r"chunk-0-trace\.csv:1: start 0 and rate -2 must be 0 or more"),
        ("0,2,1,Zeta,1,1\n", r'chunk-0-trace\.csv:1: distribution "Zeta", expected Gamma'),
        ("0,2,1,Gamma,0,1\n", r"chunk-0-trace\.csv:1: shape 0 is not positive"),
        ("600,2,1,Gamma,1,1\n0,2,1,Gamma,1,1\n", r"chunk-0-trace\.csv:2: window start 0 does not come after 600"),
        ("0,0,0,,0,0\n", "no requests in the chosen stretch"),
    ],
)
def test_bad_windows(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(PenstockError, match=message):
        read_trace(client(tmp_path, 0, rows), format="servegen")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({}, "holds no window"),
        ([1], "give the dataset file as ServeGen publishes it"),
        ({"x": EARLY}, "could not convert"),
        ({"0": {"input_tokens": "{5: 1.0}"}}, "output_tokens of window 0 is not a"),
        ({"0": EARLY | {"input_tokens": "{5: 1.0, 6}"}}, "input_tokens of window 0 is not a"),
        ({"0": EARLY | {"input_tokens": "{5: -1.0}"}}, "negative or non-finite"),
        ({"0": EARLY | {"input_tokens": "{5: nan}"}}, "negative or non-finite"),
        ({"0": EARLY | {"input_tokens": "{5: 0.0}"}}, "negative or non-finite"),
    ],
)
def test_bad_datasets(tmp_path: Path, dataset: object, message: str) -> None:
    with pytest.raises(PenstockError, match=message):
        read_trace(client(tmp_path, 0, ROWS, dataset))


def test_missing_sibling(tmp_path: Path) -> None:
    path = client(tmp_path, 0, ROWS)
    (tmp_path / "chunk-0-dataset.json").unlink()
    with pytest.raises(PenstockError, match=r"chunk-0-dataset\.json does not exist"):
        read_trace(path)
    with pytest.raises(PenstockError, match=r"is not named like chunk-N-trace\.csv"):
        read_trace(path.rename(tmp_path / "renamed.csv"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.text(alphabet='0123456789.,-\neGam"x', max_size=40),
    lengths=st.text(alphabet="{}0123456789:,. en", max_size=20),
)
def test_any_content_gives_a_trace_or_a_penstock_error(tmp_path: Path, rows: str, lengths: str) -> None:
    for text in (rows, ROWS):
        path = client(tmp_path, 0, text, {"0": {"input_tokens": lengths, "output_tokens": lengths}})
        with contextlib.suppress(PenstockError):
            read_trace(path, format="servegen", duration_s=10.0)


def test_real_clients(real_trace: Callable[[str], Path]) -> None:
    folder = real_trace("servegen_deepseek-r1")
    hour = read_trace(folder, duration_s=3600.0)
    # Measured rates of the first six windows of both clients: 0.31 + 11 requests/s or so.
    rows = [
        [float(line.split(",")[1]) for line in (folder / f"chunk-{i}-trace.csv").read_text().splitlines()[:6]]
        for i in (30, 35)
    ]
    assert hour.rate_rps == pytest.approx(sum(map(sum, rows)) / 6, rel=0.05)
    assert hour.output_tokens.min() >= 26
