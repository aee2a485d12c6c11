"""Roofline step model: what a forward pass must compute and read, over what the card can compute and read.

Every operator takes ``max(FLOP / rate, bytes / bandwidth)``; attention takes that maximum per request, because a
request's kernel blocks do not wait for another's. After DuetServe (arXiv 2511.04791, section 3), with head sizes read
from the model's configuration, experts, latent attention, and an optional floor for the host's kernel launches.

Compiled with mypyc: plain floats, and everything that depends on a count of tokens only is computed once.
"""

from __future__ import annotations

from penstock.perf.hardware import HardwareSpec, check_tp
from penstock.perf.lookup import dtype_bytes
from penstock.perf.models import ModelSpec, expected_experts
from penstock.perf.step import StepModel
from penstock.perf.transfer import collective_link

DEFAULT_MFU = 0.78
"""Share of peak FLOP/s in large matrix products: median over 1,024 tokens and more is 0.74 to 0.83 on A100, H100 and
H200 (AIConfigurator's measured GEMM tables, Apache-2.0; ``docs/results/roofline.md``)."""
DEFAULT_MBU = 0.8
"""Share of the memory bandwidth in products that read large weights for few tokens: 0.70 on A100, 0.82 on H100, 0.77
on H200 (same tables), 0.86 to 0.91 on the RTX cards (operator profiles)."""
DEFAULT_ATTENTION_MFU = 0.5
"""Share of peak FLOP/s of causal prefill attention, counting visible pairs only: 0.44 at 2,048 tokens, 0.58 at 8,192
(same tables)."""
DEFAULT_ATTENTION_MBU = 0.8
"""Share of the bandwidth of decode attention that reads 200 MB to 1 GB or more a layer: 0.68 to 0.90 (same tables)."""
MEMORY_CLOCK_EXPONENT = 0.2
"""How much of the memory bandwidth falls with the core clock: bandwidth × clock ** this. Memory has a clock of its
own, but caches and request queues run at the cores' (decode is "largely insensitive to GPU frequency", arXiv
2501.08219; sub-linear slowdown, VoltanaLLM). Ours."""
KERNELS_PER_LAYER = 10
"""Kernels of an eager dense layer: two norms, four matrix products, rotary, cache write, attention, activation."""


