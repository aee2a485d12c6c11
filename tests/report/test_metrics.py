"""The summary against loops over requests."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from penstock.core.errors import PenstockError
from penstock.core.types import Role, Slo
from penstock.report.metrics import RunMetrics, summarize
from penstock.sim.result import Outcome, SimResult, TokenGaps
from tests.report.factory import make_result

SLOS = {"chat": Slo(0.5, 0.03), "code": Slo(0.25, 0.025)}


def judge(result: SimResult, i: int) -> tuple[bool, bool]:
    """Whether request ``i`` met TTFT and TPOT, by the words of the definition."""
    r, trace = result.requests, result.trace
    slo = SLOS[trace.class_names[trace.slo_class[i]]]
    ttft = not math.isnan(r.first_token_s[i]) and r.first_token_s[i] - trace.arrival_s[i] <= slo.ttft_s
    if r.outcome[i] != Outcome.FINISHED:
        return bool(ttft), False
    if r.emitted[i] == 1:
        return bool(ttft), True
    return bool(ttft), bool((r.finish_s[i] - r.first_token_s[i]) / (r.emitted[i] - 1) <= slo.tpot_s)


@pytest.mark.parametrize("seed", range(5))
def test_attainment_by_brute_force(seed: int) -> None:
    result = make_result(300, seed, slow=3)
    m, n = summarize(result, SLOS), 300
    verdicts = [judge(result, i) for i in range(n)]
    done = result.requests.outcome == Outcome.FINISHED
    met = [a and b and bool(done[i]) for i, (a, b) in enumerate(verdicts)]
    assert m.attainment == pytest.approx(sum(met) / n)
    assert m.ttft_attainment == pytest.approx(sum(a for a, _ in verdicts) / n)
    assert m.tpot_attainment == pytest.approx(sum(b for _, b in verdicts) / n)
    assert m.goodput_rps == pytest.approx(sum(met) / result.simulated_s)
    assert m.finished + m.rejected + m.unfinished == n
    assert sum(msgspec.to_builtins(m.misses).values()) == n - sum(met)
    for k, name in enumerate(result.trace.class_names):
        mine = np.flatnonzero(result.trace.slo_class == k)
        assert m.classes[name].attainment == pytest.approx(np.mean([met[i] for i in mine]))
        assert m.classes[name].requests == len(mine)
    late = [i for i in range(n) if done[i] and not verdicts[i][1]]
    assert [x.tpot_misses for x in m.instances] == [
        sum(result.requests.decode_instance[i] == j for i in late) for j in range(6)
    ]
    slow = [i for i in range(n) if not math.isnan(result.requests.first_token_s[i]) and not verdicts[i][0]]
    assert [x.ttft_misses for x in m.instances] == [
        sum(result.requests.prefill_instance[i] == j for i in slow) for j in range(6)
    ]


def test_latencies_by_brute_force() -> None:
    result = make_result(300, 7)
    m, r, arrival = summarize(result, SLOS), result.requests, result.trace.arrival_s
    done = np.flatnonzero(r.outcome == Outcome.FINISHED)
    tpot = [(r.finish_s[i] - r.first_token_s[i]) / (r.emitted[i] - 1) for i in done if r.emitted[i] > 1]
    started = ~np.isnan(r.first_token_s)
    samples = {
        "ttft_s": (r.first_token_s - arrival)[started],
        "tpot_s": np.array(tpot),
        "e2e_s": (r.finish_s - arrival)[done],
        "queueing_s": (r.prefill_start_s - arrival)[started],
        "decode_wait_s": (r.decode_start_s - r.first_token_s)[done],
        "migration_pause_s": result.migrations.pause_s,
        "itl_s": np.repeat(result.gaps.first_s, result.gaps.count),
    }
    for name, values in samples.items():
        s = getattr(m, name)
        assert s.count == len(values)
        assert s.mean == pytest.approx(values.mean())
        assert [s.p50, s.p90, s.p95, s.p99] == pytest.approx(np.quantile(values, [0.5, 0.9, 0.95, 0.99]).tolist())
        assert s.max == values.max()
    assert m.output_tokens_per_s == pytest.approx(r.emitted.sum() / result.simulated_s)
    assert m.prompt_tokens_per_s == pytest.approx(result.trace.prompt_tokens[started].sum() / result.simulated_s)
    assert (m.migrations, m.migrated_tokens, m.flips) == (15, result.migrations.tokens.sum(), 2)


def test_imbalance_by_brute_force() -> None:
    result = make_result(100, 3)
    t = result.timeline
    assert t is not None
    each = []
    for held, role in zip(t.resident_tokens, t.role, strict=True):
        mine = held[role != Role.PREFILL]
        each.append(mine.std() / mine.mean())
    assert summarize(result, SLOS).resident_cv == pytest.approx(np.mean(each))
    assert summarize(make_result(100, timeline=False), SLOS).resident_cv is None


def test_a_target_met_exactly_is_met() -> None:
    result = make_result(1, reject=0, unfinished=0)
    r = result.requests
    result = replace(
        result, requests=replace(r, first_token_s=np.array([0.5]), finish_s=np.array([2.5]), emitted=np.array([5]))
    )
    assert summarize(result, Slo(0.5, 0.5)).attainment == 1
    assert summarize(result, Slo(0.499, 0.5)).misses.ttft == 1
    assert summarize(result, Slo(0.5, 0.499)).misses.tpot == 1
    assert summarize(result, Slo()).attainment == 1


def test_nothing_finished_is_valid_json_without_nan() -> None:
    result = replace(make_result(5, reject=1.0, unfinished=0.0), gaps=TokenGaps(*(np.empty(0) for _ in range(4))))  # type: ignore[arg-type]
    m = summarize(result, Slo())
    assert (m.attainment, m.rejected, m.ttft_s.p99, m.itl_s.mean) == (0, 5, None, None)
    text = msgspec.json.encode(m)
    assert b"NaN" not in text and msgspec.json.decode(text, type=RunMetrics) == m


def test_round_trip_through_json() -> None:
    m = summarize(make_result(), SLOS)
    assert msgspec.json.decode(msgspec.json.encode(m), type=RunMetrics) == m


def test_a_class_without_slo_is_an_error() -> None:
    with pytest.raises(PenstockError, match="no SLO for class 'code'"):
        summarize(make_result(), {"chat": Slo()})


def test_importing_metrics_is_light() -> None:
    heavy = "('scipy', 'plotly', 'polars')"
    code = (
        f"import sys, penstock.report.metrics, penstock.report.repeat; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
