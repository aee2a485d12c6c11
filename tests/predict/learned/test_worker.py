"""Collecting and training, where torch is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from penstock.core.errors import PenstockError
from penstock.predict.learned.run import run_task
from penstock.predict.learned.samples import load_samples
from penstock.predict.learned.tasks import Collect, Train
from tests.predict.learned.support import in_torch, python_with_torch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("model"))
    in_torch("make_model", folder)
    return folder


def test_guessing_and_checking_is_greedy_decoding(model: str) -> None:
    """Whatever the guess: right, wrong in the middle, missing, nonsense."""
    source = np.random.default_rng(0)
    prompts = [source.integers(0, 15, source.integers(1, 9)).tolist() for _ in range(32)]
    found = in_torch("trick", model, prompts, 60)
    assert found["verified"] == found["right"] > 2
    ended = 0
    for row in found["rows"]:
        if row["truth"][-1] != 15:
            assert row["output"] is None, "an output that does not end is no sample"
            continue
        ended += 1
        assert row["output"] == row["truth"]
        assert row["off"] < 0.02 and row["pooled_off"] < 0.02, "states are stored in half precision"
        assert row["logits_off"] < 1e-4, "the states are what the output layer gets"
        assert row["generated"] in row["places"]
        assert row["entropy"] == pytest.approx(row["true_entropy"], abs=1e-3)
    assert ended > 8


def test_pinball_finds_the_quantiles() -> None:
    found = in_torch("quantiles_of_noise", 8000)
    np.testing.assert_allclose(found["predicted"], found["in_torch"], atol=1e-5)
    np.testing.assert_allclose(found["predicted"], found["true"], atol=0.08)


def test_losses_by_hand() -> None:
    found = in_torch("loss_values")
    assert found["median"] == pytest.approx((0.5 * 1 + 0.5 * 4) / 2)
    assert found["p90"] == pytest.approx((0.9 * 1 + 0.1 * 4) / 2)
    logs = (0.5 * np.log(4 / 3) + 0.5 * np.log(6 / 2)) / 2
    assert found["both"] == pytest.approx(logs + (0.5 * 1 + 0.5 * 4) / 2 / 2.0)
    assert found["absolute"] == pytest.approx((1 + 4) / 2)
    # Two equal bins of middles 5 and 15: cross-entropy ln 2 whatever the soft label, expected value 10, off by half.
    assert found["soft"] == pytest.approx(0.95 * np.log(2.0) + 0.05 * 0.25)


def test_the_encoder_is_the_same_in_numpy() -> None:
    assert in_torch("encoders", "") < 1e-4


def test_prompts_of_ones_own(model: str, tmp_path: Path) -> None:
    python = python_with_torch()
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt_token_ids": [i % 15, i // 15]}) + "\n\n" for i in range(40)))
    said: list[str] = []
    tasks = [
        Collect(model, str(tmp_path / str(t)), 40, prompts=str(path), temperature=t, longest=100, threads=1)
        for t in (0, 1.5)
    ]
    for task in tasks:
        run_task(task, lambda what, done, total: said.append(f"{what} {done}/{total}"), python)
    greedy, warm = (load_samples(task.out) for task in tasks)
    assert said and any(line.startswith("decoding 40/40") for line in said)
    assert greedy.about.requests + greedy.about.cut == 40
    assert greedy.about.verified == 0
    assert (greedy.prompt_tokens == 2).all()
    assert warm.about.temperature == 1.5
    assert sorted(warm.output_tokens.tolist()) != sorted(greedy.output_tokens.tolist())
    run_task(tasks[1], None, python)
    assert load_samples(tasks[1].out).output_tokens.tolist() == warm.output_tokens.tolist(), "same seed, same draws"


def test_what_the_user_can_mend(model: str, tmp_path: Path) -> None:
    python = python_with_torch()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt_token_ids": [1]}\n{"text": "x"}\n')
    with pytest.raises(PenstockError, match=r"bad\.jsonl:2 has no prompt"):
        run_task(Collect(model, str(tmp_path), 9, prompts=str(bad)), None, python)
    with pytest.raises(PenstockError, match="no fingerprint"):
        run_task(Collect(str(tmp_path), str(tmp_path), 9), None, python)
    with pytest.raises(PenstockError, match="no samples"):
        run_task(Train(str(tmp_path)), None, python)
    with pytest.raises(PenstockError, match="needs torch"):
        run_task(Train(str(tmp_path)), None, "/bin/false")
