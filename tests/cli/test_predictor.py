"""``penstock predictor``, from prompts to tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.support import document, ok, penstock
from tests.predict.learned.support import in_torch, python_with_torch


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with a model, samples of 60 requests, and everything trained for two epochs."""
    python = python_with_torch()
    home = tmp_path_factory.mktemp("predictor")
    in_torch("make_model", str(home / "model"))
    lines = [json.dumps({"prompt_token_ids": [i % 15, i // 15], "family": "ab"[i % 2]}) for i in range(60)]
    (home / "prompts.jsonl").write_text("\n".join(lines))
    ok(
        "predictor", "train", "--model", home / "model", "--prompts", home / "prompts.jsonl", "--longest", "300",
        "-n", "60", "--out", home / "work", "--epochs", "2", "--threads", "1", "--python", python, "-q",
        "--json", home / "train.json",
    )  # fmt: skip
    return home


def test_train_evaluates(work: Path) -> None:
    said = json.loads((work / "train.json").read_text())
    names = [s["name"] for s in said["scores"]]
    assert names[0] == "head (median)" and len(names) == 12
    assert {"paper (L1)", "EGTP", "prompt-only MLP", "auxiliary encoder, bins", "history, mean"} <= set(names)
    assert all(s["mae"]["value"] > 0.0 for s in said["scores"])
    assert set(said["scores"][0]["by_family"]) <= {"a", "b"}


def test_eval_writes_everything(work: Path) -> None:
    out = ok(
        "predictor", "eval", "--out", work / "work", "--report", work / "page.html", "--svg", work / "p.svg"
    ).stdout  # fmt: skip
    for words in (
        "Error by tokens generated",
        "Error by true remaining length",
        "Coverage",
        "Beside the paper",
        "TRAIL",
    ):
        assert words in out
    assert "plotly" in (work / "page.html").read_text()
    assert (work / "p.svg").read_text().startswith("<svg")
    said = document("predictor", "eval", "--out", work / "work")
    trained = json.loads((work / "train.json").read_text())
    assert [s["mae"] for s in said["scores"]] == [s["mae"] for s in trained["scores"]], "the same figures again"


def test_show_and_the_wrong_model(work: Path) -> None:
    said = document("predictor", "show", work / "work", "--model", work / "model")
    assert said["layers"] == "16 → 32 → 8 → 5"
    assert said["quantiles"] == [0.1, 0.25, 0.5, 0.75, 0.9]
    about = json.loads((work / "work/head/head.json").read_text())
    (work / "work/head/head.json").write_text(json.dumps(about | {"model": "0123"}))
    try:
        for command in (("show", work / "work", "--model", work / "model"), ("eval", "--out", work / "work")):
            failed = penstock("predictor", *command)
            assert failed.exit_code == 2
            assert "0123" in failed.stderr and said["model"] in failed.stderr and failed.stderr.count("\n") == 1
    finally:
        (work / "work/head/head.json").write_text(json.dumps(about))


def test_samples_are_not_collected_twice(work: Path) -> None:
    python = python_with_torch()
    before = (work / "work/samples.npz").stat().st_mtime_ns
    result = ok(
        "predictor", "train", "--model", work / "model", "--out", work / "work", "--epochs", "1",
        "--threads", "1", "--no-rivals", "--features", "--python", python, "--name", "told",
    )  # fmt: skip
    assert "collecting no more" in result.stderr
    assert (work / "work/samples.npz").stat().st_mtime_ns == before
    assert document("predictor", "show", work / "work")["name"] == "told"
    assert document("predictor", "show", work / "work")["layers"].startswith("17 →")


def test_nothing_there(tmp_path: Path) -> None:
    for command, words in (("eval", "predictor collect"), ("show", "predictor train")):
        arguments = ("--out", tmp_path) if command == "eval" else (tmp_path,)
        failed = penstock("predictor", command, *arguments)
        assert failed.exit_code == 2
        assert words in failed.stderr
