"""The noise model's files: the same bytes everywhere, in the formats that vLLM reads."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from penstock.core.errors import PenstockError
from penstock.live.local.bytetokens import SPECIALS
from penstock.live.local.noise import cache_folder, noise_model, safetensors


def test_the_weights_are_the_same_on_every_machine(tmp_path: Path) -> None:
    data = (noise_model(tmp_path) / "model.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == "22df33e4e9d9811f6e23a5c8e0eda0545c581bc1159f4841810af0c6fa604997"
    other = (noise_model(tmp_path, seed=1) / "model.safetensors").read_bytes()
    assert len(other) == len(data)
    assert other != data


def test_safetensors_as_specified() -> None:
    """By the format's own words: 8 bytes of length, JSON, then the data in the order of the offsets, without gaps."""
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([7.5], dtype=np.float32)}
    raw = safetensors(tensors)
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0
    assert header["a"] == {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    data = raw[8 + size :]
    assert len(data) == header["b"]["data_offsets"][1] == 28
    assert np.array_equal(np.frombuffer(data[:24], "<f4").reshape(2, 3), tensors["a"])
    assert np.frombuffer(data[24:], "<f4") == 7.5


def test_a_token_is_a_byte(tmp_path: Path) -> None:
    folder = noise_model(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(256 + len(SPECIALS)))
    assert [vocabulary[letter] for letter in ("A", "~", "Ġ", "Ċ", "é")] == [65, 126, 32, 10, 0xE9]
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == len(vocabulary)
    assert config["eos_token_id"] == vocabulary["<|im_end|>"]


def test_made_once_also_by_several_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda _: noise_model(tmp_path), range(8)))
    assert [folder.name for folder in tmp_path.iterdir()] == [made.pop().name]
    assert not made


def test_the_cache_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "penstock"
    (tmp_path / "penstock").write_text("in the way")
    with pytest.raises(PenstockError, match="XDG_CACHE_HOME"):
        noise_model()
