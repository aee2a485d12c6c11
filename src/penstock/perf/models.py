"""Model catalogue: the shapes of a transformer that its costs depend on, read from a Hugging Face ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from penstock.core.errors import PenstockError
from penstock.perf.lookup import DTYPE_BYTES, catalogue_json, unknown_name

# Architectures whose MLP is up + down instead of gate + up + down.
_TWO_MATRIX_MLP = {"opt", "gpt2", "gptj", "gpt_neox", "bloom", "falcon", "phi", "starcoder2", "gpt_bigcode"}


@dataclass(frozen=True)
class ModelSpec:
    """Shapes of one decoder-only model. Counts are of whole layers, before any tensor or expert parallelism.

    ``kv_lora_rank > 0`` marks multi-head latent attention (MLA): the cache then holds ``kv_lora_rank + rope_head_dim``
    numbers a token and layer, shared by all heads. ``experts > 0`` marks a mixture of experts in the layers after
    ``dense_layers``. Source of the field meanings: the ``config.json`` of Hugging Face transformers.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_context: int = 0
    tied_embeddings: bool = False
    mlp_matrices: int = 3
    weight_dtype: str = "bf16"
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    dense_layers: int = 0
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    nope_head_dim: int = 0
    rope_head_dim: int = 0
    v_head_dim: int = 0
    source: str = ""

    @property
    def is_moe(self) -> bool:
        """True for a mixture of experts."""
        return self.experts > 0

    @property
    def is_mla(self) -> bool:
        """True for multi-head latent attention (DeepSeek-V2 and V3)."""
        return self.kv_lora_rank > 0

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return self.layers - self.dense_layers if self.is_moe else 0

    @property
    def weight_bytes_each(self) -> float:
        """Bytes of one weight of the linear layers (embeddings and the classifier stay at two bytes)."""
        return DTYPE_BYTES[self.weight_dtype]

    def attention_params(self) -> int:
        """Weights of the attention projections of one layer (norms and biases, under 0.1 %, are left out)."""
        if not self.is_mla:
            return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        qk = self.nope_head_dim + self.rope_head_dim
        query = (
            self.hidden * self.q_lora_rank + self.q_lora_rank * self.heads * qk
            if self.q_lora_rank
            else self.hidden * self.heads * qk
        )
        compress = self.hidden * (self.kv_lora_rank + self.rope_head_dim)
        expand = self.kv_lora_rank * self.heads * (self.nope_head_dim + self.v_head_dim)
        return query + compress + expand + self.heads * self.v_head_dim * self.hidden

    def _mlp_params(self, experts: float) -> float:
        dense = (self.layers - self.moe_layers) * self.mlp_matrices * self.hidden * self.intermediate
        routed = experts * self.mlp_matrices * self.hidden * self.expert_intermediate
        shared = self.mlp_matrices * self.hidden * self.shared_intermediate + self.hidden * self.experts
        return dense + self.moe_layers * (routed + shared)

    def params(self) -> float:
        """All weights, in numbers (embeddings included). Llama-3.1-8B: 8.03e9; DeepSeek-V3 without MTP: 671e9."""
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return embeddings + self.layers * self.attention_params() + self._mlp_params(self.experts)

    def active_params(self) -> float:
        """Weights that one token passes through, in numbers, the embedding look-up left out."""
        return (
            self.vocab * self.hidden + self.layers * self.attention_params() + self._mlp_params(self.experts_per_token)
        )

    def weight_bytes(self, tp: int = 1, ep: int = 1) -> float:
        """Bytes of weights on one GPU.

        ``tp`` splits everything (embeddings too, as vLLM does); ``ep`` splits the routed experts only and multiplies
        with ``tp`` there.
        """
        embeddings = 2.0 * self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        each = self.weight_bytes_each
        rest = each * (self.layers * self.attention_params() + self._mlp_params(0.0))
        routed = each * (self._mlp_params(self.experts) - self._mlp_params(0.0))
        return (embeddings + rest) / tp + routed / (tp * ep)


def expected_experts(experts: int, per_token: int, tokens: float) -> float:
    """Expected number of distinct experts that ``tokens`` tokens activate, each picking ``per_token`` at random.

    ``E (1 - (1 - k/E)^n)``, in experts (0 … ``experts``). Uniform routing is an assumption: trained routers are
    balanced by design, but a skewed one touches fewer.
    """
    if experts <= 0 or tokens <= 0.0:
        return 0.0
    return float(experts * (1.0 - (1.0 - per_token / experts) ** tokens))


