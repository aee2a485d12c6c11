"""Fixed roles, no migration: what prefill/decode disaggregation does without a controller that adapts.

* ``static``: shortest prefill queue, least loaded decode, as DistServe dispatches (arXiv 2401.09670); both parts are
  options. The paper does not say how decode load is counted; requests are our default.
* ``round-robin``: both phases in turn, the first baseline of STAR/ARES (arXiv 2510.13668) and vLLM's proxy examples.
* ``least-kv``: decode goes where the fewest KV tokens are, prefill where it will be done first. FlowKV-like, the
  "current load" baseline of STAR/ARES; FlowKV's own load score has more terms that we have not got.
"""

from __future__ import annotations

from penstock.core.types import Slo
from penstock.policy.latency import PrefillFit
from penstock.policy.options import Option, OptionValue, word
from penstock.policy.parts import Beliefs, DecodePlacement, Policy, PrefillPlacement
from penstock.policy.placement import (
    FewestRequests,
    LeastPrefillWork,
    LeastResident,
    RoundRobinDecode,
    RoundRobinPrefill,
    ShortestQueue,
)

PREFILL_WORDS = ("shortest-queue", "least-work", "round-robin")
DECODE_WORDS = ("fewest-requests", "least-kv", "round-robin")

STATIC_OPTIONS = (
    Option("prefill", "shortest-queue", "how a prefill instance is chosen", "paper", words=PREFILL_WORDS),
    Option("decode", "fewest-requests", "how a decode instance is chosen", words=DECODE_WORDS),
)


def prefill_part(word: str, beliefs: Beliefs) -> PrefillPlacement:
    """The placement of that name (one of ``PREFILL_WORDS``)."""
    if word == "round-robin":
        return RoundRobinPrefill()
    if word == "least-work":
        return LeastPrefillWork(PrefillFit(beliefs))
    return ShortestQueue()


def decode_part(word: str) -> DecodePlacement:
    """The placement of that name (one of ``DECODE_WORDS``)."""
    if word == "round-robin":
        return RoundRobinDecode()
    if word == "least-kv":
        return LeastResident()
    return FewestRequests()


def static(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``static``."""
    return Policy("static", prefill_part(word(options, "prefill"), beliefs), decode_part(word(options, "decode")))


def round_robin(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``round-robin``."""
    return Policy("round-robin", RoundRobinPrefill(), RoundRobinDecode())


def least_kv(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``least-kv``."""
    return Policy("least-kv", LeastPrefillWork(PrefillFit(beliefs)), LeastResident())
