"""Statistics and drawings."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from penstock.workload.describe import describe, length_histogram, rate_curve, render, sparkline
from penstock.workload.plots import figures
from penstock.workload.read import read_trace
from penstock.workload.synthetic import synthesize
from penstock.workload.trace import PrefixHashes, Trace


def small(arrival: list[float], prompt: list[int], output: list[int], hashes: list[list[int]] | None = None) -> Trace:
    """A trace by hand."""
    prefixes = None
    if hashes is not None:
        offsets = np.cumsum([0, *map(len, hashes)]).astype(np.int64)
        prefixes = PrefixHashes(np.array(list(itertools.chain(*hashes)), np.int64), offsets, 10)
    n = len(arrival)
    return Trace(
        np.array(arrival), np.array(prompt), np.array(output), np.zeros(n, np.int16), prefixes=prefixes, source="hand"
    )


def drawn(trace: Trace, width: int = 80) -> str:
    """What ``render`` prints."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    render(describe(trace), trace, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_figures_by_hand() -> None:
    summary = describe(small([0, 1, 2, 4], [10, 20, 30, 40], [4, 3, 2, 1]))
    assert (summary.requests, summary.duration_s, summary.rate_rps) == (4, 4.0, 0.75)
    assert summary.gap_cv == pytest.approx(np.std([1, 1, 2]) / np.mean([1, 1, 2]))
    assert (summary.prompt.mean, summary.prompt.p50, summary.prompt.max, summary.prompt.total) == (25, 25, 40, 100)
    assert summary.prompt_share == pytest.approx(100 / 110)
    assert summary.length_correlation == pytest.approx(-1)
    assert summary.classes == {"default": 4}
    assert summary.prefix is None


def test_prefix_reuse_by_hand() -> None:
    # Second request: two leading blocks known (20 tokens). Third: first block unknown, so that its known second block
    # saves nothing. Fourth: everything known, but only its 25 tokens. A repeat within one request is no reuse.
    hashes = [[1, 2, 3], [1, 2, 4], [9, 2], [1, 2, 3], [7, 7]]
    prefix = describe(small([0, 1, 2, 3, 4], [30, 30, 20, 25, 20], [1] * 5, hashes)).prefix
    assert prefix is not None
    assert (prefix.blocks, prefix.reused_blocks) == (13, 5)
    assert prefix.reused_prompt_share == pytest.approx((20 + 25) / 125)


def test_summary_is_json() -> None:
    trace = synthesize("azure-conv", 1000, classes={"chat": 1, "batch": 1})
    again = json.loads(json.dumps(asdict(describe(trace))))
    assert again["requests"] == 1000 and sum(again["classes"].values()) == 1000


def test_edge_traces() -> None:
    one = describe(small([0], [5], [7]))
    assert (one.rate_rps, one.peak_rate_rps, one.gap_cv, one.length_correlation) == (0, 0, None, None)
    at_once = describe(small([0, 0, 0], [5, 6, 7], [7, 7, 7]))
    assert (at_once.gap_cv, at_once.length_correlation) == (None, None)
    for trace in (small([0], [1], [1]), small([0, 0, 0], [5, 6, 7], [7, 7, 7]), small([0, 1e-9], [1, 2], [1, 1])):
        assert "requests" in drawn(trace)
        assert figures(trace)


@settings(max_examples=50, deadline=None)
@given(tokens=st.lists(st.integers(1, 2**40), min_size=1, max_size=50), bins=st.integers(1, 30))
def test_histogram_counts_every_request(tokens: list[int], bins: int) -> None:
    edges, counts = length_histogram(np.array(tokens, np.int64), bins)
    assert counts.sum() == len(tokens)
    assert len(edges) == len(counts) + 1 <= bins + 1
    assert np.all(np.diff(edges) > 0)


def test_rate_curve_counts_every_request() -> None:
    trace = synthesize("sharegpt", 5000, 20.0, cv=2.0)
    start, rate = rate_curve(trace, 50)
    assert (rate * trace.duration_s / 50).sum() == pytest.approx(5000)
    assert start[1] - start[0] == pytest.approx(trace.duration_s / 50)
    assert describe(trace).peak_rate_rps == pytest.approx(rate_curve(trace)[1].max())


def test_sparkline() -> None:
    assert sparkline(np.array([0.0, 1.0, 4.0, 8.0])) == " ▁▄█"
    assert sparkline(np.array([1e-9, 1.0])) == "▁█"  # little is not nothing
    assert sparkline(np.zeros(2)) == "  "


@pytest.mark.parametrize("width", [40, 80, 200])
def test_drawing_fits_the_width(width: int) -> None:
    text = drawn(synthesize("three-phase"), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "arrival rate" in text and "█" in text and "prompt tokens" in text


def test_markup_in_names_is_shown_as_it_is() -> None:
    trace = small([0, 1], [1, 2], [1, 2])
    text = drawn(replace(trace, source="[red]a[/red].csv", notes=("[b]x",)))
    assert "[red]a[/red].csv" in text and "[b]x" in text


def test_figures_stay_small() -> None:
    made = figures(synthesize("azure-conv", 200_000, 50.0))
    assert set(made) == {"arrival rate", "lengths", "output against prompt"}
    for figure in made.values():
        assert len(figure.to_json()) < 500_000


@pytest.mark.parametrize(
    ("file", "requests", "rate", "reuse"),
    [
        ("azure_conv_2023.csv", 19_366, 5.5, None),
        ("azure_code_2023.csv", 8_819, 2.6, None),
        ("mooncake_synthetic.jsonl", 3_993, 3.9, 0.65),
        ("sharegpt_lengths.csv", 10_000, 1.0, None),
    ],
)
def test_real_traces(
    real_trace: Callable[[str], Path], file: str, requests: int, rate: float, reuse: float | None
) -> None:
    trace = read_trace(real_trace(file))
    summary = describe(trace)
    assert summary.requests == requests
    assert summary.rate_rps == pytest.approx(rate, rel=0.05)
    assert (summary.prefix is None) == (reuse is None)
    if summary.prefix is not None:
        assert summary.prefix.reused_prompt_share == pytest.approx(reuse, abs=0.01)
    assert drawn(trace)
