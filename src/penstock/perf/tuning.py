"""What LoRA fine-tuning beside decode costs: the truth of two jobs on one GPU, and a profiler that measures it.

Ours, in the spirit of Harli (arXiv 2511.11729), of whose models no formulas were at hand. Each job has SMs of its own
(``perf.sm_share``), both share the memory bandwidth (``perf.contention``). The base weights are those that serve:
fine-tuning reads them, and holds only an adapter with its optimiser, and the activations of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Final

import numpy as np
from numpy.typing import NDArray

from penstock.core.errors import PenstockError
from penstock.perf.contention import Contention, Phases
from penstock.perf.kv import kv_bytes_per_token
from penstock.perf.models import ModelSpec
from penstock.perf.roofline import RooflineStepModel
from penstock.perf.sm_share import shared_gpu
from penstock.perf.step import StepModel

F64 = NDArray[np.float64]

PASSES: Final = 3
"""Passes of a micro-batch through the frozen weights, each at the cost of a forward pass: forward, forward again (a
layer keeps its input only), and the gradient of the activations. Frozen weights have no gradient of their own."""
ATTENTION_PASSES: Final = 4.5
"""Time of attention over that of its forward pass: forward, again, and a backward of 2.5 (FlashAttention-2, FLOPs)."""
STATE_BYTES: Final = 16.0
"""Bytes an adapter weight needs: bf16 weight and gradient, fp32 master copy and two moments (Adam)."""
LOSS_CHUNK_TOKENS: Final = 1024
"""Tokens whose logits exist at once, in bf16 and as an fp32 gradient."""
TOGETHER: Final = 1.0
"""Share of the bandwidth that the two streams reach together (``perf.contention``)."""
ALIKE: Final = 1.1
"""Batches and contexts within this factor get the same contention, so that it need not be worked out at every leap."""


@dataclass(frozen=True)
class TuningJob:
    """A LoRA job: sequences of ``tokens`` tokens, adapters of ``rank``, micro-batches of one of ``sequences``."""

    tokens: int = 1024
    rank: int = 16
    sequences: tuple[int, ...] = (1, 2, 4)

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.rank < 1 or not self.sequences or min(self.sequences) < 1:
            raise PenstockError(
                "a fine-tuning job lacks tokens, rank or sizes of micro-batch", "give 1 or more of each"
            )


def adapter_params(model: ModelSpec, rank: int) -> int:
    """Weights of LoRA adapters on the attention projections and the dense MLP of every layer, in numbers.

    A matrix of ``d_in`` by ``d_out`` gets ``rank (d_in + d_out)``. Experts get none; latent attention counts as if its
    heads were whole. Llama-3.1-8B at rank 16: 41.9e6.
    """
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    attention = 2 * (model.hidden + q) + 2 * (model.hidden + kv)
    dense = (model.layers - model.moe_layers) * model.mlp_matrices * (model.hidden + model.intermediate)
    return rank * (model.layers * attention + dense)


def activation_bytes(model: ModelSpec, tokens: int, tp: int = 1) -> float:
    """Bytes that a micro-batch of ``tokens`` holds on one GPU: every layer's input, all of one layer, and logits."""
    mlp = model.active_params() - model.vocab * model.hidden - model.layers * model.attention_params()
    width = mlp / (model.layers * model.mlp_matrices * model.hidden)
    # Two norms, residual and gradient on whole rows; gate, up and product; queries, keys, values and their gradient.
    layer = 8.0 * model.hidden + (4.0 * width + 2.0 * (model.heads + 2 * model.kv_heads) * model.head_dim) / tp
    logits = 6.0 * min(tokens, LOSS_CHUNK_TOKENS) * model.vocab / tp
    return 2.0 * tokens * (model.layers * model.hidden + layer) + logits


