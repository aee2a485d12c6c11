"""Repeats, tables, words, CSV and the HTML page."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType
from scipy import stats  # type: ignore[import-untyped, unused-ignore]

from penstock.core.errors import PenstockError
from penstock.core.types import Slo
from penstock.report.columns import COMPARISON, best, cells, percent, seconds
from penstock.report.export import write_requests_csv
from penstock.report.figures import COLOURS, resident_tokens
from penstock.report.html import render, write_html
from penstock.report.metrics import summarize
from penstock.report.repeat import combine, interval
from penstock.report.shrink import cdf, cdf_of_gaps, extremes
from penstock.report.tables import GoodputRow, comparison_table, goodput_table, run_table
from penstock.report.words import compare, conclude
from tests.report.factory import make_result

SLO = Slo(0.6, 0.035)


def shown(table: RenderableType, width: int = 120) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9))
def test_interval_is_student_t(values: list[float]) -> None:
    found = interval(values)
    assert found.half_width is not None
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values) or 1e-300)
    assert found.mean - found.half_width == pytest.approx(low, rel=1e-9, abs=1e-6)
    assert found.mean + found.half_width == pytest.approx(high, rel=1e-9, abs=1e-6)


def test_combine_covers_every_figure() -> None:
    runs = [summarize(make_result(200, seed, reject=0.2 * (seed == 1)), SLO) for seed in range(3)]
    both = combine(runs)
    assert both.figures["ttft_s.p99"].mean == pytest.approx(np.mean([run.ttft_s.p99 for run in runs]))
    assert both.figures["reject_reasons.queue_full"].n == 3
    assert combine(runs[:1]).figures["attainment"].half_width is None
    with pytest.raises(ValueError, match="different policies"):
        combine([runs[0], summarize(make_result(20, policy="other"), SLO)])
    with pytest.raises(ValueError, match="no runs"):
        combine([])


def test_words_name_the_slow_instance() -> None:
    run = summarize(make_result(2000, slow=4, reject=0, unfinished=0), Slo(60, 0.05))
    assert re.search(
        r"^least-kv met the SLO for 7\d\.\d% of 2,000 requests; all \d+ misses are TPOT, \d+% of", conclude(run)
    )
    assert conclude(run).endswith("on decode instance 4.")
    assert (
        conclude(summarize(make_result(50, reject=0, unfinished=0), Slo()), "x")
        == "x met the SLO for 100% of 50 requests."
    )
    other = summarize(make_result(2000, reject=0, unfinished=0), Slo(60, 0.05))
    assert compare({"a": run, "b": other}).startswith("b meets the SLO most often, ")
    faster = msgspec.structs.replace(other, offered_rps=2 * other.offered_rps)
    assert compare({"a": run, "b": faster, "c": other}) == f"{conclude(other, 'c')} {conclude(faster, 'b')}"


def test_tables_fit_and_mark_the_best() -> None:
    runs = {"a": summarize(make_result(500), SLO), "b": summarize(make_result(500, load=2.0), SLO)}
    rows = [cells(m) for m in runs.values()]
    winners = best(COMPARISON, rows)
    assert winners[0] == {0} and winners[[c.key for c in COMPARISON].index("flips")] == set()
    assert best(COMPARISON, rows[:1])[0] == set()
    assert percent(runs["b"].attainment) in shown(comparison_table(runs), 110)
    text = shown(run_table(runs["a"]))
    for word in ("TTFT", "chat", "0 prefill", "5 decode", "goodput", "queue_full"):
        assert word in text
    repeated = combine([summarize(make_result(200, seed), SLO) for seed in range(3)])
    assert "±" in shown(comparison_table({"a": repeated}))
    narrow = shown(comparison_table({"a long name @ 0.25/s": runs["a"], "b": runs["b"]}, width=80), 80)
    assert "No room for ITL p99" in narrow and "…" not in narrow
    assert "…" not in shown(run_table(runs["a"]), 80)
    goodput = shown(goodput_table([GoodputRow("ares", 12.34, 0.91, 4, "TPOT", 0.5), GoodputRow("none", None, None, 4)]))
    assert "12.3 ± 0.50" in goodput and "3.08" in goodput and "at least 90%" in goodput


def test_large_clusters_list_the_busiest() -> None:
    assert "The 16 busiest of 40 instances" in shown(run_table(summarize(make_result(100, decodes=38), SLO)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (2e-6, "2.00 µs"),
        (0.0412, "41.2 ms"),
        (0.9999, "1.00 s"),
        (75.5, "75.5 s"),
        (900, "15.0 min"),
        (4e4, "11.1 h"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text


def test_percent_does_not_round_to_all_or_nothing() -> None:
    assert [percent(x) for x in (0, 1e-5, 0.9714, 0.99999, 1)] == ["0%", "<0.1%", "97.1%", ">99.9%", "100%"]


def test_csv_has_a_row_a_request(tmp_path: Path) -> None:
    result = make_result(200, 5)
    write_requests_csv(tmp_path / "r.csv", result, SLO)
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 200
    assert sum(row["met"] == "true" for row in rows) == round(summarize(result, SLO).attainment * 200)
    refused = [row for row in rows if row["outcome"] == "rejected"]
    assert refused and all(row["ttft_s"] == row["finish_s"] == row["decode_instance"] == "" for row in refused)
    assert float(rows[3]["arrival_s"]) == result.trace.arrival_s[3]
    with pytest.raises(PenstockError, match="cannot write"):
        write_requests_csv(tmp_path / "absent" / "r.csv", result)


def test_page_is_self_contained_and_small(tmp_path: Path) -> None:
    runs = {"a<b": make_result(20_000, 1), "c": make_result(20_000, 2, decodes=60)}
    write_html(tmp_path / "p.html", runs, {"chat": SLO, "code": Slo()}, title="A & B")
    page = (tmp_path / "p.html").read_text()
    own = re.sub(r'<script type="text/plain" id="plotly">.*?</script>', "", page, flags=re.DOTALL)
    assert len(own) < 1_000_000 and len(page) < 3_500_000
    assert not re.search(r"""(src|href)=["']?http|@import|url\(""", own)
    assert "<title>A &amp; B</title>" in own and "a&lt;b" in own and "a<b" not in own
    found = re.findall(r"<script type=application/json>(.*?)</script>", own, flags=re.DOTALL)
    assert len(found) == 6 and all(json.loads(part)["data"] for part in found)
    with pytest.raises(PenstockError, match="cannot write"):
        write_html(tmp_path, runs, SLO)
    with pytest.raises(ValueError, match="no run"):
        render({}, SLO)


