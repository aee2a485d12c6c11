"""The head: its files, its arithmetic, and whose model it belongs to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.predict.learned.calibrate import shifts
from penstock.predict.learned.head import Head, load_head, rising, save_head, with_features
from penstock.predict.learned.mlp import mlp_of
from penstock.predict.learned.tensors import read_tensors, write_tensors
from tests.predict.learned.support import in_torch, linear, random_mlp

LEVELS = (0.1, 0.5, 0.9)


def head(features: int = 0, seed: int = 0) -> Head:
    scale = np.random.default_rng(seed).normal(size=3).astype(np.float32)
    return Head(random_mlp((6 + features, 12, 5, 3), seed), scale, LEVELS, "abcd", "test", 20, features, {"epochs": 3})


def test_files_go_and_come(tmp_path: Path) -> None:
    made = head(features=1)
    save_head(tmp_path / "head", made)
    read = load_head(tmp_path / "head", "abcd")
    assert (read.quantiles, read.model, read.name, read.every, read.features, read.trained) == (
        LEVELS, "abcd", "test", 20, 1, {"epochs": 3},
    )  # fmt: skip
    assert read.hidden_size == 6
    assert read.parameters == 7 * 12 + 12 + 12 * 5 + 5 + 5 * 3 + 3
    x, generated = np.ones((4, 6)), np.array([0, 1, 20, 4000])
    np.testing.assert_array_equal(read.remaining(x, generated), made.remaining(x, generated))


def test_a_head_of_another_model_is_refused_in_one_line(tmp_path: Path) -> None:
    save_head(tmp_path, head())
    with pytest.raises(PenstockError) as caught:
        load_head(tmp_path, "ffff")
    said = str(caught.value)
    assert "abcd" in said and "ffff" in said and "penstock predictor train" in said and "\n" not in said


def rewritten(folder: Path, **changed: object) -> None:
    path = folder / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: (f / "head.json").unlink(),
        lambda f: (f / "head.json").write_text("{"),
        lambda f: (f / "head.safetensors").write_bytes(b"\x10"),
        lambda f: (f / "head.safetensors").unlink(),
        lambda f: rewritten(f, format=2),
        lambda f: rewritten(f, quantiles=[0.1, 0.9, 0.5]),
        lambda f: rewritten(f, quantiles=[0.5]),
        lambda f: rewritten(f, hidden_size=7),
    ],
)
def test_damaged_files_are_the_users_to_mend(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    save_head(tmp_path, head())
    spoil(tmp_path)
    with pytest.raises(PenstockError):
        load_head(tmp_path)


def test_tensors_go_and_come_with_their_note(tmp_path: Path) -> None:
    made = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(0, np.float32)}
    write_tensors(tmp_path / "t", made, {"edges": [0.5, 2.0]})
    read, note = read_tensors(tmp_path / "t")
    assert note == {"edges": [0.5, 2.0]}
    assert {name: (t.shape, t.tolist()) for name, t in read.items()} == {
        name: (t.shape, t.tolist()) for name, t in made.items()
    }
    with pytest.raises(PenstockError, match="without its tensor"):
        mlp_of({"mean": made["b"]} | {"w0": made["a"]})


def test_by_hand() -> None:
    """One layer, two quantiles: y0 = z0, y1 = y0 + ln(1 + e^z1), remaining = e^(y + shift) - 1."""
    made = Head(linear([[1.0], [0.0]], [0.0, 0.0]), np.array([0.0, 1.0], np.float32), (0.5, 0.9), "m", "n", 20, 0, {})
    found = made.remaining(np.array([[np.log(11.0)]]), np.array([7]))
    assert found[0, 0] == pytest.approx(10.0, rel=1e-5)
    assert found[0, 1] == pytest.approx(11.0 * 2.0 * np.e - 1.0, rel=1e-5)
    assert made.median(np.array([[-3.0]]), np.array([7]))[0] == 0.0


def test_the_feature_is_the_log_of_the_tokens_so_far() -> None:
    both = with_features(np.ones((2, 3), np.float16), np.array([0, 19]), 1)
    np.testing.assert_allclose(both[:, 3], [0.0, np.log(20.0)], rtol=1e-6)
    assert with_features(np.ones((2, 3)), np.array([0, 19]), 0).shape == (2, 3)


@given(st.integers(0, 2**31), st.floats(0.1, 300.0))
def test_quantiles_always_rise_and_are_never_negative(seed: int, size: float) -> None:
    made = head(features=seed % 2, seed=seed)
    source = np.random.default_rng(seed)
    found = made.remaining(size * source.normal(size=(20, 6)), source.integers(0, 10_000, 20))
    assert np.isfinite(found).all()
    assert (found >= 0.0).all()
    assert (np.diff(found, axis=1) >= 0.0).all()


@given(st.lists(st.lists(st.floats(-50, 50), min_size=3, max_size=3), min_size=1, max_size=5))
def test_rising(z: list[list[float]]) -> None:
    found = rising(z)
    assert (np.diff(found, axis=1) >= 0.0).all()
    np.testing.assert_allclose(found[:, 0], [row[0] for row in z])


@given(st.integers(2, 400), st.integers(0, 2**31))
def test_calibration_covers_what_it_was_fitted_on(n: int, seed: int) -> None:
    """Whatever the predictions, the share at or below a shifted quantile is its level, to one target's share."""
    source = np.random.default_rng(seed)
    target = source.gamma(0.5, size=n)
    predicted = source.normal(size=(n, 3)).cumsum(axis=1)
    moved = predicted + shifts(predicted, target, LEVELS).astype(np.float64)
    # Shifts are stored in float32: a hair of room for the target that defines one.
    share = (target[:, None] <= moved + 1e-5).mean(axis=0)
    for k, level in enumerate(LEVELS):
        assert min(level, 1.0) <= share[k] + 1e-9 <= min(level + 2.0 / n, 1.0) + 1e-8 or share[k] == 1.0


def test_the_engine_plugin_reads_the_same_numbers(tmp_path: Path) -> None:
    for features in (0, 1):
        save_head(tmp_path, head(features))
        found = in_torch("head_in_engine", str(tmp_path), "abcd")
        np.testing.assert_allclose(found["theirs"], found["ours"], rtol=1e-4, atol=1e-4)
