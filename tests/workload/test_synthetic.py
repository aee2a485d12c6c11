"""Arrival processes, length profiles, workloads."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.workload.arrivals import (
    Phase,
    constant_arrivals,
    gamma_arrivals,
    phased_arrivals,
    poisson_arrivals,
    window_arrivals,
)
from penstock.workload.describe import describe
from penstock.workload.lengths import PROFILES, UniformLengths, length_profile
from penstock.workload.mix import MULTI_CLASS
from penstock.workload.read import read_trace
from penstock.workload.recording import write_recording
from penstock.workload.synthetic import THREE_PHASE, WORKLOADS, Workload, WorkloadPhase, synthesize, workload


def rng(seed: int = 0) -> np.random.Generator:
    """A seeded generator."""
    return np.random.default_rng(seed)


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gamma_gaps_have_the_mean_and_cv_asked_for(cv: float) -> None:
    gaps = np.diff(gamma_arrivals(200_001, 5.0, cv, rng()))
    assert gaps.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03, abs=1e-6)


def test_poisson_and_constant() -> None:
    arrival = poisson_arrivals(100_000, 8.0, rng())
    counts, _ = np.histogram(arrival, bins=np.arange(0, math.floor(arrival[-1])))
    assert counts.mean() == pytest.approx(8, rel=0.02)
    assert counts.var() == pytest.approx(8, rel=0.05)  # Poisson counts: variance equals mean
    assert constant_arrivals(4, 2.0).tolist() == [0.0, 0.5, 1.0, 1.5]
    assert arrival[0] == 0


@pytest.mark.parametrize("cv", [0.3, 1.0, 8.0])
def test_windows_are_stationary(cv: float) -> None:
    # Short windows: a process started at 0 instead of before it would have (cv² - 1) / 2 arrivals too many, 31 at cv 8.
    shape, random = 1 / cv**2, rng()
    counts = [len(window_arrivals(10.0, 2.0, lambda n: random.standard_gamma(shape, n) / shape)) for _ in range(3000)]
    error = np.std(counts) / math.sqrt(len(counts))
    assert abs(np.mean(counts) - 20) < 4 * error + 0.02 * 20


@settings(max_examples=60, deadline=None)
@given(
    phases=st.lists(
        st.builds(Phase, st.floats(1e-3, 100), st.floats(0, 50), st.sampled_from([0.0, 0.5, 1.0, 4.0])),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 100),
)
def test_phases_keep_their_bounds(phases: list[Phase], seed: int) -> None:
    arrival, counts = phased_arrivals(tuple(phases), rng(seed))
    assert sum(counts) == len(arrival)
    assert np.all(np.diff(arrival) >= 0)
    start, row = 0.0, 0
    for phase, count in zip(phases, counts, strict=True):
        mine = arrival[row : row + count]
        stop = start + phase.duration_s
        assert np.all((mine >= start) & (mine <= stop))
        start, row = stop, row + count


@pytest.mark.parametrize(
    "call",
    [
        lambda: constant_arrivals(1, 0.0),
        lambda: poisson_arrivals(1, -1.0, rng()),
        lambda: gamma_arrivals(1, math.nan, 1.0, rng()),
        lambda: gamma_arrivals(1, 1.0, -0.5, rng()),
        lambda: phased_arrivals((Phase(0.0, 1.0),), rng()),
        lambda: phased_arrivals((Phase(1.0, -1.0),), rng()),
        lambda: synthesize("azure-conv", 0),
        lambda: synthesize("azure-conv"),
        lambda: synthesize("azure-conv", duration_s=math.inf),
        lambda: synthesize("azure-conv", duration_s=1e-9),
        lambda: synthesize("azure-konv", 1),
        lambda: synthesize("0/5", 1),
        lambda: synthesize("9-5/5", 1),
        lambda: synthesize("512/128", 5, classes={"a": -1.0}),
        lambda: synthesize("512/128", 5, classes={}),
        lambda: Workload("x", ()),
        lambda: Workload("x", (WorkloadPhase(length_profile("1/1")), WorkloadPhase(length_profile("1/1")))),
        lambda: Workload("x", (WorkloadPhase(length_profile("1/1"), 5, 0.0),)),
    ],
)
def test_bad_arguments(call: Callable[[], object]) -> None:
    with pytest.raises(PenstockError):
        call()


def test_unknown_workload_lists_the_known_ones() -> None:
    with pytest.raises(PenstockError, match=f"give {', '.join(WORKLOADS)}, or lengths such as 512/128"):
        workload("azure-konv")


@pytest.mark.parametrize("name", [*WORKLOADS, "512/128", "300-800/5-9"])
def test_seeds(name: str) -> None:
    a, b, c = (synthesize(name, 500, 3.0, seed=seed) for seed in (1, 1, 2))
    assert len(a) == 500 and a.arrival_s[0] == 0
    assert np.array_equal(a.arrival_s, b.arrival_s) and np.array_equal(a.output_tokens, b.output_tokens)
    assert not np.array_equal(a.arrival_s, c.arrival_s)


def test_lengths_do_not_change_with_rate_or_burstiness() -> None:
    a, b = synthesize("azure-code", 1000, 1.0, seed=5), synthesize("azure-code", 1000, 7.0, seed=5, cv=4.0)
    assert np.array_equal(a.prompt_tokens, b.prompt_tokens) and np.array_equal(a.output_tokens, b.output_tokens)
    assert np.array_equal(a.arrival_s, synthesize("azure-code", 1000, 2.0, seed=5).arrival_s * 2)


def test_duration_and_count_together() -> None:
    by_time = synthesize("sharegpt", rate_rps=10.0, duration_s=500.0)
    assert len(by_time) == pytest.approx(5000, rel=0.1)
    assert by_time.duration_s <= 500
    assert len(synthesize("sharegpt", 100, 10.0, duration_s=500.0)) == 100
    assert len(synthesize("sharegpt", 10**6, 10.0, duration_s=5.0)) < 200


def test_reasoning_meets_the_published_shares() -> None:
    output = synthesize("reasoning", 400_000).output_tokens
    assert np.mean(output < 1000) == pytest.approx(0.292, abs=0.003)
    assert np.mean(output > 30_000) == pytest.approx(0.173, abs=0.003)
    assert output.max() == 32_768
    assert np.mean(output == 32_768) == pytest.approx(0.16, abs=0.003)
    # Log-uniform in between: equal shares per factor.
    thirds = [np.mean((output >= 1000 * 30 ** (i / 3)) & (output < 1000 * 30 ** ((i + 1) / 3))) for i in range(3)]
    assert thirds == pytest.approx([0.535 / 3] * 3, abs=0.004)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("azure-conv", "azure_conv_2023.csv"),
        ("azure-code", "azure_code_2023.csv"),
        ("sharegpt", "sharegpt_lengths.csv"),
    ],
)
def test_profiles_match_their_source(real_trace: Callable[[str], Path], name: str, file: str) -> None:
    real, drawn = read_trace(real_trace(file)), synthesize(name, 300_000, seed=7)
    for column in ("prompt_tokens", "output_tokens"):
        a, b = getattr(real, column), getattr(drawn, column)
        assert b.mean() == pytest.approx(a.mean(), rel=0.03)
        for share in (0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
            assert np.quantile(b, share) == pytest.approx(np.quantile(a, share), rel=0.05, abs=2)
        assert b.max() <= a.max() and b.min() >= a.min()
    # The joint distribution, not only the two margins: outputs of short and of long prompts.
    for low, high in ((0.0, 0.25), (0.75, 1.0)):
        means = []
        for trace in (real, drawn):
            order = np.argsort(trace.prompt_tokens, kind="stable")
            part = order[int(low * len(order)) : int(high * len(order))]
            means.append(float(trace.output_tokens[part].mean()))
        assert means[1] == pytest.approx(means[0], rel=0.06)
    correlations = [describe(trace).length_correlation for trace in (real, drawn)]
    assert correlations[1] == pytest.approx(correlations[0], abs=0.03)


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_give_valid_lengths(name: str) -> None:
    prompt, output = length_profile(name).sample(50_000, rng())
    assert prompt.dtype == output.dtype == np.int64
    assert prompt.min() >= 1 and output.min() >= 1


def test_uniform_lengths_reach_both_bounds() -> None:
    assert length_profile("3-5/7") == UniformLengths((3, 5), (7, 7))
    prompt, output = UniformLengths((3, 5), (7, 7)).sample(200, rng())
    assert sorted(set(prompt.tolist())) == [3, 4, 5] and set(output.tolist()) == {7}


def test_three_phases() -> None:
    trace = synthesize("three-phase", rate_rps=2.0, seed=3)
    bounds = [(8000, 16000, 30, 60, 16), (300, 800, 2000, 8000, 1), (300, 800, 200, 500, 4)]
    for i, (low_p, high_p, low_o, high_o, factor) in enumerate(bounds):
        part = trace.between(i * 300.0 + 1, (i + 1) * 300.0 - 1)  # the first arrival is 0, not the start of the phase
        assert low_p <= part.prompt_tokens.min() and part.prompt_tokens.max() <= high_p
        assert low_o <= part.output_tokens.min() and part.output_tokens.max() <= high_o
        assert len(part) == pytest.approx(298 * 2 * factor, rel=5 / math.sqrt(298 * 2 * factor))
    assert trace.duration_s <= 900
    twice = synthesize(THREE_PHASE, rate_rps=2.0, duration_s=1800.0)
    assert len(twice) == pytest.approx(2 * len(trace), rel=0.1)
    assert len(synthesize(THREE_PHASE, 20_000, 0.5, cv=10.0)) == 20_000  # more than one round, bursts


def test_phases_written_down() -> None:
    text = "8000-16000/30-60@300x16, 300-800/2000-8000@300, 300-800/200-500@300sx4"
    assert workload(text).phases == THREE_PHASE.phases
    mixed = synthesize("512/1@100x2,azure-conv@50", rate_rps=10.0, seed=1)
    assert set(mixed.between(0, 99).output_tokens.tolist()) == {1}
    assert len(mixed) == pytest.approx(2500, rel=0.1)
    for bad in ("512/1@", "512/1@1..2", "@5", "512/1@5,", "512/1@5y3", "512/1@0", "512/1@5,nothing@5", "1/1@5x0"):
        with pytest.raises(PenstockError):
            synthesize(bad)


def test_classes() -> None:
    trace = synthesize("512/128", 10_000, classes={"chat": 3, "batch": 1})
    assert trace.class_names == ("chat", "batch")
    assert np.mean(trace.slo_class == 0) == pytest.approx(0.75, abs=0.02)


def test_a_million_requests_take_about_a_second() -> None:
    length_profile("azure-conv")
    start = time.process_time()
    assert len(synthesize("azure-conv", 1_000_000, 100.0, cv=2.0)) == 1_000_000
    assert time.process_time() - start < 3  # measured 0.3 s; room for a busy machine


def test_import_stays_light() -> None:
    code = (
        "import sys, penstock.workload.read, penstock.workload.synthetic, penstock.workload.describe\n"
        "import penstock.workload.plots\n"
        "print([name for name in ('polars', 'scipy', 'plotly', 'rich', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_mix_of_classes_carries_lengths_and_targets(tmp_path: Path) -> None:
    trace = synthesize("multi-class", 4000, 10.0, seed=3)
    assert trace.class_names == MULTI_CLASS.names and trace.class_slos == MULTI_CLASS.slos
    share = np.bincount(trace.slo_class, minlength=4) / len(trace)
    assert share == pytest.approx([c.share for c in MULTI_CLASS.classes], abs=0.03)
    reasoning = trace.slo_class == trace.class_names.index("reasoning")
    assert trace.output_tokens[reasoning].min() >= 500 > np.median(trace.output_tokens[~reasoning])
    # Lengths do not depend on the rate, and a recording keeps the targets.
    assert (synthesize("multi-class", 4000, 20.0, seed=3).output_tokens == trace.output_tokens).all()
    write_recording(trace, tmp_path / "mix.jsonl.gz")
    back = read_trace(tmp_path / "mix.jsonl.gz")
    assert back.class_slos == trace.class_slos and (back.slo_class == trace.slo_class).all()
    # Classes that are drawn anew have no targets but those of their names.
    drawn = synthesize("multi-class", 100, classes={"chat": 0.5, "other": 0.5})
    assert drawn.class_slos == {"chat": MULTI_CLASS.slos["chat"]}
