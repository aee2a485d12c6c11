"""A causal language model by transformers, as far as the samples need it."""

# mypy: disable-error-code="import-not-found"
# (torch lives in the engines' environment)

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from penstock.core.errors import PenstockError

_LOGITS_AT_ONCE = 2**24  # numbers


class Model(NamedTuple):
    """``body`` maps ids to states (after the final norm), ``head`` states to logits; ``ends`` are the ids that end an
    output; ``tokenizer`` is None where the folder has none.
    """

    body: Any
    head: Any
    ends: frozenset[int]
    tokenizer: Any


def load(folder: str) -> Model:
    """Load a model in float32, and its tokenizer.

    Raises
    ------
    PenstockError
        It cannot be loaded, or names no token that ends an output.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        has_tokenizer = (Path(folder) / "tokenizer.json").exists() or (Path(folder) / "tokenizer_config.json").exists()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None
    except Exception as error:  # transformers raises whatever the folder leads to
        said = str(error).splitlines()[0] if str(error) else ""
        raise PenstockError(
            f"cannot load the model {folder} ({type(error).__name__}: {said})",
            "give --model a folder in the Hugging Face layout",
        ) from None
    named = [c.eos_token_id for c in (whole.generation_config, whole.config) if c is not None]
    ends = next((end for end in named if end is not None), None)
    if ends is None:
        raise PenstockError(f"the model {folder} names no eos_token_id", "add it to its config.json")
    listed = ends if isinstance(ends, (list, tuple)) else [ends]
    whole.requires_grad_(False)
    return Model(whole.base_model, whole.get_output_embeddings(), frozenset(map(int, listed)), tokenizer)


def best_and_entropy(head: Any, states: Any) -> tuple[Any, Any]:
    """Likeliest next token int64[n], and the entropy of the next token float32[n] in nats, of states [n, d]."""
    at_once = max(_LOGITS_AT_ONCE // head.weight.shape[0], 1)
    best, entropy = [], []
    for part in states.split(at_once):
        logits = head(part).float()
        best.append(logits.argmax(-1))
        logs = torch.log_softmax(logits, -1)
        entropy.append(-(logs.exp() * logs).sum(-1))
    return torch.cat(best), torch.cat(entropy)
