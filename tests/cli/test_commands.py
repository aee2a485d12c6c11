"""What the commands print and write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock.cli.main import app
from penstock.experiment.setup import setup_from_plain
from penstock.policy.registry import PRESETS
from penstock.report.metrics import RunMetrics
from tests.cli.support import SMALL, document, ok


def without_clock(content: Any) -> Any:
    """A document without what differs between two equal runs."""
    if isinstance(content, dict):
        return {key: without_clock(value) for key, value in content.items() if key != "wall_seconds"}
    return [without_clock(value) for value in content] if isinstance(content, list) else content


def test_simulate_accounts_for_every_request_and_writes_its_document(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = ok("simulate", *SMALL, "--json", out, "--csv", tmp_path / "r.csv", "--report", tmp_path / "r.html")
    found = json.loads(out.read_text())
    assert set(RunMetrics.__struct_fields__) <= set(found)
    assert {"schema", "penstock", "seed", "diagnosis", "notes", "setup"} <= set(found)
    assert found["schema"] == "penstock.simulate/1"
    assert found["finished"] + found["rejected"] + found["unfinished"] == found["requests"] == 60
    assert setup_from_plain(found["setup"]).workload.rate_rps == 20
    assert "met the SLO for" in result.stdout and found["diagnosis"]["text"][:20] in result.stdout
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 61
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


def test_json_on_stdout_is_nothing_but_json() -> None:
    result = ok("simulate", *SMALL, "--json", "-")
    json.loads(result.stdout)
    assert "met the SLO for" in result.stderr


def test_quiet_says_nothing(tmp_path: Path) -> None:
    result = ok("simulate", *SMALL, "-q", "--json", tmp_path / "x.json")
    assert result.output == ""


@pytest.mark.parametrize("policy", ["ares", "arrow", "mixed"])
def test_same_seed_same_document_except_for_the_clock(policy: str) -> None:
    args = ("simulate", *SMALL, "--policy", policy, "--noise", "0.05", "--fault", "down:3@1s,up:3@2s")
    first, second, other = document(*args), document(*args), document(*args, "--seed", "1")
    assert without_clock(first) == without_clock(second)
    assert first["ttft_s"] != other["ttft_s"]


def test_stepping_gives_the_same_latencies() -> None:
    leaping, stepping = document("simulate", *SMALL), document("simulate", *SMALL, "--stepping")
    assert leaping["ttft_s"]["mean"] == pytest.approx(stepping["ttft_s"]["mean"], rel=1e-9)
    assert leaping["e2e_s"]["p99"] == pytest.approx(stepping["e2e_s"]["p99"], rel=1e-9)


def test_repeat_gives_every_figure_an_interval() -> None:
    found = document("simulate", *SMALL, "--repeat", "3", "--jobs", "1")
    figures = found["repeated"]["figures"]
    assert figures["ttft_s.p99"]["n"] == 3 and figures["ttft_s.p99"]["half_width"] > 0
    assert found["repeated"]["repeats"] == 3
    assert "95 % confidence" in " ".join(ok("simulate", *SMALL, "--repeat", "2", "-j", "1").stdout.split())


def test_repeating_what_is_not_random_says_so(tmp_path: Path) -> None:
    ok("trace", "make", "512/64", tmp_path / "t.jsonl", "-n", "40", "-q")
    result = ok("simulate", "--trace", tmp_path / "t.jsonl", "--policy", "least-kv", "--repeat", "2", "-j", "1")
    assert "nothing is random" in result.stderr
    assert "nothing is random" not in ok("simulate", *SMALL, "--repeat", "2", "-j", "1").stderr


def test_classes_have_their_own_targets() -> None:
    args = ("simulate", *SMALL, "--class", "chat=0.5", "--class", "batch=0.5", "--slo", "chat=400ms/40ms")
    found = document(*args, "--slo", "batch=none/200ms")
    assert found["classes"]["chat"]["ttft_target_s"] == 0.4
    assert found["classes"]["batch"]["ttft_target_s"] is None
    assert found["classes"]["batch"]["tpot_target_s"] == 0.2


def test_mixed_takes_prefill_and_decode_together_and_says_so() -> None:
    result = ok("simulate", *SMALL, "--policy", "mixed", "--prefill", "1", "--decode", "2")
    assert "it gets 3 mixed instances" in result.stderr
    assert len(document("simulate", *SMALL, "--policy", "mixed", "--mixed", "5")["instances"]) == 5


def test_different_hardware_and_belief_reach_the_run() -> None:
    base = document("simulate", *SMALL)
    fast = document("simulate", *SMALL, "--prefill-hardware", "h100", "--prefill-tp", "2")
    assert fast["ttft_s"]["p50"] < 0.6 * base["ttft_s"]["p50"]
    profile = document("simulate", *SMALL, "--profile", "rtx-4090/llama-3.1-8b", "--hardware", "rtx-4090")
    assert profile["tpot_s"]["p50"] > base["tpot_s"]["p50"]
    said = ok("simulate", *SMALL, "--profile", "rtx-4090/llama-3.1-8b").stderr
    assert "but memory and link are those of a100-80g" in said
    pulled = (*SMALL, "--policy", "least-kv")
    slow_link, link = document("simulate", *pulled, "--link-bandwidth", "1"), document("simulate", *pulled)
    assert slow_link["decode_wait_s"]["p50"] > 3 * link["decode_wait_s"]["p50"]


def test_compare_runs_all_policies_on_the_same_requests(tmp_path: Path) -> None:
    args = ("compare", *SMALL, "--policies", "round-robin,least-kv,mixed", "--jobs", "2")
    found = document(*args, "--report", tmp_path / "c.html")
    assert [run["policy"] for run in found["runs"]] == ["round-robin", "least-kv", "mixed"]
    assert len({run["result"]["offered_rps"] for run in found["runs"]}) == 1
    assert without_clock(found) == without_clock(document(*args[:-1], "1"))
    assert "round-robin" in (tmp_path / "c.html").read_text()


def test_compare_sweeps_rates_and_repeats() -> None:
    found = document("compare", "-n", "40", "--policies", "least-kv", "--rates", "4,8", "--repeat", "2", "-j", "1")
    assert [run["rate_rps"] for run in found["runs"]] == [4, 8]
    assert found["runs"][1]["repeated"]["figures"]["attainment"]["n"] == 2


def test_every_policy_compares() -> None:
    found = document("compare", *SMALL, "--policies", "all", "-j", "1")
    assert [run["policy"] for run in found["runs"]] == list(PRESETS)
    assert all(run["result"]["finished"] == 60 for run in found["runs"])


def test_goodput_reports_rate_evaluations_and_what_binds(tmp_path: Path) -> None:
    args = ("goodput", "-n", "150", "--policies", "least-kv,mixed", "--repeat", "2", "--jobs", "1")
    found = document(*args, "--tolerance", "0.1", "--report", tmp_path / "g.html")
    for entry in found["policies"]:
        search = entry["searches"][0]
        rates = {e["rate_rps"]: e["attainment"] for e in search["evaluations"]}
        assert rates[search["rate_rps"]] >= 0.9
        assert min(rate for rate, share in rates.items() if share < 0.9) <= 1.1 * search["rate_rps"]
        assert entry["half_width_rps"] is not None and search["diagnosis"]["binding"] != "nothing"
    assert "sustains" in (tmp_path / "g.html").read_text()


def test_goodput_of_an_slo_out_of_reach_says_by_how_much() -> None:
    result = ok("goodput", "-n", "60", "--ttft", "50ms")
    said = " ".join(result.stdout.split())
    assert "even at the lowest rate tried" in said and "times the target" in said and "Prefill compute binds" in said


def test_catalogues_list_what_is_built_in() -> None:
    assert {m["name"] for m in document("models")} >= {"llama-3.1-8b", "deepseek-v3"}
    assert all(m["source"] for m in document("models"))
    assert {h["name"] for h in document("hardware")} >= {"a100-80g", "h100"}
    assert [p["name"] for p in document("policies")] == list(PRESETS)


def test_trace_describe_make_and_convert(tmp_path: Path) -> None:
    made, cut = tmp_path / "made.jsonl.gz", tmp_path / "cut.jsonl"
    ok("trace", "make", "azure-conv", made, "-n", "300", "--rate", "10", "--class", "chat=1")
    found = document("trace", "describe", made, "--report", tmp_path / "t.html")
    assert found["requests"] == 300 and found["classes"] == {"chat": 300}
    assert "Arrival rate" in (tmp_path / "t.html").read_text()
    ok("trace", "convert", made, cut, "--duration", "10s")
    assert 50 < document("trace", "describe", cut)["requests"] < 150


def test_version_and_help() -> None:
    assert ok("--version").stdout.startswith("penstock 0.")
    text = ok("simulate", "--help").stdout
    assert "--policy" in text and "50ms" in text
    for command in app.registered_commands:
        assert command.callback is not None and command.callback.__doc__


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from penstock.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = [m for m in ('numpy', 'scipy', 'polars', 'plotly', 'joblib', 'msgspec') if m in sys.modules]\n"
        "sys.exit(len(heavy))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