class RooflineStepModel(StepModel):
    """Step time of ``model`` on ``tp`` cards of ``hardware``.

    Parameters
    ----------
    mfu, mbu : float
        Shares of peak FLOP/s and of memory bandwidth that matrix products reach.
    attention_mfu, attention_mbu : float
        The same for attention.
    causal : bool
        Count each pair of a query and a key it may see: ``q c + q (q + 1) / 2``, which is what FlashAttention computes.
        False counts the whole rectangle ``q (q + c)``, as DuetServe's formula does.
    elementwise : bool
        Count the memory traffic of norms, rotary embedding and activation (DuetServe's published vectors do not).
    ep : int
        Expert-parallel ranks, each with its own tokens (a data-parallel group); they exchange tokens at each MoE layer.
    overhead_s : float
        Seconds added to every step: scheduling, sampling and host work that is not hidden behind the GPU.
    dispatch_s : float
        Host seconds to launch one kernel; the step cannot be shorter than its kernels × this (BestServe's
        "decode is dispatch-bound"). 0 with captured CUDA graphs, 5e-6 is typical of eager PyTorch.
    clock : float
        Core clock as a share of the highest (``perf.energy``). Compute scales with it, the bandwidth hardly
        (``MEMORY_CLOCK_EXPONENT``); what the host and the links do does not.
    alpha_s : float
        Latency of one hop of a collective, seconds; negative: that of the card's link (``collective_link``).
    """

    def __init__(
        self,
        model: ModelSpec,
        hardware: HardwareSpec,
        tp: int = 1,
        ep: int = 1,
        mfu: float = DEFAULT_MFU,
        mbu: float = DEFAULT_MBU,
        attention_mfu: float = DEFAULT_ATTENTION_MFU,
        attention_mbu: float = DEFAULT_ATTENTION_MBU,
        causal: bool = True,
        elementwise: bool = True,
        kv_dtype: str = "bf16",
        overhead_s: float = 0.0,
        dispatch_s: float = 0.0,
        alpha_s: float = -1.0,
        clock: float = 1.0,
    ) -> None:
        check_tp(tp, model.heads)
        self.mfu = mfu
        self.mbu = mbu
        self.attention_mfu = attention_mfu
        self.attention_mbu = attention_mbu
        self.kv_dtype = kv_dtype
        self.dispatch_s = dispatch_s
        self.clock = clock
        self.model = model
        self.hardware = hardware
        self.tp = tp
        self.ep = ep
        self.causal = causal
        self.elementwise = elementwise
        self.overhead_s = overhead_s
        link_Bps, link_alpha_s = collective_link(hardware)
        self.alpha_s = link_alpha_s if alpha_s < 0.0 else alpha_s
        self.floor_s = dispatch_s * (KERNELS_PER_LAYER * model.layers + 4)
        # Seconds per FLOP and per byte: multiplying is cheaper than dividing.
        bandwidth: float = hardware.bandwidth_Bps * clock**MEMORY_CLOCK_EXPONENT
        self._flop_s = 1.0 / (hardware.flops_of(model.weight_dtype) * mfu * clock)
        self._byte_s = 1.0 / (bandwidth * mbu)
        self._link_s = 1.0 / link_Bps
        # The classifier is never quantised.
        self._row_flop_s = 1.0 / (hardware.flops_of("bf16") * mfu * clock)
        self._att_flop_s = 1.0 / (hardware.flops_of("bf16") * attention_mfu * clock)
        self._att_byte_s = 1.0 / (bandwidth * attention_mbu)
        self._set_attention(dtype_bytes(kv_dtype))
        self._products = self._matrix_products()
        self._token_cache: dict[int, float] = {}
        self._row_cache: dict[int, float] = {}
        self._base_cache: dict[int, float] = {}

    def sms(self) -> int:
        """See :class:`StepModel`."""
        return self.hardware.sms

    def part(self, compute: float, bandwidth: float) -> RooflineStepModel:
        """See :class:`StepModel`. Links, host overhead and launches cost the same."""
        return RooflineStepModel(
            self.model,
            self.hardware,
            self.tp,
            self.ep,
            self.mfu * compute,
            self.mbu * bandwidth,
            self.attention_mfu * compute,
            self.attention_mbu * bandwidth,
            self.causal,
            self.elementwise,
            self.kv_dtype,
            self.overhead_s,
            self.dispatch_s,
            self.alpha_s,
            self.clock,
        )

    def _set_attention(self, kv_each: float) -> None:
        """Coefficients of attention, for all layers: seconds per pair, per query token and per key token."""
        m = self.model
        heads = m.heads / self.tp
        layers = float(m.layers)
        flop, byte = self._att_flop_s * layers, self._att_byte_s * layers
        if m.is_mla:
            latent = m.kv_lora_rank + m.rope_head_dim
            # Decode works on the latent itself (absorbed); prefill expands it to full heads first.
            self._dec_pair_s = flop * heads * (2.0 * latent + 2.0 * m.kv_lora_rank + 2.0)
            self._dec_query_s = byte * heads * (latent + m.kv_lora_rank) * 2.0
            self._key_s = byte * latent * kv_each
            full = m.nope_head_dim + m.rope_head_dim
            self._pre_pair_s = flop * heads * (2.0 * full + 2.0 * m.v_head_dim + 2.0)
            self._pre_query_s = byte * heads * (full + m.v_head_dim) * 2.0
            expand = m.kv_lora_rank * heads * (m.nope_head_dim + m.v_head_dim)
            self._past_s = self._flop_s * layers * 2.0 * expand
            return
        kv_heads = max(1.0, m.kv_heads / self.tp)
        self._dec_pair_s = flop * heads * (4.0 * m.head_dim + 2.0)
        self._dec_query_s = byte * 2.0 * heads * m.head_dim * 2.0
        self._key_s = byte * 2.0 * kv_heads * m.head_dim * kv_each
        self._pre_pair_s = self._dec_pair_s
        self._pre_query_s = self._dec_query_s
        self._past_s = 0.0

    def _matrix_products(self) -> list[tuple[float, float, float]]:
        """(inputs, outputs, layers) of every matrix product that all tokens pass, on one GPU of the group."""
        m = self.model
        tp = float(self.tp)
        h, layers = float(m.hidden), float(m.layers)
        products: list[tuple[float, float, float]] = []
        if m.is_mla:
            full = m.nope_head_dim + m.rope_head_dim
            if m.q_lora_rank:
                products.append((h, float(m.q_lora_rank), layers))
                products.append((float(m.q_lora_rank), m.heads * full / tp, layers))
            else:
                products.append((h, m.heads * full / tp, layers))
            products.append((h, float(m.kv_lora_rank + m.rope_head_dim), layers))
            products.append((float(m.kv_lora_rank), m.heads * (m.nope_head_dim + m.v_head_dim) / tp, layers))
            products.append((m.heads * m.v_head_dim / tp, h, layers))
        else:
            kv = max(1.0, m.kv_heads / tp) * m.head_dim
            products.append((h, m.heads * m.head_dim / tp, layers))
            products.append((h, kv, 2.0 * layers))
            products.append((m.heads * m.head_dim / tp, h, layers))
        dense = layers - m.moe_layers
        if dense > 0:
            products.append((h, m.intermediate / tp, dense * (m.mlp_matrices - 1)))
            products.append((m.intermediate / tp, h, dense))
        if m.is_moe:
            products.append((h, float(m.experts), float(m.moe_layers)))
            if m.shared_intermediate:
                products.append((h, m.shared_intermediate / tp, float(m.moe_layers * (m.mlp_matrices - 1))))
                products.append((m.shared_intermediate / tp, h, float(m.moe_layers)))
        return products

    def all_reduce_s(self, size_bytes: float) -> float:
        """Ring all-reduce of ``size_bytes`` over the ``tp`` GPUs, seconds; 0 for one GPU.

        ``2 (N-1) alpha + 2 (N-1) size / (N rate) + N (N-1) size / Pi`` (DuetServe; the last term, the additions, is
        negligible and kept as published). ``alpha`` and ``rate`` are those of ``collective_link``.
        """
        n = float(self.tp)
        if n <= 1.0:
            return 0.0
        wire = 2.0 * (n - 1.0) * size_bytes / n * self._link_s
        return 2.0 * (n - 1.0) * self.alpha_s + wire + n * (n - 1.0) * size_bytes * self._flop_s

    def moe_s(self, tokens: float) -> float:
        """One MoE layer's routed experts for ``tokens`` tokens on this rank, exchange included, seconds.

        Weights read: the expected number of distinct experts among all tokens of the ``ep`` ranks, this rank's share.
        """
        m = self.model
        if not m.is_moe or tokens <= 0.0:
            return 0.0
        ranks = float(self.ep)
        expert = float(m.mlp_matrices * m.hidden * m.expert_intermediate) / self.tp
        picked = tokens * m.experts_per_token
        distinct = expected_experts(m.experts, m.experts_per_token, tokens * ranks) / ranks
        moved = 2.0 * picked * (2.0 * m.hidden + m.mlp_matrices * m.expert_intermediate / self.tp)
        compute = 2.0 * picked * expert * self._flop_s
        memory = (distinct * expert * m.weight_bytes_each + moved) * self._byte_s
        seconds = max(compute, memory)
        if ranks > 1.0:
            # All-gather of every rank's tokens, then reduce-scatter of the results.
            seconds += 2.0 * ((ranks - 1.0) * self.alpha_s + (ranks - 1.0) * tokens * m.hidden * 2.0 * self._link_s)
        return seconds

    def tokens_s(self, tokens: int) -> float:
        """Seconds of all that depends only on the number of tokens in the step: matrix products, experts, collectives.

        Attention, classifier and overhead are apart. Remembered per token count.
        """
        known = self._token_cache.get(tokens)
        if known is not None:
            return known
        m = self.model
        n = float(tokens)
        weight = m.weight_bytes_each
        total = 0.0
        for d_in, d_out, layers in self._products:
            compute = 2.0 * n * d_in * d_out * self._flop_s
            memory = (2.0 * n * (d_in + d_out) + weight * d_in * d_out) * self._byte_s
            total += layers * (compute if compute > memory else memory)
        total += m.moe_layers * self.moe_s(n)
        total += m.layers * 2.0 * self.all_reduce_s(n * m.hidden * 2.0)
        if self.elementwise:
            # Two norms with residual (read two, write two) on whole rows; activation reads gate and up, writes one.
            wide = 0.0 if m.is_moe else 3.0 * m.intermediate / self.tp
            qk = 2.0 * (m.heads + m.kv_heads) * m.head_dim / self.tp
            total += m.layers * 2.0 * n * (8.0 * m.hidden + wide + qk) * self._byte_s
        self._token_cache[tokens] = total
        return total

    def rows_s(self, rows: int) -> float:
        """Seconds of the classifier for ``rows`` sequences (only a request's last token in the step passes it)."""
        known = self._row_cache.get(rows)
        if known is not None:
            return known
        m = self.model
        d_in, d_out = float(m.hidden), float(m.vocab) / self.tp
        compute = 2.0 * rows * d_in * d_out * self._row_flop_s
        seconds = max(compute, 2.0 * (rows * (d_in + d_out) + d_in * d_out) * self._byte_s)
        self._row_cache[rows] = seconds
        return seconds

    def _decode_base(self, decodes: int) -> float:
        known = self._base_cache.get(decodes)
        if known is None:
            known = self.tokens_s(decodes) + self.rows_s(decodes)
            self._base_cache[decodes] = known
        return known

    def attention_rates(self) -> tuple[float, float]:
        """Least seconds of attention per KV token that a decode reads, and per pair of a prompt token and one it sees.

        A decode step over N KV tokens takes at least N times the first for them, a whole prompt of L tokens, in
        whatever chunks, at least L (L + 1) / 2 times the second.
        """
        by_compute = min(self._dec_pair_s, self._pre_pair_s)
        return max(self._key_s, by_compute), self._pre_pair_s

    def step_s(self, decodes: int, context: int, chunk_new: list[int], chunk_past: list[int]) -> float:
        """See :class:`StepModel`. An empty step takes no time."""
        by_compute = self._dec_pair_s * context
        by_memory = self._dec_query_s * decodes + self._key_s * context
        attention = by_compute if by_compute > by_memory else by_memory
        count = len(chunk_new)
        if count == 0:
            if decodes == 0:
                return 0.0
            busy = self._decode_base(decodes) + attention
            return self.overhead_s + (busy if busy > self.floor_s else self.floor_s)
        tokens = decodes
        for i in range(count):
            new = chunk_new[i]
            past = chunk_past[i]
            tokens += new
            pairs = new * (past + 0.5 * (new + 1)) if self.causal else float(new * (past + new))
            compute = self._pre_pair_s * pairs + self._past_s * past
            memory = self._pre_query_s * new + self._key_s * (past + new)
            attention += compute if compute > memory else memory
        busy = self.tokens_s(tokens) + self.rows_s(decodes + count) + attention
        return self.overhead_s + (busy if busy > self.floor_s else self.floor_s)

    def decode_affine(self, decodes: int, context: int) -> tuple[float, float, float]:
        """See :class:`StepModel`. The highest of three lines: launch floor, compute-bound or memory-bound attention."""
        if decodes == 0:
            return 0.0, 0.0, float("inf")
        base = self._decode_base(decodes)
        query = base + self._dec_query_s * decodes
        flat = self.floor_s
        memory = query + self._key_s * context
        compute = base + self._dec_pair_s * context
        # The line on top at `context`, and where a steeper one overtakes it.
        if flat > memory and flat > compute:
            limit = _meets(flat, 0.0, query, self._key_s, context)
            limit = min(limit, _meets(flat, 0.0, base, self._dec_pair_s, context))
            return self.overhead_s + flat, 0.0, limit
        if memory >= compute:
            limit = _meets(query, self._key_s, base, self._dec_pair_s, context)
            return self.overhead_s + query, self._key_s, limit
        limit = _meets(base, self._dec_pair_s, query, self._key_s, context)
        return self.overhead_s + base, self._dec_pair_s, limit


def _meets(intercept: float, slope: float, other_intercept: float, other_slope: float, context: int) -> float:
    """Largest whole context up to which the first line is on top, given that it is on top at ``context``."""
    if other_slope <= slope:
        return float("inf")
    crossing = (intercept - other_intercept) / (other_slope - slope)
    whole = float(int(crossing)) if crossing < 1e15 else float("inf")
    return whole if whole > context else float(context)
