"""Who holds a request's KV, until when, and whether the claim has been used."""

from __future__ import annotations

import msgspec

SAFE_SHARE_OF_LEASE = 0.6
"""A claim older than this share of its lease is not used any more: the holder's clock is not ours (vLLM notes)."""


class Custody(msgspec.Struct, frozen=True, gc=False):
    """A claim on KV blocks pinned by ``owner``: good for one pull, within the safe part of the lease.

    ``tokens`` is the length of the sequence whose KV is pinned; times are seconds on the controller's clock.
    """

    owner: int
    tokens: int
    issued_at_s: float
    lease_s: float
    used: bool = False

    def refusal(self, now_s: float) -> str | None:
        """Why this claim must not be used now, or None if it may be."""
        if self.used:
            return "already used"
        if now_s - self.issued_at_s > SAFE_SHARE_OF_LEASE * self.lease_s:
            return "lease too old"
        return None

    def spent(self) -> Custody:
        """The same claim after its one use."""
        return msgspec.structs.replace(self, used=True)
