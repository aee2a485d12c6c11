"""``penstock fluid``: the worked vector from the command line, and one line for every bad input."""

from __future__ import annotations

import pytest

from tests.cli.support import document, ok, penstock

TYPES = ("--type", "10:10@1000", "--type", "10:20@1000")
COST = ("--base", "10ms", "--per-token", "1us")


def test_the_worked_vector() -> None:
    found = document("fluid", *TYPES, *COST, "--capacity", "16000", "--thresholds", "26,26", "--rates", "500,4000")
    assert found["schema"] == "penstock.fluid/1"
    assert round(found["equilibrium"]["memory_tokens"], 1) == 14_096.4
    assert found["equilibrium"]["demand"] == 585_000
    assert found["verdict"]["memory_tokens"] == 15_210 and found["verdict"]["keeps_up"] and found["verdict"]["fits"]
    assert found["curve"]["full_rps"] == pytest.approx(2103.88, abs=0.01)
    assert [row["memory_tokens"] is None for row in found["memory_at"]] == [False, True]
    text = ok("fluid", *TYPES, *COST).stdout
    assert "M* 14,096.4 KV tokens" in text and "thresholds 26,26" in text and "keeps up" in text


def test_nested_and_practical_rules() -> None:
    found = document("fluid", *TYPES, *COST, "--nested", "--delta", "0.05", "--horizon", "100s")["nested"]
    assert found["thresholds"] == [56, 31] and found["bound"]["batch_tokens"] == 17_145
    assert document("fluid", *TYPES, *COST, "--cap", "832")["thresholds"] == pytest.approx([26, 26])


def test_a_model_on_its_hardware() -> None:
    found = document("fluid", "--type", "512:200@4", "--model", "llama-3.1-8b", "--hardware", "h100")
    assert found["capacity_tokens"] > 100_000
    assert 0 < found["cost"]["per_token_s"] < 1e-6 and 0.001 < found["cost"]["base_s"] < 0.05
    assert 0 < found["equilibrium"]["load"] < 1


def test_help_has_examples() -> None:
    assert "--type 10:10@1000" in " ".join(ok("fluid", "--help").stdout.split())


BAD = {
    "fluid": "no request types: give --type",
    "fluid --type 10@5": "type '10@5' cannot be read: write PROMPT:OUTPUT@RATE",
    "fluid --type 10:10@1 --base 10ms": "give both --base and --per-token",
    "fluid --type 10:10@9999 --base 10ms --per-token 1us": "unstable: 9999 requests/s",
    "fluid --type 10:10@5000 --base 10ms --per-token 1us --capacity 5": "overfull: the equilibrium holds",
    "fluid --type 10:10@5 --base 10ms --per-token 1us --thresholds x": "thresholds 'x' cannot be read",
    "fluid --type 10:10@5 --base 10ms --per-token 1us --thresholds 1,2": "2 thresholds for 1 types",
    "fluid --type 9:1@5 --type 8:1@5 --base 1ms --per-token 1us --nested": "give all types the same prompt",
    "fluid --type 9:1@5 --base 1ms --per-token 1us --capacity 0": "give --capacity above 0",
    "fluid --type 9:1@5 --base 0 --per-token 1us": "the time of an empty step must be above 0",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(line: str) -> None:
    result = penstock(*line.split())
    assert result.exit_code == 2
    assert BAD[line] in result.stderr and len(result.stderr.strip().splitlines()) == 1