class CoRun:
    """The truth: decode on some SMs of a GPU, a LoRA job on the others.

    ``whole`` is the instance's step model on the whole GPU, ``block_size`` the tokens of a KV block, which is the page
    that memory is lent in. Raises PenstockError for a step model that is no roofline, or a GPU of unknown SMs.
    """

    def __init__(self, whole: StepModel, block_size: int, job: TuningJob | None = None) -> None:
        if not isinstance(whole, RooflineStepModel):
            raise PenstockError(
                f"a {type(whole).__name__} cannot say what fine-tuning costs", "use the roofline: drop --profile"
            )
        self.whole = whole
        self.job = job if job is not None else TuningJob()
        self.gpu = shared_gpu(whole)
        self.sms = self.gpu.curve.sms
        self.layers = whole.model.layers
        self._page_bytes = kv_bytes_per_token(whole.model, whole.kv_dtype, whole.tp) * block_size
        self._adapter = adapter_params(whole.model, self.job.rank)
        self.state_pages = self._pages(self._adapter * STATE_BYTES / whole.tp)
        self._contention = Contention(self.gpu, TOGETHER)
        self._tuning: dict[tuple[int, int], Phases] = {}
        self._factors: dict[tuple[int, int, int, int], tuple[float, float]] = {}

    def _pages(self, size_bytes: float) -> int:
        return -int(-size_bytes // self._page_bytes)

    def tokens(self, sequences: int) -> int:
        """Tokens of a micro-batch."""
        return sequences * self.job.tokens

    def pages(self, sequences: int) -> int:
        """Pages that the activations of a micro-batch fill."""
        return self._pages(activation_bytes(self.whole.model, self.tokens(sequences), self.whole.tp))

    def decode_model(self, decode_sms: int) -> StepModel:
        """Step model of decode on so many SMs, before contention."""
        return self.gpu.on(decode_sms)

    def tuning_alone_s(self, sms: int, sequences: int) -> float:
        """Seconds of a micro-batch on ``sms`` SMs, the memory to itself; inf on none."""
        return self._phases(sms, sequences).total_s() if sms > 0 else inf

    def factors(self, decode_sms: int, sequences: int, batch: int, context: int) -> tuple[float, float]:
        """How many times longer a decode step and a micro-batch take than alone on their SMs, for want of bandwidth.

        1 and 1 where one of the two has no SMs, or nothing to do.
        """
        rest = self.sms - decode_sms
        if decode_sms <= 0 or rest <= 0 or batch <= 0:
            return 1.0, 1.0
        key = (decode_sms, sequences, round(log(batch) / log(ALIKE)), round(log(max(context, 1)) / log(ALIKE)))
        found = self._factors.get(key)
        if found is None:
            decode = self._contention.phases(
                decode_sms, lambda m: m.step_s(round(ALIKE ** key[2]), round(ALIKE ** key[3]), [], [])
            )
            found = self._contention.stretch(decode, self._phases(rest, sequences))
            self._factors[key] = found
        return found

    def decode_s(self, decode_sms: int, sequences: int, batch: int, context: int) -> float:
        """Seconds of a decode step of ``batch`` over ``context`` KV tokens beside micro-batches of ``sequences``."""
        alone = self.decode_model(decode_sms).step_s(batch, context, [], [])
        return alone * self.factors(decode_sms, sequences, batch, context)[0]

    def tuning_s(self, decode_sms: int, sequences: int, batch: int, context: int) -> float:
        """Seconds of a micro-batch beside that decode; 0 SMs: decode rests."""
        alone = self.tuning_alone_s(self.sms - decode_sms, sequences)
        return alone * self.factors(decode_sms, sequences, batch, context)[1]

    def boundary_share(self) -> float:
        """Longest time between two layer boundaries over that of a micro-batch: a layer again, and its gradient."""
        return (PASSES - 1) / PASSES / self.layers

    def _phases(self, sms: int, sequences: int) -> Phases:
        found = self._tuning.get((sms, sequences))
        if found is None:
            found = self._contention.phases(sms, lambda m: self._seconds(m, sequences))
            self._tuning[(sms, sequences)] = found
        return found

    def _seconds(self, model: StepModel, sequences: int) -> float:
        """Seconds of a micro-batch where steps cost what ``model`` says."""
        assert isinstance(model, RooflineStepModel)
        n = self.tokens(sequences)
        linear = model.tokens_s(n) + model.rows_s(n)
        whole = model.step_s(0, 0, [self.job.tokens] * sequences, [0] * sequences)
        attention = whole - model.tokens_s(n) - model.rows_s(sequences)
        adapters = 1.0 + (PASSES + 1) / PASSES * self._adapter / model.model.active_params()
        return PASSES * linear * adapters + ATTENTION_PASSES * attention


@dataclass(frozen=True)
class CoRunSamples:
    """What a profiling run brings: one row a measurement, seconds.

    ``solo`` holds rows of (batch, KV tokens, seconds), ``shared`` of (batch, KV tokens, decode SMs, sequences, seconds
    of the decode step), ``tuning`` of (decode SMs, sequences, seconds of the micro-batch). ``pages`` is what a
    micro-batch of each size of the ``job`` holds; ``parts`` are the SM counts that decode can be given.
    """

    parts: tuple[int, ...]
    job: TuningJob
    pages: dict[int, int]
    solo: F64
    shared: F64
    tuning: F64


class Profiler:
    """Runs decode and micro-batches side by side and times them: the truth, times lognormal noise and ``error``."""

    def __init__(self, truth: CoRun, noise: float = 0.02, error: float = 1.0, seed: int = 0) -> None:
        self.truth = truth
        self.noise = noise
        self.error = error
        self.seed = seed

    def measure(
        self,
        solo: Sequence[tuple[int, int]],
        shared: Sequence[tuple[int, int, int, int]],
        tuning: Sequence[tuple[int, int]],
        beside: tuple[int, int] = (64, 65_536),
    ) -> CoRunSamples:
        """Time these points; see :class:`CoRunSamples` for their columns (without the seconds).

        Micro-batches are timed ``beside`` a decode batch of so many requests over so many KV tokens.
        """
        truth, rng = self.truth, np.random.default_rng(self.seed)

        def timed(seconds: float) -> float:
            return seconds * self.error * float(np.exp(rng.normal(0.0, self.noise)))

        return CoRunSamples(
            tuple(truth.gpu.curve.parts()),
            truth.job,
            {k: truth.pages(k) for k in truth.job.sequences},
            np.array([(b, k, timed(truth.whole.step_s(b, k, [], []))) for b, k in solo], np.float64),
            np.array([(b, k, u, s, timed(truth.decode_s(u, s, b, k))) for b, k, u, s in shared], np.float64),
            np.array([(u, s, timed(truth.tuning_s(u, s, *beside))) for u, s in tuning], np.float64),
        )
