"""The predictor head: from last-layer hidden states to quantiles of the remaining output tokens.

ARES, section on length prediction: an MLP on the hidden state of the sampled token, every 20 tokens. Ours: quantiles in
log space that cannot cross, and a calibration shift.
"""

# mypy: ignore-errors
# (torch lives in another environment)

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, softplus

from .predictor import WEIGHTS, Card

_MOST_LOG = 20.0  # of log(1 + remaining): keeps exp finite on states unlike those of the training


class Head:
    """A head on one device, in float32.

    Parameters
    ----------
    folder : str or Path
        Where its files are.
    card : Card
        Its card, already read.
    device : torch.device
        Where to compute.

    Raises
    ------
    ValueError
        Weights are missing or of the wrong shape.
    """

    def __init__(self, folder: str | Path, card: Card, device: torch.device) -> None:
        self.card = card
        size = card.hidden_size + card.features
        try:
            tensors = {name: tensor.float() for name, tensor in load_file(Path(folder) / WEIGHTS).items()}
            mean, std = tensors["mean"], tensors["std"]
            layers = [(tensors[f"w{index}"], tensors[f"b{index}"]) for index in range(card.layers)]
            shift = tensors["scale"]
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"no weights of predictor {card.name} ({error!r}): train it again") from None
        widths = [size, *(weight.shape[0] for weight, _ in layers)]
        fits = all(
            tuple(w.shape) == (out, into) and tuple(b.shape) == (out,)
            for (w, b), into, out in zip(layers, widths, widths[1:], strict=False)
        )
        if not fits or widths[-1] != len(card.quantiles) or shift.shape != (widths[-1],) or mean.shape != (size,):
            raise ValueError(f"weights of predictor {card.name} do not fit its card: train it again")
        # (x - mean) / std is folded into the first layer.
        weight, bias = layers[0]
        weight = weight / std
        layers[0] = (weight, bias - weight @ mean)
        self._layers = [(w.to(device).contiguous(), b.to(device).contiguous()) for w, b in layers]
        self._shift = shift.to(device)

    def __call__(self, hidden: torch.Tensor, generated: torch.Tensor | None) -> torch.Tensor:
        """Remaining tokens, [rows, quantiles], rising along quantiles.

        ``hidden`` is [rows, hidden size]; ``generated`` the output tokens so far, [rows], if the card has features.
        """
        value = hidden.float()
        if self.card.features:
            value = torch.cat((value, torch.log1p(generated.float()).unsqueeze(1)), dim=1)
        last = len(self._layers) - 1
        for index, (weight, bias) in enumerate(self._layers):
            value = linear(value, weight, bias)
            if index < last:
                value = torch.relu(value)
        value = torch.cat((value[:, :1], softplus(value[:, 1:])), dim=1).cumsum(1) + self._shift
        value = value.cummax(1).values.clamp_max(_MOST_LOG)  # calibration may have made two of them cross
        return torch.expm1(value).clamp_min(0.0)