def from_hf_config(config: Mapping[str, Any], name: str, source: str = "") -> ModelSpec:
    """A :class:`ModelSpec` from the contents of a Hugging Face ``config.json``.

    Understands dense attention with grouped heads, Qwen-MoE and Mixtral experts, and DeepSeek's MLA. Raises
    :class:`PenstockError` naming the first field that is missing. Quantised weights: ``quantization_config`` of 8 or
    4 bits is taken as that many bits for all linear layers.
    """
    cfg: Mapping[str, Any] = config.get("text_config") or config

    def need(*keys: str) -> int:
        for key in keys:
            if cfg.get(key) is not None:
                return int(cfg[key])
        raise PenstockError(
            f"model {name}: config.json has no {' or '.join(keys)}", "give the config.json of a decoder-only LLM"
        )

    hidden, heads = need("hidden_size", "n_embd"), need("num_attention_heads", "n_head")
    layers = need("num_hidden_layers", "n_layer")
    model_type = str(cfg.get("model_type", ""))
    experts = int(cfg.get("num_experts") or cfg.get("n_routed_experts") or cfg.get("num_local_experts") or 0)
    intermediate = int(cfg.get("intermediate_size") or cfg.get("ffn_dim") or cfg.get("n_inner") or 4 * hidden)
    expert_intermediate = int(cfg.get("moe_intermediate_size") or intermediate) if experts else 0
    shared = int(cfg.get("shared_expert_intermediate_size") or 0)
    if experts and not shared:
        shared = int(cfg.get("n_shared_experts") or 0) * expert_intermediate
    dense_layers = int(cfg.get("first_k_dense_replace") or 0) if experts else 0
    if experts:
        stride = int(cfg.get("decoder_sparse_step") or 1)
        dense_layers += len(set(cfg.get("mlp_only_layers") or []) | {i for i in range(layers) if (i + 1) % stride})
    return ModelSpec(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=int(cfg.get("num_key_value_heads") or heads),
        head_dim=int(cfg.get("head_dim") or hidden // heads),
        intermediate=intermediate,
        vocab=need("vocab_size"),
        max_context=int(cfg.get("max_position_embeddings") or 0),
        tied_embeddings=bool(cfg.get("tie_word_embeddings", False)),
        mlp_matrices=2 if model_type in _TWO_MATRIX_MLP else 3,
        weight_dtype=_weight_dtype(config, cfg),
        experts=experts,
        experts_per_token=need("num_experts_per_tok", "num_experts_per_token") if experts else 0,
        expert_intermediate=expert_intermediate,
        shared_intermediate=shared,
        dense_layers=dense_layers,
        q_lora_rank=int(cfg.get("q_lora_rank") or 0),
        kv_lora_rank=int(cfg.get("kv_lora_rank") or 0),
        nope_head_dim=int(cfg.get("qk_nope_head_dim") or 0),
        rope_head_dim=int(cfg.get("qk_rope_head_dim") or 0),
        v_head_dim=int(cfg.get("v_head_dim") or 0),
        source=source,
    )


def _weight_dtype(config: Mapping[str, Any], cfg: Mapping[str, Any]) -> str:
    quant = config.get("quantization_config") or cfg.get("quantization_config") or {}
    method = str(quant.get("quant_method", ""))
    bits = quant.get("bits") or quant.get("weight_bits")
    if "fp8" in method:
        return "fp8"
    if bits in (4, 8):
        return f"int{bits}"
    raw = str(cfg.get("torch_dtype") or cfg.get("dtype") or "bfloat16")
    return {"float16": "fp16", "float32": "fp32"}.get(raw, "bf16")


@cache
def _builtins() -> dict[str, ModelSpec]:
    rows = catalogue_json("models.json")
    return {name: from_hf_config(row["config"], name, row["source"]) for name, row in rows.items()}


def model_names() -> list[str]:
    """Names of the built-in models, sorted."""
    return sorted(_builtins())


def model_spec(name_or_path: str) -> ModelSpec:
    """The built-in model of that name (any case), or the one described by a ``config.json`` or a folder holding one.

    A built-in name wins over a file of the same name. Raises :class:`PenstockError` naming close matches.
    """
    found = _builtins().get(name_or_path.lower())
    if found is not None:
        return found
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise PenstockError(f"{path}:{error.lineno}: not JSON ({error.msg})", "give a config.json") from error
        if not isinstance(config, dict):
            raise PenstockError(f"{path}: not a JSON object", "give a config.json")
        return from_hf_config(config, path.parent.name or str(path), str(path))
    raise unknown_name("model", name_or_path, model_names(), "or give the path of a config.json")
