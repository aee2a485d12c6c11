"""KV cache: bytes per token, and how many tokens and blocks fit beside the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from penstock.core.errors import PenstockError
from penstock.perf.hardware import HardwareSpec, check_tp
from penstock.perf.lookup import dtype_bytes
from penstock.perf.models import ModelSpec

RUNTIME_BYTES = int(0.5 * 2**30)
"""CUDA context, libraries' workspaces and captured graphs of one engine (vLLM logs 0.3 to 0.8 GiB for them)."""


def kv_bytes_per_token(model: ModelSpec, kv_dtype: str = "bf16", tp: int = 1) -> int:
    """Bytes of KV that ONE GPU of a ``tp`` group stores for one token, all layers.

    Heads are split over the group and replicated when there are fewer heads than GPUs; the latent of MLA is
    replicated on each. With ``tp=1`` this is the whole KV of a token: 57,344 for Qwen2.5-7B, 131,072 for
    Llama-3.1-8B, 70,272 for DeepSeek-V3. Raises :class:`PenstockError` for an unknown type or a ``tp`` that does not
    divide the heads. Source: the models' ``config.json``; MLA: DeepSeek-V2 section 2.1.
    """
    check_tp(tp, model.heads)
    width: float
    if model.is_mla:
        width = model.kv_lora_rank + model.rope_head_dim
    else:
        width = 2 * math.ceil(model.kv_heads / tp) * model.head_dim
    return int(model.layers * width * dtype_bytes(kv_dtype))


def activation_reserve_bytes(
    model: ModelSpec, tp: int = 1, max_num_batched_tokens: int = 2048, max_num_seqs: int = 256
) -> int:
    """Bytes to leave free for activations, the sampler and the runtime, on one GPU.

    vLLM measures this in a profiling pass with a full batch. Estimated here as the widest moment of a layer (gate, up
    and their product, beside input and residual) for all batched tokens, plus float32 logits, their sorted copy and
    probabilities for every sequence, plus :data:`RUNTIME_BYTES`. Against the RTX 4090 run of ``ground_truth`` the
    resulting capacity is within 3 % (tested).
    """
    wide = model.intermediate
    if model.is_moe:
        wide = max(
            model.expert_intermediate * model.experts_per_token + model.shared_intermediate,
            model.intermediate if model.dense_layers else 0,
        )
    layer = max_num_batched_tokens * (3 * wide / tp + 4 * model.hidden) * 2
    sampler = max_num_seqs * model.vocab * 4 * 4
    return int(layer + sampler) + RUNTIME_BYTES


@dataclass(frozen=True)
class KvCapacity:
    """What fits on one instance: ``blocks`` of ``block_size`` tokens; bytes are of ONE GPU of the group."""

    blocks: int
    block_size: int
    bytes_per_token: int
    weight_bytes: int
    reserve_bytes: int

    @property
    def tokens(self) -> int:
        """Tokens of KV that the instance holds."""
        return self.blocks * self.block_size


def kv_capacity(
    model: ModelSpec,
    hardware: HardwareSpec,
    tp: int = 1,
    ep: int = 1,
    memory_utilization: float = 0.9,
    reserve_bytes: int | None = None,
    kv_dtype: str = "bf16",
    block_size: int = 16,
) -> KvCapacity:
    """KV blocks of one instance: memory × utilisation − weights − reserve, in whole blocks.

    ``memory_utilization`` is vLLM's ``gpu_memory_utilization``; ``reserve_bytes`` defaults to
    :func:`activation_reserve_bytes`. Raises :class:`PenstockError` with a remedy if the weights do not fit or less
    than one block is left.
    """
    if not 0.0 < memory_utilization <= 1.0:
        raise PenstockError(f"memory utilisation {memory_utilization} is not in (0, 1]", "vLLM's default is 0.9")
    per_token = kv_bytes_per_token(model, kv_dtype, tp)
    reserve = activation_reserve_bytes(model, tp) if reserve_bytes is None else reserve_bytes
    weights = int(model.weight_bytes(tp, ep))
    budget = hardware.usable_bytes * memory_utilization
    blocks = int((budget - weights - reserve) // (per_token * block_size))
    if blocks < 1:
        raise PenstockError(
            f"{model.name} needs {weights / 2**30:.1f} GiB of weights and {reserve / 2**30:.1f} GiB of activations on "
            f"each {hardware.name}, which offers {budget / 2**30:.1f} GiB at utilisation {memory_utilization:g}",
            _remedy(model, weights + reserve, budget, tp),
        )
    return KvCapacity(blocks, block_size, per_token, weights, reserve)


def _remedy(model: ModelSpec, needed: float, budget: float, tp: int) -> str:
    wanted = tp
    while wanted <= 64 and (needed * tp / wanted > 0.8 * budget or model.heads % wanted):
        wanted += 1
    if wanted <= 64:
        return f"use tensor parallelism {wanted} or more, a card with more memory, or quantised weights"
    return "use a card with more memory, or quantised weights"
