"""Each format: detection from content, values, order, notes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from penstock.core.errors import PenstockError
from penstock.workload.detect import DESCRIPTIONS, FORMATS, detect_format
from penstock.workload.read import read_trace
from penstock.workload.table import Column, read_table

Write = Callable[[str, str | bytes], Path]

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:15:51.2224670,879,55"
)
BURST = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45.5,GPT-4,1087,0,1087,API log\n"
    "118,GPT-4,417,276,693,Conversation log\n"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 1000, "output_length": 6, "hash_ids": [0, 1]}\n'
    '{"timestamp": 2500, "input_length": 600, "output_length": 4, "hash_ids": [0, 7]}\n'
)
LENGTHS = "num_prefill_tokens,num_decode_tokens,pd_ratio\n3742,284,0.07\n18,243,13.5\n11,306,27.8\n"
BENCH = {
    "date": "20260102-030405",
    "backend": "vllm",
    "request_rate": "inf",
    "mean_tpot_ms": float("nan"),
    "input_lens": [100, 200, 300],
    "output_lens": [3, 0, 2],
    "start_times": [10.0, 10.5, 11.5],
    "errors": ["", "timeout", ""],
}
SERVEGEN = "0,0.5,1.0,Gamma,1.0,2.0\n600,0,0,,0,0\n"


@pytest.mark.parametrize(
    ("expected", "content"),
    [
        ("azure", AZURE),
        ("azure", "\ufeff" + AZURE),
        ("burstgpt", BURST),
        ("burstgpt", "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"),
        ("mooncake", MOONCAKE),
        ("lengths", LENGTHS),
        ("vllm-bench", json.dumps(BENCH)),
        ("vllm-bench", json.dumps(BENCH, indent=2)),
        ("servegen", SERVEGEN),
        ("servegen", '{\n  "0": {\n    "input_tokens": "{5: 1.0}", "output_tokens": "{5: 1.0}"}}'),
        ("penstock", '{"format":"penstock-recording","version":1}\n'),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_format_is_told_from_content(write: Write, expected: str, content: str, compressed: bool) -> None:
    data = content.encode()
    assert detect_format(write("trace.dat", gzip.compress(data, mtime=0) if compressed else data)) == expected


@pytest.mark.parametrize("content", ["hello\nworld\n", '{"a": 1}', "a,b\n1,2\n", "[1, 2]", b"\xff\xfe\x00\x01"])
def test_unknown_content_lists_the_known_formats(write: Write, content: str | bytes) -> None:
    with pytest.raises(PenstockError) as caught:
        detect_format(write("x.csv", content))
    for name in FORMATS:
        assert f"{name} ({DESCRIPTIONS[name]})" in str(caught.value)


def test_azure(write: Write) -> None:
    trace = read_trace(write("azure.csv", AZURE))
    # 100 ns stand in the file: the difference must be exact to the last digit.
    assert trace.arrival_s.tolist() == [0.0, 4.314579, 4.541877]
    assert trace.prompt_tokens.tolist() == [374, 396, 879]
    assert trace.output_tokens.tolist() == [44, 109, 55]
    assert trace.notes == ()


def test_azure_2024_offsets_and_missing_decimals(write: Write) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00+00:00,10,1\n"
        "2024-05-10 00:00:00.009930+00:00,20,2\n"
        "2024-05-10 02:00:01+02:00,30,3\n"
    )
    for body in (text, text.rsplit("\n", 2)[0]):  # with and without the row that needs the slow path
        assert read_trace(write("a.csv", body)).arrival_s.tolist() == [0.0, 0.00993, 1.0][: body.count("\n2024")]


def test_burstgpt_skips_failures_and_counts_them(write: Write) -> None:
    path = write("burst.csv", BURST)
    trace = read_trace(path)
    assert trace.arrival_s.tolist() == [0.0, 113.0]
    assert trace.output_tokens.tolist() == [18, 276]
    assert trace.notes == ("skipped 1 of 3 rows with zero output tokens",)
    with pytest.raises(PenstockError, match=r"^burst\.csv:3: zero output tokens: .*on_zero=\"skip\""):
        read_trace(path, on_zero="error")


def test_zero_rows_are_listed_with_a_limit(write: Write) -> None:
    rows = "".join(f"{i},m,5,0,5,log\n" for i in range(9))
    path = write("burst.csv", BURST + rows)
    with pytest.raises(PenstockError, match=r"line 5, 6, 7, 8 and 5 more"):
        read_trace(path, on_zero="error")
    only = write("all.csv", BURST.splitlines(keepends=True)[0] + rows)
    with pytest.raises(PenstockError, match=r"no usable request \(skipped 9 of 9 rows with zero output tokens\)"):
        read_trace(only)


def test_unsorted_rows_are_sorted_and_noted(write: Write) -> None:
    lines = BURST.splitlines()
    trace = read_trace(write("b.csv", "\n".join([lines[0], lines[3], lines[1]])))
    assert trace.arrival_s.tolist() == [0.0, 113.0]
    assert trace.prompt_tokens.tolist() == [472, 417]
    assert trace.notes == ("sorted by arrival time: 1 rows came before their predecessor",)


def test_mooncake(write: Write) -> None:
    trace = read_trace(write("m.jsonl", MOONCAKE))
    assert trace.arrival_s.tolist() == [0.0, 2.5]
    assert trace.prefixes is not None
    assert [trace.prefixes.of(i) for i in range(2)] == [(0, 1), (0, 7)]
    assert trace.prefixes.block_tokens == 512


def test_mooncake_prefixes_follow_sorting_and_skipping(write: Write) -> None:
    extra = '{"timestamp": 100, "input_length": 9, "output_length": 0, "hash_ids": [5]}\n\n'
    reordered = "".join(reversed(MOONCAKE.splitlines(keepends=True))) + extra
    trace = read_trace(write("m.jsonl", reordered))
    assert trace.prefixes is not None
    assert [trace.prefixes.of(i) for i in range(2)] == [(0, 1), (0, 7)]
    assert len(trace.notes) == 2


def test_lengths_without_arrivals(write: Write) -> None:
    path = write("l.csv", LENGTHS)
    trace = read_trace(path, seed=3)
    assert trace.prompt_tokens.tolist() == [3742, 18, 11]
    assert trace.output_tokens.tolist() == [284, 243, 306]
    assert "no arrival times" in trace.notes[0]
    assert np.array_equal(trace.arrival_s, read_trace(path, seed=3).arrival_s)
    assert not np.array_equal(trace.arrival_s, read_trace(path, seed=4).arrival_s)
    assert read_trace(path, rate_rps=50).rate_rps == pytest.approx(50)


def test_lengths_with_arrivals(write: Write) -> None:
    trace = read_trace(write("l.csv", "arrived_at,prompt_tokens,output_tokens\n1.5,10,2\n2.0,20,3\n"))
    assert trace.arrival_s.tolist() == [0.0, 0.5]
    assert trace.notes == ()


def test_vllm_bench(write: Write) -> None:
    trace = read_trace(write("r.json", json.dumps(BENCH)))  # holds NaN, as Python writes it
    assert trace.arrival_s.tolist() == [0.0, 1.5]
    assert trace.prompt_tokens.tolist() == [100, 300]
    assert trace.output_tokens.tolist() == [3, 2]
    assert trace.notes == ("skipped 1 of 3 rows with zero output tokens",)


def test_vllm_bench_without_start_times(write: Write) -> None:
    old = {key: value for key, value in BENCH.items() if key != "start_times"}
    with pytest.raises(PenstockError, match="neither start_times nor a finite request_rate"):
        read_trace(write("r.json", json.dumps(old)))
    trace = read_trace(write("r.json", json.dumps(old | {"request_rate": 4.0})))
    assert "Poisson arrivals at 4 requests/s" in trace.notes[0]
    assert "at 2 requests/s" in read_trace(write("r.json", json.dumps(old)), rate_rps=2).notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_lens": None}, "--save-detailed"),
        ({"output_lens": [1]}, "output_lens has 1 entries, input_lens 3"),
        ({"output_lens": [1, -2, 3]}, r"output_lens\[1\]"),
        ({"start_times": [1.0, float("nan"), 2.0]}, r"start_times\[1\]"),
    ],
)
def test_vllm_bench_errors(write: Write, change: dict[str, object], message: str) -> None:
    with pytest.raises(PenstockError, match=message):
        read_trace(write("r.json", json.dumps(BENCH | change)))


def test_vllm_bench_with_several_results(write: Write) -> None:
    two = json.dumps(BENCH) + "\n" + json.dumps(BENCH)
    with pytest.raises(PenstockError, match="--append-result holds several"):
        read_trace(write("r.json", two))


def test_cutting_and_rescaling(write: Write) -> None:
    body = "".join(f"{i},m,{10 + i},1,1,log\n" for i in range(100))
    path = write("b.csv", BURST.splitlines(keepends=True)[0] + body)
    cut = read_trace(path, start_s=20, duration_s=10)
    assert cut.prompt_tokens.tolist() == list(range(30, 40))
    assert cut.arrival_s[0] == 0
    assert read_trace(path, start_s=20, duration_s=10, limit=3).prompt_tokens.tolist() == [30, 31, 32]
    assert read_trace(path, start_s=97).prompt_tokens.tolist() == [107, 108, 109]
    fast = read_trace(path, rate_rps=20)
    assert fast.rate_rps == pytest.approx(20)
    assert np.allclose(np.diff(fast.arrival_s), 0.05)
    assert len(read_trace(path, limit=1, rate_rps=5)) == 1
    with pytest.raises(PenstockError, match="holds no request"):
        read_trace(path, start_s=1000)
    for bad in ({"limit": 0}, {"start_s": -1.0}, {"duration_s": 0.0}, {"rate_rps": 0.0}, {"rate_rps": -2.0}):
        with pytest.raises(PenstockError):
            read_trace(path, **bad)


def test_forced_format(write: Write) -> None:
    path = write("a.csv", AZURE)
    assert len(read_trace(path, format="azure")) == 3
    with pytest.raises(PenstockError, match='format "azur" is unknown: give one of penstock, azure'):
        read_trace(path, format="azur")
    with pytest.raises(
        PenstockError, match=r'a\.csv:1: the header has no column "Request tokens" \(it has TIMESTAMP, Con'
    ):
        read_trace(path, format="burstgpt")


def test_fast_and_slow_path_agree(write: Write) -> None:
    columns = [Column("Timestamp", "seconds"), Column("Request tokens", "tokens"), Column("Response tokens", "tokens")]
    path = write("b.csv", BURST)
    fast, slow = read_table(path, columns), read_table(path, columns, fast=False)
    assert fast.lines is None and slow.lines is not None  # that is: each path was taken
    for column in columns:
        assert fast.columns[column.name].dtype == slow.columns[column.name].dtype
        assert np.array_equal(fast.columns[column.name], slow.columns[column.name])
    assert [fast.line_of(i) for i in range(3)] == slow.lines.tolist()
