"""Bad input: always a PenstockError with file, line and reason; never another exception, never a silent loss."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.workload.detect import FORMATS
from penstock.workload.read import read_trace

Write = Callable[[str, str | bytes], Path]

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROW = "2023-11-16 18:15:46.6805900,374,44\n"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("2023-11-16 18:15:46,abc,44", 'ContextTokens is "abc", expected a whole number of tokens, 0 or more'),
        ("2023-11-16 18:15:46,-3,44", 'ContextTokens is "-3", expected'),
        ("2023-11-16 18:15:46,3.5,44", 'ContextTokens is "3.5", expected'),
        ("2023-11-16 18:15:46,3,nan", 'GeneratedTokens is "nan", expected'),
        ("2023-11-16 18:15:46,3,inf", 'GeneratedTokens is "inf", expected'),
        ("2023-11-16 18:15:46,3,1e300", 'GeneratedTokens is "1e300", expected'),
        ("2023-11-16 18:15:46,,44", 'ContextTokens is "", expected'),
        ("2023-11-16 18:15:46,1_000,44", 'ContextTokens is "1_000", expected'),
        ("yesterday,3,44", 'TIMESTAMP is "yesterday", expected a date and time'),
        ("2023-13-16 18:15:46,3,44", 'TIMESTAMP is "2023-13-16 18:15:46", expected'),
        ("9999-01-01 00:00:00,3,44", 'TIMESTAMP is "9999-01-01 00:00:00", expected'),
        ("2023-11-16 18:15:46.,3,44", 'TIMESTAMP is "2023-11-16 18:15:46.", expected'),
        ("2023-11-16 18:15:46,3", "the row has 2 fields, GeneratedTokens is missing"),
        ("2023-11-16 18:15:46,3,4,5", "the row has 4 fields, the header 3"),
        ('2023-11-16 18:15:46,"3,4', "not valid CSV"),
    ],
)
@pytest.mark.parametrize("blank_lines", [0, 2])
def test_bad_csv_row(write: Write, bad: str, reason: str, blank_lines: int) -> None:
    path = write("azure.csv", HEADER + ROW * 14 + "\n" * blank_lines + ROW + bad + "\n" + ROW)
    with pytest.raises(PenstockError) as caught:
        read_trace(path)
    line = 17 + blank_lines
    if "not valid CSV" in reason:
        line += 1  # the quote is never closed: noticed at the end of the file
    assert str(caught.value).startswith(f"azure.csv:{line}: {reason}")
    assert caught.value.remedy == "fix or delete the row"


def test_blank_lines_and_quotes_lose_no_row(write: Write) -> None:
    text = "\n" + HEADER + ROW + "\n  \n" + '"2023-11-16 18:15:47"," 5 ","6.0"\n\n' + "2023-11-16T18:15:48Z,1e2,7\n\n"
    trace = read_trace(write("a.csv", text))
    assert trace.prompt_tokens.tolist() == [374, 5, 100]
    assert trace.output_tokens.tolist() == [44, 6, 7]


def test_lines_are_counted_right_after_a_line_break_in_quotes(write: Write) -> None:
    path = write("l.csv", 'prompt_len,note,output_len\n5,"a\nb",1\n6,x,0\n')
    with pytest.raises(PenstockError, match=r"^l\.csv:4: zero output tokens"):
        read_trace(path, on_zero="error")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (HEADER, "has a header but no rows"),
        (HEADER + "\n\n", "has a header but no rows"),
        (HEADER.encode() + b"2023-11-16 18:15:46,3,\xe9\n", r"a\.csv:2: byte 0xe9 is not UTF-8"),
        (gzip.compress((HEADER + ROW * 50).encode(), mtime=0)[:-20], "damaged gzip"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens,contexttokens\n" + ROW, 'column "ContextTokens" repeats'),
        ('{"timestamp": 0, "input_length": 1, "output_length": 6, "hash_ids": [0]}\n{"timestamp": 0', r"a\.csv:2: "),
        ('{"timestamp": 0, "input_length": 1, "output_length": 6, "hash_ids": ["x"]}', r"a\.csv:1: hash_ids\[0\]"),
        ('{"timestamp": 0, "input_length": 1, "output_length": -6}', r"a\.csv:1: output_length: expected `int` >= 0"),
        ('{"timestamp": 0, "input_length": 1.5, "output_length": 6}', r"a\.csv:1: input_length: expected `int`"),
        ("Timestamp,Request tokens,Response tokens\n-1e308,1,1\n1e308,1,1\n", "arrivals span inf s"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 6}', r"a\.csv:1: "),
    ],
)
def test_bad_files(write: Write, content: str | bytes, message: str) -> None:
    with pytest.raises(PenstockError, match=message):
        read_trace(write("a.csv", content))


def test_missing_file_and_wrong_directory(tmp_path: Path) -> None:
    with pytest.raises(PenstockError, match=r"nowhere\.csv does not exist: check the path"):
        read_trace(tmp_path / "nowhere.csv")
    with pytest.raises(PenstockError, match=r"the directory has no chunk-N-trace\.csv"):
        read_trace(tmp_path)
    for name in FORMATS:
        with pytest.raises(PenstockError):
            read_trace(tmp_path / "nowhere.csv", format=name)


_FIELD = st.one_of(st.integers(-2, 10**6).map(str), st.floats().map(repr), st.text(max_size=6))
_LINE = st.one_of(st.lists(_FIELD, max_size=5).map(",".join), st.text(max_size=30))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(_LINE, max_size=6), header=st.sampled_from(["", HEADER, "prompt_len,output_len\n"]))
def test_any_text_gives_a_trace_or_a_penstock_error(tmp_path: Path, lines: list[str], header: str) -> None:
    path = tmp_path / "any"
    path.write_bytes((header + "\n".join(lines)).encode("utf-8", "surrogatepass"))
    for name in (None, *FORMATS):
        with contextlib.suppress(PenstockError):
            assert np.isfinite(read_trace(path, format=name).arrival_s).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_any_bytes_give_a_trace_or_a_penstock_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "any"
    for content in (data, b"\x1f\x8b" + data, gzip.compress(data, mtime=0)):
        path.write_bytes(content)
        for name in (None, *FORMATS):
            with contextlib.suppress(PenstockError):
                read_trace(path, format=name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 10**6), st.integers(0, 3)), min_size=1, max_size=20),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_every_row_is_read_or_noted(tmp_path: Path, rows: list[tuple[float, int, int]], ending: str) -> None:
    path = tmp_path / "b.csv"
    lines = ["Timestamp,Request tokens,Response tokens", *(f"{t!r},{p},{o}" for t, p, o in rows)]
    path.write_bytes(ending.join(lines).encode())
    good = sorted((t, p, o) for t, p, o in rows if p and o)
    if not good:
        with pytest.raises(PenstockError, match="no usable request"):
            read_trace(path)
        return
    trace = read_trace(path)
    assert len(trace) == len(good)
    skipped = sum(int(note.split()[1]) for note in trace.notes if note.startswith("skipped"))
    assert skipped + len(trace) == len(rows)
    assert sorted(trace.prompt_tokens.tolist()) == sorted(p for _, p, _ in good)
    assert trace.arrival_s.tolist() == [t - good[0][0] for t, _, _ in good]
