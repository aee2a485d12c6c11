"""``penstock plan``: the published example from the command line, its files, and one line for every bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.support import document, ok, penstock
from tests.plan.support import ladder_file

EXAMPLE = (
    "plan", "--tpm", "5e6", "--isl", "6144", "--osl", "512", "--ttft", "2", "--tpot", "0.02", "--overhead", "0.1",
    "--prefill-throughput", "28300", "--gpus-per-instance", "8",
)  # fmt: skip


def test_the_published_example(tmp_path: Path) -> None:
    found = document(*EXAMPLE, "--decode-ladder", ladder_file(tmp_path), "--price", "4", "--shortfall", "0.03")
    assert found["schema"] == "penstock.plan/1"
    assert found["prefill_throughput"] == pytest.approx(25_066, abs=0.5)
    assert found["decode_throughput"] == pytest.approx(1_691, abs=0.5)
    assert found["pd_ratio"] == pytest.approx(0.81, abs=0.005)
    assert found["prefill_instances"] == pytest.approx(3.07, abs=0.005)
    assert found["decode_instances"] == pytest.approx(3.79, abs=0.005)
    assert [(o["rule"], o["prefill"], o["decode"]) for o in found["options"]] == [
        ("floor", 3, 3), ("nearest", 3, 4), ("ceil", 4, 4),
    ]  # fmt: skip
    assert found["recommended"]["rule"] == "nearest" and found["recommended"]["cost_per_hour"] == 7 * 8 * 4
    assert found["sensitivity"][0]["input"] == "decode speed"
    ranges = found["ranges"]["decode_instances"]
    assert ranges["low"] < ranges["fit_low"] < ranges["value"] < ranges["fit_high"] < ranges["high"]
    assert any("linear interpolation gives 1,714" in note for note in found["notes"])
    assert found["verify"] is None


def test_requests_a_second_are_the_same_demand(tmp_path: Path) -> None:
    ladder = ladder_file(tmp_path)
    by_tokens = document(*EXAMPLE, "--decode-ladder", ladder)
    same = ["--rps", str(5e6 / 60 / 6656)]
    by_requests = document("plan", *same, *EXAMPLE[3:], "--decode-ladder", ladder)
    assert by_requests["decode_instances"] == pytest.approx(by_tokens["decode_instances"])
    assert by_requests["demand_tpm"] == pytest.approx(5e6)


def test_verification_and_its_page(tmp_path: Path) -> None:
    page, out = tmp_path / "plan.html", tmp_path / "plan.json"
    args = ("--verify", "--repeat", "1", "-j", "1", "--report", page, "--json", out)
    result = ok("plan", "--rps", "12", "--isl", "400", "--osl", "40", "--ttft", "0.5", *args)
    found = json.loads(out.read_text())
    first = found["verify"][0]
    assert (first["prefill"], first["decode"]) == (found["recommended"]["prefill"], found["recommended"]["decode"])
    assert first["holds"] and first["ratio"] > 0.5
    assert first["simulated_rps"]["mean"] > 12
    assert "holds both targets at the demand" in result.stdout
    html = page.read_text()
    assert "Plan: 1P1D" in html and "Capacity by split" in html and "<script" in html


def test_a_profile_brings_its_error_and_a_trace_its_rate(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    rows = [f"2023-11-16 18:15:{s:02d}.0,{300 + 10 * s},{20 + s}" for s in range(60)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    found = document("plan", "--trace", trace, "--hardware", "rtx-4090", "--profile", "rtx-4090/llama-3.1-8b")
    assert found["demand_rps"] == pytest.approx(1.0)
    assert found["isl"] == pytest.approx(595) and found["osl"] == pytest.approx(49.5)
    assert found["source"] == "profile rtx-4090/llama-3.1-8b"
    ranges = found["ranges"]["prefill_instances"]
    assert ranges["fit_low"] < ranges["value"] < ranges["fit_high"]
    assert found["recommended"]["cost_per_hour"] is None and any("--price" in note for note in found["notes"])


def test_help_has_examples() -> None:
    assert "--decode-ladder ladder.csv" in " ".join(ok("plan", "--help").stdout.split())


LENGTHS = ("--isl", "1000", "--osl", "100")
BAD = {
    "plan": "no lengths are given: give --isl and --osl, --trace FILE or --synthetic NAME",
    "plan --isl 1000 --rps 3": "one mean length without the other",
    "plan --isl 1000 --osl 0 --rps 3": "--osl 0 is out of range",
    "plan --isl 1000 --osl 100 --synthetic sharegpt --rps 3": "mean lengths and a workload are both given",
    "plan --isl 1000 --osl 100": "no demand is given: give --rps, or --tpm",
    "plan --isl 1000 --osl 100 --rps 0": "demand 0 requests/s is not positive: give --rps or --tpm above 0",
    "plan --isl 1000 --osl 100 --tpm -5": "is not positive",
    "plan --isl 1000 --osl 100 --rps 3 --tpm 5e6": "--rps and --tpm are both given",
    "plan --isl 1000 --osl 100 --rps 3 --ttft 1ms": "TTFT 1.00 ms cannot be met",
    "plan --isl 1000 --osl 100 --rps 3 --tpot 1ms": "TPOT 1.00 ms cannot be met",
    "plan --isl 1000 --osl 100 --rps 3 --ttft none": "the planner needs both targets",
    "plan --isl 1000 --osl 100 --rps 3 --model llama-3.1-70b": "GiB of weights",
    "plan --isl 1000 --osl 100 --rps 3 --percentile 100": "percentile 100 is not between",
    "plan --isl 1000 --osl 100 --rps 3 --queue fifo": "unknown queue 'fifo'",
    "plan --isl 1000 --osl 100 --rps 3 --overhead 3s": "cannot be met: mean prefill",
    "plan --isl 1000 --osl 100 --rps 3 --prefill-throughput 100": "half of a benchmark: give --decode-ladder FILE",
    "plan --isl 1000 --osl 100 --rps 3 --decode-ladder x.csv": "half of a benchmark: give --prefill-throughput",
    "plan --isl 1000 --osl 100 --rps 3 --prefill-throughput 9 --decode-ladder /x.csv": "cannot read /x.csv",
    "plan --isl 1000 --osl 100 --rps 3 --price cheap": "price 'cheap' cannot be read",
    "plan --isl 1000 --osl 100 --rps 3 --price h1000=3": "unknown hardware 'h1000'",
    "plan --isl 1000 --osl 100 --rps 3 --shortfall 2": "shortfall 2 is not in [0, 1)",
    "plan --isl 1000 --osl 100 --rps 3 --fit-error 2": "fit error 2 is not in [0, 1)",
    "plan --isl 1000 --osl 100 --rps 3 --verify --repeat 0": "0 repetitions",
    "plan --isl 1000 --osl 100 --rps 3 --policy nope": "no policy is called 'nope'",
    "plan --isl 1000 --osl 100 --rps 3 --window 0s": "window of 0 s",
    "plan --isl 1000 --osl 100 --rps 3 --report /nowhere/x.html": "cannot write /nowhere/x.html",
    "plan --trace /nowhere.csv": "/nowhere.csv does not exist",
}


@pytest.mark.parametrize("command", BAD)
def test_one_line_says_what_to_change(command: str) -> None:
    result = penstock(*command.split(), "--quiet")
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("penstock: ") and BAD[command] in lines[0], result.stderr


@pytest.mark.parametrize(("tpot", "said"), [("10ms", "below the lowest"), ("30ms", "above the highest")])
def test_a_target_off_the_ladder_says_what_to_measure(tpot: str, said: str, tmp_path: Path) -> None:
    result = penstock(*EXAMPLE, "--decode-ladder", ladder_file(tmp_path), "--tpot", tpot)
    assert result.exit_code == 2 and said in result.stderr and "measure" in result.stderr
