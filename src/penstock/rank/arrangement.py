"""One way to use the GPUs: which instances, of what hardware and parallelism, in which number types."""

from __future__ import annotations

import msgspec

from penstock.experiment.setup import Setup, replace

ROUND_TOKENS = 512
"""A token budget made up for whole prompts is a multiple of this."""


class Arrangement(msgspec.Struct, frozen=True):
    """Instances and how they run.

    Mixed instances (``mixed > 0``) run on ``decode_hardware`` with ``decode_tp``; the fields of prefill then say the
    same. ``step_tokens`` is the token budget of a step, None for whole prompts (no chunked prefill).
    ``weight_dtype`` None keeps the number type of the model.
    """

    prefill: int
    decode: int
    mixed: int
    prefill_tp: int
    decode_tp: int
    prefill_hardware: str
    decode_hardware: str
    step_tokens: int | None
    weight_dtype: str | None
    kv_dtype: str

    @property
    def disaggregated(self) -> bool:
        """Prefill and decode on different instances?"""
        return self.mixed == 0

    @property
    def instances(self) -> int:
        """Engines."""
        return self.prefill + self.decode + self.mixed

    def kind(self) -> tuple[object, ...]:
        """What the instances are, whatever their numbers."""
        cards = (self.prefill_hardware, self.prefill_tp, self.decode_hardware, self.decode_tp)
        return (self.disaggregated, *cards, self.step_tokens, self.weight_dtype, self.kv_dtype)

    def gpus(self) -> dict[str, int]:
        """GPUs used, by hardware."""
        used = {self.prefill_hardware: self.prefill * self.prefill_tp}
        d = self.decode_hardware
        used[d] = used.get(d, 0) + (self.decode + self.mixed) * self.decode_tp
        return {name: count for name, count in used.items() if count}

    def total_gpus(self) -> int:
        """GPUs used, of all kinds."""
        return sum(self.gpus().values())


def title(a: Arrangement, hardware: bool = False) -> str:
    """``3P+5D``, ``2P(tp2)+4D``, ``8M whole prompts``, ``4M(tp2) chunks 512``; ``hardware`` names the cards too."""

    def group(count: int, letter: str, tp: int, card: str) -> str:
        inside = ([card] if hardware else []) + ([f"tp{tp}"] if tp > 1 else [])
        return f"{count}{letter}" + (f"({' '.join(inside)})" if inside else "")

    d = group(a.mixed or a.decode, "M" if a.mixed else "D", a.decode_tp, a.decode_hardware)
    text = d if a.mixed else f"{group(a.prefill, 'P', a.prefill_tp, a.prefill_hardware)}+{d}"
    if a.mixed:
        text += " whole prompts" if a.step_tokens is None else f" chunks {a.step_tokens}"
    if a.weight_dtype is not None:
        text += f" w-{a.weight_dtype}"
    return text if a.kv_dtype == "bf16" else f"{text} kv-{a.kv_dtype}"


def usd_per_hour(a: Arrangement, prices: dict[str, float]) -> float | None:
    """US dollars an hour at ``prices`` per GPU-hour; None where a price is not known."""
    used = a.gpus()
    if any(name not in prices for name in used):
        return None
    return sum(count * prices[name] for name, count in used.items())


def setup_of(base: Setup, a: Arrangement, longest: int) -> Setup:
    """The experiment under this arrangement.

    Disaggregated ones run the base's policy, the others ``mixed``. Without chunked prefill a step must have room for
    the ``longest`` request (prompt and output, tokens): vLLM refuses to start otherwise.
    """
    c = base.cluster
    tokens = a.step_tokens
    if tokens is None:
        tokens = max(c.max_num_batched_tokens, -(-longest // ROUND_TOKENS) * ROUND_TOKENS)
    cluster = replace(
        c,
        prefill=a.prefill,
        decode=a.decode,
        mixed=a.mixed,
        prefill_tp=a.prefill_tp,
        decode_tp=a.decode_tp,
        hardware=a.decode_hardware,
        prefill_hardware=a.prefill_hardware,
        decode_hardware=a.decode_hardware,
        weight_dtype=a.weight_dtype,
        kv_dtype=a.kv_dtype,
        chunked_prefill=a.step_tokens is not None,
        max_num_batched_tokens=tokens,
        max_num_seqs=min(c.max_num_seqs, tokens),
    )
    policy = base.policy if a.disaggregated else "mixed"
    options = base.options if a.disaggregated else {}
    return replace(base, policy=policy, options=options, cluster=cluster)
