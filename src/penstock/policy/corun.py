"""The two-stage latency predictor of ``harli``: a decode step alone, then beside fine-tuning.

Ours, in the spirit of Harli (arXiv 2511.11729), which names the two stages and no formulas. Stage 1 is a plane in
batch and KV tokens, one a batch bin, fitted by least squares. Stage 2 is a table of factors on stage 1 over batch,
context a request, SMs left to decode, and micro-batch; between its knots factors are interpolated in logarithms,
because time goes with the inverse of a share.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

import numpy as np

from penstock.core.errors import PenstockError
from penstock.perf.tuning import CoRunSamples, Profiler, TuningJob

BATCHES: Final = (1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
"""Batches to profile, and the edges of stage 1's bins."""
CONTEXTS: Final = (128, 1024, 4096, 16384)
"""KV tokens a request to profile."""
SHARES: Final = (0.0, 0.04, 0.06, 0.08, 0.11, 0.15, 0.19, 0.24, 0.3, 0.36, 0.45, 0.55, 0.7, 0.85, 1.0)
"""Shares of SMs to profile: dense where decode is short of SMs, the smallest and the largest part included."""


def profile(profiler: Profiler, most_running: int = BATCHES[-1]) -> CoRunSamples:
    """Measure all that the predictor needs, for batches of up to ``most_running``."""
    batches = [b for b in BATCHES if b < most_running] + [most_running]
    middles = [(low + high) // 2 for low, high in pairwise(batches)]
    parts = list(profiler.truth.gpu.curve.parts())
    sms = sorted({parts[round(x * (len(parts) - 1))] for x in SHARES})
    sizes = profiler.truth.job.sequences
    return profiler.measure(
        [(b, b * c) for b in sorted({*batches, *middles}) for c in CONTEXTS],
        [(b, b * c, u, k) for b in batches for c in CONTEXTS for u in sms for k in sizes],
        [(u, k) for u in [0, *sms] for k in sizes],
    )


class SoloFit:
    """Stage 1: ``t = a0 + a1 b + a2 K`` seconds for ``b`` decodes over ``K`` KV tokens, one plane a bin of batches."""

    def __init__(self, samples: Any, edges: tuple[int, ...] | list[int]) -> None:
        """``samples`` float64[n, 3]: batch, KV tokens, seconds. A bin holds its lower and its upper edge."""
        self.edges = np.asarray(edges, np.float64)
        batch, tokens, seconds = samples.T
        planes = []
        for low, high in pairwise(edges):
            rows = (batch >= low) & (batch <= high)
            if rows.sum() < 3:
                raise PenstockError(f"no samples of batches {low} to {high}", "profile more batches")
            terms = np.stack([np.ones(int(rows.sum())), batch[rows], tokens[rows]], axis=1)
            # Relative errors, so that short steps count as much as long ones.
            planes.append(np.linalg.lstsq(terms / seconds[rows, None], np.ones(len(terms)), rcond=None)[0])
        self.planes = np.array(planes)

    def seconds(self, batch: float, tokens: float) -> float:
        """Predicted seconds of a decode step alone; beyond the edges the nearest plane holds."""
        i = int(np.searchsorted(self.edges, batch, side="left")) - 1
        a0, a1, a2 = self.planes[min(max(i, 0), len(self.planes) - 1)]
        return float(a0 + a1 * batch + a2 * tokens)


class Pair:
    """A way to share the GPU: ``sms`` of it for decode, micro-batches of ``sequences``.

    ``tokens_per_s`` is the predicted fine-tuning throughput, ``pages`` what a micro-batch holds.
    """

    def __init__(self, sms: int, sequences: int, tokens_per_s: float, pages: int) -> None:
        self.sms = sms
        self.sequences = sequences
        self.tokens_per_s = tokens_per_s
        self.pages = pages


class CoRunPredictor:
    """Both stages, for every pair of a share and a micro-batch, the fastest fine-tuning first."""

    def __init__(self, samples: CoRunSamples) -> None:
        shared = samples.shared
        batches, sms = np.unique(shared[:, 0]), np.unique(shared[:, 2])
        contexts = np.unique(np.round(shared[:, 1] / shared[:, 0]))
        self.job: TuningJob = samples.job
        self.solo = SoloFit(samples.solo, [int(b) for b in batches])
        self._samples = samples
        self._batches, self._contexts = np.log(batches), np.log(contexts)
        every = np.array(samples.parts)
        pairs, blocks = [], []
        for k in samples.job.sequences:
            pairs += [Pair(int(u), k, self._rate(int(u), k), samples.pages[k]) for u in every]
            blocks.append(self._filled(shared[shared[:, 3] == k], batches, contexts, sms, every))
        order = sorted(range(len(pairs)), key=lambda i: -pairs[i].tokens_per_s)
        self.pairs = [pairs[i] for i in order]
        self._table = np.ascontiguousarray(np.concatenate(blocks, axis=2)[:, :, order])

    def _rate(self, sms: int, sequences: int) -> float:
        """Tokens/s of fine-tuning beside decode on ``sms`` SMs, between samples linear in them."""
        rows = self._samples.tuning[self._samples.tuning[:, 1] == sequences]
        rows = rows[rows[:, 0].argsort()]
        return float(np.interp(sms, rows[:, 0], sequences * self.job.tokens / rows[:, 2]))

    def _filled(self, rows: Any, batches: Any, contexts: Any, sms: Any, every: Any) -> Any:
        """Logarithm of measured over solo seconds, float64[batch, context, part], for all parts ``every``."""
        knots = np.full((len(batches), len(contexts), len(sms)), np.nan)
        for batch, tokens, u, _, seconds in rows:
            i, j = np.searchsorted(batches, batch), np.searchsorted(contexts, round(tokens / batch))
            knots[i, j, np.searchsorted(sms, u)] = np.log(max(seconds / self.solo.seconds(batch, tokens), 1.0))
        if np.isnan(knots).any():
            raise PenstockError("the co-run samples are no full grid", "profile every combination")
        columns = []
        for u in every:
            i, weight = _between(np.log(sms), np.log(u))
            columns.append((1.0 - weight) * knots[:, :, i] + weight * knots[:, :, i + 1])
        return np.stack(columns, axis=2)

    def seconds(self, batch: float, tokens: float) -> Any:
        """Predicted seconds of a decode step beside each of :attr:`pairs`, float64[pairs]."""
        i, wi = _between(self._batches, np.log(max(batch, 1.0)))
        j, wj = _between(self._contexts, np.log(max(tokens / max(batch, 1.0), 1.0)))
        t = self._table
        low = (1.0 - wj) * t[i, j] + wj * t[i, j + 1]
        high = (1.0 - wj) * t[i + 1, j] + wj * t[i + 1, j + 1]
        return self.solo.seconds(batch, tokens) * np.exp((1.0 - wi) * low + wi * high)


def _between(knots: Any, value: float) -> tuple[int, float]:
    """Index of the knot below ``value`` and the weight of the one above; clamped at both ends."""
    i = min(max(int(np.searchsorted(knots, value, side="right")) - 1, 0), len(knots) - 2)
    weight = (value - knots[i]) / (knots[i + 1] - knots[i])
    return i, float(min(max(weight, 0.0), 1.0))
