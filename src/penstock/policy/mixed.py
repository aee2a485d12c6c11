"""No disaggregation: each replica prefills in chunks between its decode steps, as plain vLLM does.

The engine does the chunking; this policy only chooses the replica. The baseline of every disaggregation paper, none of
which says how its replicas were chosen. Default: the replica that holds the fewest tokens, waiting prompts included,
so that a gain over it is not a gain over a poor load balancer; ``round-robin`` is what a plain HTTP balancer does.
"""

from __future__ import annotations

from penstock.core.types import Role, Slo
from penstock.policy.options import Option, OptionValue, word
from penstock.policy.parts import Beliefs, Choice, Policy, PrefillPlacement
from penstock.policy.placement import RoundRobinPrefill, least_that_holds
from penstock.policy.view import ClusterView, RequestRecord

MIXED_OPTIONS = (Option("placement", "least-tokens", "how a replica is chosen", words=("least-tokens", "round-robin")),)


class LeastTokens(PrefillPlacement):
    """The mixed instance with the fewest tokens: KV of running decodes and prompts not yet prefilled."""

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`PrefillPlacement`."""
        rows = view.mixed
        score = view.resident_tokens(now_s, rows) + view.prefill_tokens[rows]
        return least_that_holds(view, rows, score, request.context_tokens())


def mixed(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``mixed``."""
    if word(options, "placement") == "round-robin":
        return Policy("mixed", RoundRobinPrefill(Role.MIXED))
    return Policy("mixed", LeastTokens())
