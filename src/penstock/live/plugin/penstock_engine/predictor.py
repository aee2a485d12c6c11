"""The card of a predictor head, head.json: what it is, which model it belongs to. Weights are read in `head.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

FORMAT = 1
CARD = "head.json"
WEIGHTS = "head.safetensors"


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """head.json. ``model`` is the model's `fingerprint.fingerprint`, ``layers`` the number of linear layers.

    ``quantiles`` are the levels that the outputs stand for, rising. Every ``every`` output tokens there is a
    prediction. With ``features`` = 1 the input is the hidden state and log(1 + output tokens so far).
    """

    format: Literal[1]
    name: str
    model: str
    hidden_size: int
    quantiles: tuple[float, ...]
    layers: int
    transform: Literal["log1p"]
    every: int = 20
    features: Literal[0, 1] = 0


def read_card(folder: str | Path, model: str) -> Card:
    """Read and check a head's card for the model with fingerprint ``model``.

    Raises
    ------
    ValueError
        It cannot be read, or is for another model; one line with the remedy.
    """
    path = Path(folder) / CARD
    try:
        card = msgspec.json.decode(path.read_bytes(), type=Card)
    except OSError as error:
        raise ValueError(f"no predictor at {path} ({error.strerror}): name the folder that training wrote") from None
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is not a predictor's card ({error}): train it again") from None
    if card.model != model:
        raise ValueError(f"predictor {card.name} is for model {card.model}, not {model}: train one for this model")
    rising = list(card.quantiles) == sorted(set(card.quantiles))
    if not card.quantiles or not rising or min(card.layers, card.every, card.hidden_size) < 1:
        raise ValueError(f"{path} contradicts itself: train it again")
    return card
