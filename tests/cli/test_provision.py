"""``penstock provision``: SPAD's arithmetic and a search from the command line, and one line for every bad input."""

from __future__ import annotations

import pytest

from tests.cli.support import document, ok, penstock

CODE = "18xspad-prefill+7xspad-decode"


def test_the_published_savings() -> None:
    found = document("provision", "--mix", CODE, "--against", "25xh100", "--against", "21xh100+4xh100-450w")
    assert found["mix"]["cost"] == pytest.approx(14.7, abs=0.05) and found["mix"]["tdp"] == pytest.approx(
        20.4, abs=0.05
    )
    uniform, capped = found["mix"]["against"]
    assert uniform["cost_saving"] == pytest.approx(0.41, abs=0.005)
    assert capped["tdp_saving"] == pytest.approx(0.13, abs=0.0053)
    chips = {one["name"]: one for one in found["chips"]}
    assert chips["spad-prefill"]["cost"] == pytest.approx(0.48, abs=0.005)
    assert chips["spad-decode"]["tdp_w"] == pytest.approx(507, abs=0.5)


SMALL = ("--rps", "30", "--isl", "1500", "--osl", "30", "--model", "llama-3.1-70b", "--tp", "8", "--slowdown", "4/2")


def test_the_cheapest_mix_is_first_and_carries_the_rate() -> None:
    found = document("provision", *SMALL)
    costs = [one["cost"] for one in found["mixes"]]
    assert costs == sorted(costs) and costs[0] < found["homogeneous"]["cost"]
    assert all(one["capacity_rps"] >= 30 for one in found["mixes"])
    assert found["mixes"][0]["prefill_chip"] == "spad-prefill"
    assert "hardware" in found["text"] and found["verify"] is None


def test_owned_machines_change_roles() -> None:
    owned = ("--have-prefill", "1xh100", "--have-decode", "9xh100")
    found = document("provision", *SMALL, *owned)["repurposed"]
    assert found["assignment"]["holds"] and 1 <= found["assignment"]["moved"] <= 8
    few = document("provision", *SMALL, "--have-prefill", "1xh100", "--have-decode", "1xh100")["repurposed"]
    assert not few["assignment"]["holds"] and "not enough" in few["text"]


def test_the_mix_is_simulated() -> None:
    args = ("--rps", "12", "--isl", "1500", "--osl", "30", "--tp", "8", "--ttft", "0.5", "--tpot", "0.05")
    found = document("provision", *args, "--types", "h100,spad-decode", "--verify", "-n", "600")
    (check,) = found["verify"]
    assert check["holds"] and check["simulated_rps"]["mean"] > 12


def test_help_has_examples() -> None:
    assert "--against 25xh100" in " ".join(ok("provision", "--help").stdout.split())


BAD = {
    "provision --mix 18": "mix '18' cannot be read: write 18xspad-prefill+7xspad-decode",
    "provision --mix 3xh1000": "unknown machine type 'h1000': did you mean h100",
    "provision --against 3xh100": "--against without --mix",
    "provision --types h200 --rps 3 --isl 9 --osl 9": "unknown machine type 'h200'",
    "provision --rps 3 --isl 900 --osl 90 --minimise money": "unknown goal 'money': minimise cost or tdp",
    "provision --rps 3 --isl 900 --osl 90 --slowdown 3": "slowdown '3' cannot be read",
    "provision --rps 3 --isl 900 --osl 90 --slowdown 0.5/2": "write TTFT/TPOT above 1",
    "provision --rps 3 --isl 900 --osl 90 --have-prefill 3xh100": "give both --have-prefill and --have-decode",
    "provision --rps 3 --isl 900 --osl 90 --ttft 1ms": "no machine type can prefill within the SLO",
    "provision --rps 3 --isl 900 --osl 90 --tpot 1us": "no machine type can decode within the SLO",
    "provision --rps 0 --isl 900 --osl 90": "is not positive",
    "provision --rps 3 --isl 900 --osl 90 --tp 16": "does not divide",
    "provision --rps 3 --isl 900 --osl 90 --model llama-3.1-70b": "GiB of weights",
}


@pytest.mark.parametrize("command", BAD)
def test_one_line_says_what_to_change(command: str) -> None:
    result = penstock(*command.split(), "--quiet")
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("penstock: ") and BAD[command] in lines[0], result.stderr
