"""The predictor head: a small network on the serving model's last hidden state, its files, and its inference.

The input is what the model's output layer gets for a request at a step (the state after the final norm), so the
prediction costs no pass of its own (STAR/ARES, section on the predictor). Beyond the paper: several quantiles instead
of one value, the target in log space, and shifts that make the quantiles' coverage right on held-out requests (ours).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from penstock.core.errors import PenstockError
from penstock.predict.learned.mlp import Mlp, mlp_of
from penstock.predict.learned.tensors import F32, read_tensors, write_tensors
from penstock.workload.trace import F64

FORMAT: Final = 1
QUANTILES: Final = (0.1, 0.25, 0.5, 0.75, 0.9)
EVERY: Final = 20
"""Generated tokens between two predictions: the stride of STAR's labels."""

TENSORS_FILE, ABOUT_FILE = "head.safetensors", "head.json"
_MOST_LOG = 20.0  # of log1p(remaining): half a billion tokens; keeps exp finite on inputs that it was not trained on


class Head(NamedTuple):
    """``scale`` float32[q] is added to the rising outputs, in log space. ``features`` counts the inputs beside the
    hidden state: 1 means log1p of the tokens generated so far. ``model`` is the fingerprint of the model whose states
    it reads, ``trained`` how it came about.
    """

    mlp: Mlp
    scale: F32
    quantiles: tuple[float, ...]
    model: str
    name: str
    every: int
    features: int
    trained: dict[str, Any]

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.mlp.mean.size - self.features

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return self.mlp.parameters

    def logs(self, hidden: Any, generated: Any) -> F64:
        """log1p of the remaining tokens, float64[n, q], before the shifts; see :meth:`remaining`."""
        return rising(self.mlp(with_features(hidden, generated, self.features)))

    def remaining(self, hidden: Any, generated: Any) -> F64:
        """Quantiles of the tokens still to come.

        Parameters
        ----------
        hidden : float[n, hidden_size]
            States of the tokens sampled last (of the last prompt token before the first).
        generated : [n]
            Output tokens up to and including those.

        Returns
        -------
        float64[n, q]
            Rising along a row, at least 0; end of text counts as a token.
        """
        # The shifts can make neighbours change places where the network holds them to be almost equal.
        shifted = np.maximum.accumulate(self.logs(hidden, generated) + self.scale, axis=1)
        return np.maximum(np.expm1(np.minimum(shifted, _MOST_LOG)), 0.0)

    def median(self, hidden: Any, generated: Any) -> F64:
        """The quantile that is nearest to one half, float64[n]."""
        middle: F64 = self.remaining(hidden, generated)[:, middle_of(self.quantiles)]
        return middle


def middle_of(quantiles: tuple[float, ...]) -> int:
    """Index of the level nearest to one half."""
    return int(np.argmin(np.abs(np.asarray(quantiles) - 0.5)))


def with_features(hidden: Any, generated: Any, features: int) -> Any:
    """The network's input: states, and with ``features`` = 1 a column log1p(generated) after them; float[n, in]."""
    if not features:
        return hidden
    column = np.log1p(np.asarray(generated, dtype=np.float32))[:, None]
    return np.concatenate([np.asarray(hidden, dtype=np.float32), column], axis=1)


def rising(z: Any) -> F64:
    """Outputs [n, q] made rising: the first as it is, each next one the softplus of its own above the one before."""
    steps = np.array(z, dtype=np.float64)
    steps[:, 1:] = np.logaddexp(0.0, steps[:, 1:])
    return np.cumsum(steps, axis=1)


def save_head(folder: str | Path, head: Head) -> None:
    """Write ``head.safetensors`` and ``head.json`` into a folder, made if need be. Raises PenstockError."""
    home = Path(folder)
    about = {
        "format": FORMAT,
        "name": head.name,
        "model": head.model,
        "hidden_size": head.hidden_size,
        "quantiles": list(head.quantiles),
        "layers": len(head.mlp.weights),
        "transform": "log1p",
        "every": head.every,
        "features": head.features,
        "trained": head.trained,
    }
    try:
        home.mkdir(parents=True, exist_ok=True)
        write_tensors(home / TENSORS_FILE, {**head.mlp.tensors(), "scale": head.scale})
        (home / ABOUT_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise PenstockError(f"cannot write a head to {home} ({error.strerror})", "give a path you may write") from None


def load_head(folder: str | Path, model: str | None = None) -> Head:
    """Read a head.

    Parameters
    ----------
    folder : str or Path
        Where :func:`save_head` wrote.
    model : str, optional
        Fingerprint of the model that it is to serve.

    Raises
    ------
    PenstockError
        There is none, it is damaged, or it was trained for another model.
    """
    home = Path(folder)
    try:
        about = json.loads((home / ABOUT_FILE).read_text(encoding="utf-8"))
        known = (int(about["format"]), str(about["transform"])) == (FORMAT, "log1p")
        quantiles = tuple(float(q) for q in about["quantiles"])
        given = str(about["model"])
        every, features, width = int(about["every"]), int(about["features"]), int(about["hidden_size"])
        name, trained = str(about["name"]), dict(about["trained"])
    except OSError as error:
        raise PenstockError(
            f"no predictor head in {home} ({error.strerror})", "make one with `penstock predictor train`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise PenstockError(f"{home / ABOUT_FILE} is no head ({error!r})", "train it anew") from None
    if not known:
        raise PenstockError(f"{home} has a head of another format than {FORMAT}", "train it anew")
    if model is not None and given != model:
        raise PenstockError(
            f"the head in {home} was trained for model {given}, this model is {model}",
            "train one for it with `penstock predictor train --model DIR`",
        )
    tensors, _ = read_tensors(home / TENSORS_FILE)
    head = Head(
        mlp_of(tensors), tensors.get("scale", np.zeros(0, np.float32)), quantiles, given, name, every, features, trained
    )
    fits = head.mlp.biases[-1].size == len(quantiles) == head.scale.size and head.hidden_size == width
    if not fits or not quantiles or list(quantiles) != sorted(set(quantiles)):
        raise PenstockError(f"{home}: the tensors do not fit what {ABOUT_FILE} says", "train it anew")
    return head
