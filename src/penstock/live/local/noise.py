"""A model that is noise: a small Qwen3 with random weights, written on demand. It needs neither torch nor a download.

It is the sharpest witness of moved KV: its greedy output is varied and sensitive to every earlier token (float32
weights of standard deviation 0.2), so one wrong KV block shows as other text. The bundled model (:mod:`.model`)
looks back only as far as it must and might not notice. What this one says means nothing.

A token is a byte, as in the bundled model.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from penstock.core.errors import PenstockError
from penstock.live.local.bytetokens import CONTEXT, SPECIALS, tokenizer, tokenizer_config

NOISE = "penstock-noise"

_LAYERS, _WIDTH, _HEADS, _KV_HEADS, _HEAD, _INNER = 4, 256, 4, 2, 64, 768
_VOCABULARY = 256 + len(SPECIALS)
_STD = 0.2
_EDITION = 1  # part of the folder's name: raise it when anything below changes what is written

# Rows of the output layer that are made smaller, so that most of the output is readable: (first, last, factor).
_QUIET_ROWS = ((0, 9, 0.2), (10, 10, 0.6), (11, 31, 0.2), (127, 127, 0.2), (128, 255, 0.6), (256, 257, 0.0))


def cache_folder() -> Path:
    """Where Penstock keeps what can be made again: ``$XDG_CACHE_HOME/penstock``, or ``~/.cache/penstock``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "penstock"


def noise_model(folder: Path | None = None, seed: int = 0) -> Path:
    """Path of the model in the Hugging Face layout; the first call writes it (10 MB, under a second).

    Parameters
    ----------
    folder : Path, optional
        Where to keep it; the cache folder of this user by default.
    seed : int
        Seed of the weights. The same seed gives the same bytes on every machine.

    Raises
    ------
    PenstockError
        If the folder cannot be written.
    """
    home = folder if folder is not None else cache_folder()
    place = home / f"{NOISE}-{_EDITION}-{seed}"
    if (place / "config.json").exists():
        return place
    try:
        home.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{NOISE}-", dir=home))
        try:
            _write(draft, seed)
            draft.chmod(0o755)
            draft.rename(place)  # whole or not at all, also when two processes start at once
        except OSError:
            if not (place / "config.json").exists():
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise PenstockError(f"cannot write the model to {home} ({error.strerror})", "set XDG_CACHE_HOME") from None
    return place


def _write(folder: Path, seed: int) -> None:
    (folder / "model.safetensors").write_bytes(safetensors(_weights(seed)))
    for name, content in (
        ("tokenizer.json", tokenizer()),
        ("tokenizer_config.json", tokenizer_config()),
        ("config.json", _config()),
    ):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def safetensors(tensors: dict[str, np.ndarray[Any, np.dtype[np.float32]]]) -> bytes:
    """The safetensors format: 8 bytes of header length (little endian), a JSON header, the raw float32 data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    data = b"".join(tensor.astype("<f4").tobytes() for tensor in tensors.values())
    return len(text).to_bytes(8, "little") + text + data


def _weights(seed: int) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    source = np.random.PCG64(seed)

    def random(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        # Uniform numbers from the raw stream: numpy promises that stream for ever, and no libm is involved.
        raw = source.random_raw(int(np.prod(shape))) >> np.uint64(40)
        unit = raw.astype(np.float64) / 2.0**23 - 1.0  # 24 bits, from -1 to 1
        values: np.ndarray[Any, np.dtype[np.float32]] = (unit * (_STD * 3.0**0.5)).astype(np.float32)
        return values.reshape(shape)

    def ones(size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.ones(size, dtype=np.float32)

    tensors = {"model.embed_tokens.weight": random(_VOCABULARY, _WIDTH)}
    for layer in range(_LAYERS):
        at = f"model.layers.{layer}."
        tensors[at + "input_layernorm.weight"] = ones(_WIDTH)
        tensors[at + "self_attn.q_proj.weight"] = random(_HEADS * _HEAD, _WIDTH)
        tensors[at + "self_attn.k_proj.weight"] = random(_KV_HEADS * _HEAD, _WIDTH)
        tensors[at + "self_attn.v_proj.weight"] = random(_KV_HEADS * _HEAD, _WIDTH)
        tensors[at + "self_attn.o_proj.weight"] = random(_WIDTH, _HEADS * _HEAD)
        tensors[at + "self_attn.q_norm.weight"] = ones(_HEAD)
        tensors[at + "self_attn.k_norm.weight"] = ones(_HEAD)
        tensors[at + "post_attention_layernorm.weight"] = ones(_WIDTH)
        tensors[at + "mlp.gate_proj.weight"] = random(_INNER, _WIDTH)
        tensors[at + "mlp.up_proj.weight"] = random(_INNER, _WIDTH)
        tensors[at + "mlp.down_proj.weight"] = random(_WIDTH, _INNER)
    tensors["model.norm.weight"] = ones(_WIDTH)
    head = random(_VOCABULARY, _WIDTH)
    for first, last, factor in _QUIET_ROWS:
        head[first : last + 1] *= np.float32(factor)
    tensors["lm_head.weight"] = head
    return tensors


def _config() -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": SPECIALS["<|im_end|>"],
        "pad_token_id": SPECIALS["<|endoftext|>"],
        "head_dim": _HEAD,
        "hidden_act": "silu",
        "hidden_size": _WIDTH,
        "initializer_range": _STD,
        "intermediate_size": _INNER,
        "max_position_embeddings": CONTEXT,
        "num_attention_heads": _HEADS,
        "num_hidden_layers": _LAYERS,
        "num_key_value_heads": _KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": _VOCABULARY,
    }
