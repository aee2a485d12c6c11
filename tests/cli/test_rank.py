"""``penstock rank`` from the outside."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.cli.support import document, ok, penstock

QUICK = ("rank", "--gpus", "2", "--tps", "1", "--chunks", "512", "-n", "120", "--jobs", "1")


def test_document_table_and_page(tmp_path: Path) -> None:
    page = tmp_path / "rank.html"
    found = document(*QUICK, "--repeat", "2", "--price", "2", "--report", page)
    assert found["schema"] == "penstock.rank/1" and found["seeds"] == [0, 1]
    by_name = {c["name"]: c for c in found["candidates"]}
    assert set(by_name) == {
        "1M whole prompts", "2M whole prompts", "1M chunks 512", "2M chunks 512", "1P+1D",
    }  # fmt: skip
    searched = [c for c in found["candidates"] if c["status"] == "searched"]
    each = [c["goodput_per_gpu_rps"] for c in searched]
    assert each == sorted(each, reverse=True) and min(each) > 0
    for c in searched:
        assert c["goodput_rps"]["n"] == 2 and c["goodput_rps"]["half_width"] is not None and c["reason"]
        assert c["requests_per_usd"] == pytest.approx(3600 * c["goodput_rps"]["mean"] / (2 * c["gpus"]))
    assert any(c["on_front"] for c in searched)
    assert found["candidates"][0]["name"] in found["conclusion"]
    assert {s["input"] for s in found["sensitivity"]} >= {"arrivals and lengths drawn"}
    assert len(found["commands"]["vllm"]) == found["candidates"][0]["gpus"]
    assert shlex.split(found["commands"]["serve"])[:2] == ["penstock", "serve"]
    text = page.read_text()
    assert "cost and goodput" in text.lower() and all(name in text for name in by_name)


def test_what_is_printed() -> None:
    text = ok(*QUICK, "--no-sensitivity", "--price", "2").stdout
    for name in ("1M whole prompts", "1P+1D", "highest goodput per GPU", "wins by", "Just above that rate:"):
        assert name in text
    assert "vllm.entrypoints.openai.api_server" in text and "penstock serve --attach" in text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--gpus", "0"), "GPU budget '0' cannot be read: write --gpus 8"),
        (("--gpus", "h1000=3"), "did you mean h100"),
        (("--tps", "two"), "--tps 'two' cannot be read"),
        (("--model", "deepseek-v3"), "fits no arrangement of 2 x a100-80g"),
        (("--tpot", "1ms"), "no arrangement meets the targets at any rate"),
        (("--ttft", "none", "--tpot", "none"), "without a target every rate meets the SLO"),
        (("--requests", "0"), "0 requests: give --requests of 1 or more"),
        (("--policy", "mixed"), "does not disaggregate"),
        (("--top", "0"), "give --top of 1 or more"),
        (("--kv-dtypes", "fp9"), "unknown number type 'fp9'"),
        (("--price", "free"), "cannot be read"),
        (("--ray", "127.0.0.1:1"), "Ray"),
    ],
)
def test_bad_input_is_one_line(args: tuple[str, ...], said: str) -> None:
    result = penstock(*QUICK, *args)
    assert result.exit_code == 2, result.output
    assert said in result.stderr and result.stderr.count("penstock: ") == 1
    assert "Traceback" not in result.stderr