def test_page_without_timeline_migrations_or_finished_requests() -> None:
    empty = replace(make_result(30, reject=1.0, unfinished=0.0, timeline=False), flips=make_result().flips)
    assert "This run recorded no timeline" in render({"a": empty}, SLO)
    assert resident_tokens(make_result(10, decodes=20)).data[0].type == "heatmap"


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_stand_out_on_light_and_dark(colour: str) -> None:
    assert 1.05 / (luminance(colour) + 0.05) >= 3
    assert (luminance(colour) + 0.05) / (luminance("#181d24") + 0.05) >= 3


def test_shrinking_keeps_the_picture() -> None:
    values = np.random.default_rng(0).gamma(2, 1, 50_000)
    x, y = cdf(values)
    assert len(x) <= 240 and np.quantile(values, y) == pytest.approx(x)
    values[777] = 99
    assert 777 in extremes(values, 100) and len(extremes(values, 100)) <= 102
    gaps = make_result(2000).gaps
    x, y = cdf_of_gaps(gaps)
    everything = np.sort(np.repeat(gaps.first_s, gaps.count))
    assert np.all(np.searchsorted(everything, x, side="left") <= y * len(everything) + 1e-6)
    assert np.all(np.searchsorted(everything, x, side="right") >= y * len(everything) - 1e-6)
