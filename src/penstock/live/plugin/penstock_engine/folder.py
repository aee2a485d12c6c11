"""Where the files of the model that an engine serves are."""

# mypy: ignore-errors
# (vLLM lives in another environment)

from __future__ import annotations

import os


def model_folder(config) -> str:
    """Folder of the model of a vLLM ModelConfig: the one it was given, or the local copy of its Hugging Face id."""
    if os.path.isdir(config.model):
        return config.model
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(config.model, revision=config.revision, local_files_only=True)
    except Exception:  # it has kinds of its own for each reason; `fingerprint` says what is missing
        return config.model
