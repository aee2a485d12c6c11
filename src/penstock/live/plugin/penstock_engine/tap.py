"""The predictor at work in a worker: it sees the hidden states from which a model runner samples, step by step.

vLLM computes logits outside its captured graphs, of exactly the rows that are sampled, in the order of the runner's
batch; that is where the head looks. It runs on the first rank of a tensor-parallel group only (all have the same rows).
A request is looked at before its first token and then every so many. That is done in every fourth step only, for the
requests whose turn it is: a head's weights are read once for several, and requests that came together are spread over
steps. Nothing waits for a device: on a GPU results are copied while the engine goes on, and read a step later.
"""

# mypy: ignore-errors
# (torch and vLLM live in another environment)

from __future__ import annotations

import logging
import zlib
from collections import deque
from pathlib import Path

import torch

from .fingerprint import fingerprint
from .head import Head
from .messages import EARLIER
from .predictor import read_card

LOG = logging.getLogger("vllm.penstock")

_STRIDE = 4  # steps from one look to the next
_REMEMBERED = 4096  # requests

_MRV1 = ("input_batch", "optimistic_seq_lens_cpu", "discard_request_mask", "num_prompt_logprobs", "requests")
_MRV2 = ("sample", "req_states")


class Tap:
    """Predictions of one model runner; `take` them once a step."""

    def __init__(self, head: Head, device: torch.device) -> None:
        self._steps = 0
        self._head = head
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._last: dict[str, int] = {}  # output tokens when a request was looked at
        self._done: list[tuple[str, int, list[float]]] = []
        self._copying: deque = deque()

    def look(self, hidden, names, generated, whole, earlier=None) -> None:
        """Predict for the rows that are due.

        Parameters
        ----------
        hidden : torch.Tensor
            [rows, hidden size].
        names : list of str
            Request of each row.
        generated : list of int
            Output tokens whose KV, or that of the last prompt token, the row's state has seen.
        whole : list of bool
            Whether the row's prompt is complete; others are not sampled.
        earlier : callable, optional
            Turns a request's name into its output tokens on other engines.
        """
        self._steps += 1
        if self._steps % _STRIDE and 0 not in generated:
            return
        every, last = self._head.card.every, self._last
        if len(last) > _REMEMBERED:  # most have ended; the others have their next turn a little early
            last.clear()
        rows = []
        for row, name in enumerate(names):
            count = generated[row]
            if whole[row] and (count == 0 or (self._steps % _STRIDE == 0 and count - self._seen(name, count) >= every)):
                rows.append(row)
                last[name] = count if count else -self._ahead(name)
        if rows:
            self._predict(hidden, rows, [names[row] for row in rows], [generated[row] for row in rows], earlier)

    def take(self) -> list[tuple[str, int, list[float]]]:
        """Predictions that are there by now: (request, output tokens, quantiles)."""
        while self._copying and self._copying[0][0].query():
            _, kept, rows, names, counts = self._copying.popleft()
            self._done += zip(names, counts, kept[rows].tolist(), strict=True)
        done, self._done = self._done, []
        return done

    def _seen(self, name: str, count: int) -> int:
        return self._last.setdefault(name, count - self._ahead(name))

    def _ahead(self, name: str) -> int:
        return zlib.crc32(name.encode()) % max(1, self._head.card.every // _STRIDE) * _STRIDE

    def _predict(self, hidden, rows, names, counts, earlier) -> None:
        so_far = None
        if self._head.card.features:
            so_far = torch.tensor([c + (earlier(n) if earlier else 0) for n, c in zip(names, counts, strict=True)])
        if not self._on_gpu:
            self._done += zip(names, counts, self._head(hidden[rows], so_far).tolist(), strict=True)
            return
        # All rows, and a selection after the copy: an index from the host would be one more copy to wait for.
        if so_far is not None:
            spread = torch.zeros(hidden.shape[0], dtype=so_far.dtype)
            spread[rows] = so_far
            so_far = spread.pin_memory().to(self._device, non_blocking=True)
        values = self._head(hidden, so_far)
        kept = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        kept.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._copying.append((event, kept, rows, names, counts))


active: Tap | None = None
"""The tap of this process, once its model is loaded."""


def install(runner, model_folder: str, head_folder: str) -> None:
    """Put a head on a model runner whose model is loaded. A head that does not fit is one line in the log.

    Parameters
    ----------
    runner : GPUModelRunner or CPUModelRunner
        Of vLLM's first or second model runner.
    model_folder : str
        Where the model's files are.
    head_folder : str
        Where the head's files are.
    """
    global active
    try:
        card = read_card(head_folder, fingerprint(model_folder))
        head = Head(head_folder, card, runner.device)
        tap = Tap(head, runner.device)
        if all(hasattr(runner, name) for name in _MRV2):
            _into_second(runner, tap)
        elif absent := [name for name in _MRV1 if not hasattr(runner, name)]:
            raise ValueError(f"this vLLM's model runner lacks {', '.join(absent)}: run a tested version")
        else:
            _into_first(runner, tap)
    except ValueError as error:
        LOG.error("Penstock serves without predictions: %s", error)
        return
    active = tap
    LOG.info("Penstock predicts with %s from %s", card.name, Path(head_folder).name)


def _guarded(tap: Tap, look) -> None:
    # A prediction must not end an engine.
    global active
    try:
        look()
    except Exception:
        LOG.exception("Penstock makes no more predictions")
        active = None
        tap.look = lambda *_: None


def _into_first(runner, tap: Tap) -> None:
    inner = runner.model.compute_logits

    def earlier(name: str) -> int:
        extra = runner.requests[name].sampling_params.extra_args or {}
        return int(extra.get(EARLIER, 0))

    def look(hidden) -> None:
        batch = runner.input_batch
        rows = batch.num_reqs
        # Other callers: profiling (no requests), prompt log-probabilities, speculation.
        if rows == 0 or hidden.shape[0] != rows or runner.num_prompt_logprobs:
            return
        seen = runner.optimistic_seq_lens_cpu[:rows].numpy() - batch.num_prompt_tokens[:rows]
        whole = ~runner.discard_request_mask.np[:rows]
        tap.look(hidden, batch.req_ids, seen.tolist(), whole.tolist(), earlier)

    def compute_logits(hidden, *args, **kwargs):
        _guarded(tap, lambda: look(hidden))
        return inner(hidden, *args, **kwargs)

    runner.model.compute_logits = compute_logits


def _into_second(runner, tap: Tap) -> None:
    inner = runner.sample

    def look(hidden, batch) -> None:
        if batch.num_draft_tokens or not batch.num_reqs:
            return
        slots = batch.idx_mapping_np[: batch.num_reqs]
        seen = batch.num_computed_tokens_np[: batch.num_reqs] + batch.num_scheduled_tokens[: batch.num_reqs]
        whole = seen >= batch.prefill_len_np[: batch.num_reqs]
        generated = seen - runner.req_states.prompt_len.np[slots]
        tap.look(hidden[batch.logits_indices], batch.req_ids, generated.tolist(), whole.tolist())

    def sample(hidden, batch, *args, **kwargs):
        _guarded(tap, lambda: look(hidden, batch))
        return inner(hidden, batch, *args, **kwargs)

    runner.sample = sample
