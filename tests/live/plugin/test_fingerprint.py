"""One model, one fingerprint, however its tensors are spread over files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from penstock.live.local.noise import noise_model, safetensors
from penstock.live.plugin.penstock_engine.fingerprint import fingerprint

CONFIG = {"hidden_size": 4, "num_hidden_layers": 2, "vocab_size": 8}
EMBED = np.arange(32, dtype=np.float32).reshape(8, 4)
NORM = np.ones(4, dtype=np.float32)


def written(folder: Path, config: dict[str, object], **files: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in files.items():
        (folder / f"{name}.safetensors").write_bytes(safetensors(tensors))
    return folder


def test_it_depends_on_two_tensors_and_three_sizes(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": EMBED, "model.norm.weight": NORM}
    first = fingerprint(written(tmp_path / "a", {**CONFIG}, model=tensors))
    assert len(first) == 16
    assert int(first, 16) >= 0
    other = {"lm_head.weight": EMBED + 1, "model.norm.weight": NORM, "model.embed_tokens.weight": EMBED}
    assert fingerprint(written(tmp_path / "b", {**CONFIG, "x": 1}, model=other)) == first
    for name, config, changed in (
        ("embed", CONFIG, {**tensors, "model.embed_tokens.weight": EMBED + 1}),
        ("norm", CONFIG, {**tensors, "model.norm.weight": NORM + 1}),
        ("layers", CONFIG | {"num_hidden_layers": 3}, tensors),
    ):
        assert fingerprint(written(tmp_path / name, {**config}, model=changed)) != first


def test_files_in_pieces_and_nested_configurations(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": EMBED, "model.norm.weight": NORM}
    whole = fingerprint(written(tmp_path / "whole", {**CONFIG}, model=tensors))
    parts = {name: {name: tensor} for name, tensor in tensors.items()}
    split = written(tmp_path / "split", {"text_config": CONFIG}, **parts)
    index = {"weight_map": {name: f"{name}.safetensors" for name in tensors}}
    (split / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint(split) == whole


def test_models_have_one(tmp_path: Path) -> None:
    first = fingerprint(noise_model(tmp_path))
    copy = shutil.copytree(noise_model(tmp_path), tmp_path / "copy")
    assert fingerprint(str(copy)) == first
    assert fingerprint(noise_model(tmp_path, seed=1)) != first


def test_what_has_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no fingerprint of .*absent"):
        fingerprint(tmp_path / "absent")
    lacking = written(tmp_path / "lacking", {**CONFIG}, model={"model.norm.weight": NORM})
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight"):
        fingerprint(lacking)
    tensors = {"model.embed_tokens.weight": EMBED, "model.norm.weight": NORM}
    short = written(tmp_path / "short", {**CONFIG}, model=tensors)
    weights = short / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="ends early"):
        fingerprint(short)
    weights.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="not a safetensors file"):
        fingerprint(short)
    (short / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="no fingerprint"):
        fingerprint(short)
