"""Which model a predictor head belongs to: a fingerprint of the model's folder, cheap enough for every start."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

_TENSORS = ("model.embed_tokens.weight", "model.norm.weight")  # the input of the first layer and the last norm's scale
_PIECE = 2**20  # bytes read at a time: an embedding may have gigabytes


def fingerprint(folder: str | Path) -> str:
    """First 16 hex digits of a SHA-256 over two tensors as stored, and three sizes of the architecture (ours).

    Parameters
    ----------
    folder : str or Path
        A model in the Hugging Face layout: config.json, and one safetensors file or several with an index.

    Raises
    ------
    ValueError
        The folder has no such files, or they lack one of the tensors or sizes.
    """
    home = Path(folder)
    try:
        config = json.loads((home / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)  # a model with other inputs beside text
        digest = hashlib.sha256()
        for name in _TENSORS:
            _add(digest, _file_of(home, name), name)
        sizes = [int(config[name]) for name in ("hidden_size", "num_hidden_layers", "vocab_size")]
    except (OSError, KeyError, TypeError, AttributeError, ValueError, struct.error) as error:
        raise ValueError(f"no fingerprint of {home}: {error!r}") from None
    digest.update(",".join(map(str, sizes)).encode())
    return digest.hexdigest()[:16]


def _file_of(home: Path, tensor: str) -> Path:
    index = home / "model.safetensors.index.json"
    if not index.is_file():
        return home / "model.safetensors"
    return home / str(json.loads(index.read_text(encoding="utf-8"))["weight_map"][tensor])


def _add(digest: Any, path: Path, tensor: str) -> None:
    # The safetensors layout: length of the header (64 bits, little-endian), header (JSON), data.
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > 100 * 2**20:  # safetensors' own limit
            raise ValueError("not a safetensors file")
        begin, end = json.loads(file.read(length))[tensor]["data_offsets"]
        file.seek(8 + length + begin)
        left = end - begin
        while left:
            piece = file.read(min(left, _PIECE))
            if not piece:
                raise ValueError("file ends early")
            digest.update(piece)
            left -= len(piece)
