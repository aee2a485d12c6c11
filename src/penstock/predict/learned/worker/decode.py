"""Decoding token by token, many requests at once: for outputs that nobody knows beforehand."""

# mypy: disable-error-code="import-not-found"
# (torch lives in the engines' environment)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from penstock.predict.learned.worker.model import Model

BATCH = 16


def decode(
    model: Model,
    begun: list[list[int]],
    most: list[int],
    temperature: float,
    seed: int,
    tell: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """What the model says next.

    Parameters
    ----------
    begun : list of list of int
        Prompts, each with the output so far; none is empty.
    most : list of int
        New tokens at most, for each.
    temperature : float
        0 means greedy.
    seed : int
        Of the draws.
    tell : function, optional
        Called with the number of requests done.

    Returns
    -------
    list of list of int
        New tokens only, the one that ends an output included.
    """
    source = torch.Generator().manual_seed(seed)
    found: list[list[int]] = [[] for _ in begun]
    order = sorted(range(len(begun)), key=lambda i: -len(begun[i]))
    for at in range(0, len(order), BATCH):
        rows = [i for i in order[at : at + BATCH] if most[i] > 0]
        if rows:
            _batch(model, begun, most, temperature, source, rows, found)
        if tell is not None:
            tell(min(at + BATCH, len(order)))
    return found


def _batch(
    model: Model,
    begun: list[list[int]],
    most: list[int],
    temperature: float,
    source: Any,
    rows: list[int],
    found: list[list[int]],
) -> None:
    from transformers import DynamicCache

    longest = max(len(begun[i]) for i in rows)
    # Filled up at the left, so that all rows go on at the same column; the mask hides what was filled in.
    x = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, i in enumerate(rows):
        x[row, longest - len(begun[i]) :] = torch.tensor(begun[i])
        mask[row, longest - len(begun[i]) :] = 1
    place = (mask.cumsum(1) - 1).clamp(min=0)
    cache: Any = DynamicCache()
    while True:
        with torch.no_grad():
            seen = model.body(
                input_ids=x, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True
            )
            logits = model.head(seen.last_hidden_state[:, -1]).float()
        if temperature > 0:
            new = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=source)[:, 0]
        else:
            new = logits.argmax(-1)
        going = []
        for row, (i, token) in enumerate(zip(rows, new.tolist(), strict=True)):
            found[i].append(token)
            if token not in model.ends and len(found[i]) < most[i]:
                going.append(row)
        if not going:
            return
        if len(going) < len(rows):
            kept = torch.tensor(going)
            cache.batch_select_indices(kept)
            rows, mask, place, new = [rows[row] for row in going], mask[kept], place[kept], new[kept]
        x = new[:, None]
        mask = torch.cat([mask, torch.ones_like(x)], 1)
        place = place[:, -1:] + 1
