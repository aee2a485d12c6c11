"""Custody of transfer parameters: good for one pull, within the safe part of the lease, with exactly the right blocks.

Stock vLLM trusts what it is given: a used or expired claim reads whatever is in those blocks now and answers 200 with
wrong text, and a list that is one block short kills the server (docs/live.md, "Traps"). So claims are typed objects
that only this gateway holds, and :meth:`Claim.redeem` is the only way to their content.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from penstock.core.custody import SAFE_SHARE_OF_LEASE, Custody
from penstock.live.wire import Json


class ClaimRefused(Exception):
    """The claim must not be used; ``str`` says why."""


class Claim:
    """Pinned KV of ``tokens`` tokens on instance ``owner``, for ``request``. Times are the gateway's own clock's."""

    def __init__(
        self, request: int, owner: int, tokens: int, params: Json, block_size: int, now_s: float, lease_s: float
    ) -> None:
        self.request = request
        self.custody = Custody(owner, tokens, now_s, lease_s)
        self._params = params
        self._block_size = block_size

    def redeem(self, sequence_tokens: int, now_s: float) -> Json:
        """The parameters for the one pull by a request of ``sequence_tokens`` tokens.

        The block lists are cut or, with their last block, padded to ``ceil(sequence_tokens / block size)``: the last
        token is computed again after a pull, so what a padded slot holds does not matter.

        Raises
        ------
        ClaimRefused
            It was used before, is too old, or names no blocks.
        """
        refusal = self.custody.refusal(now_s)
        if refusal is not None:
            raise ClaimRefused(refusal)
        self.custody = self.custody.spent()
        wanted = -(-sequence_tokens // self._block_size)
        groups = self._params.get("remote_block_ids")
        if not isinstance(groups, list) or not groups or not all(isinstance(g, list) and g for g in groups):
            raise ClaimRefused("it names no blocks")
        fitted = [fit_blocks(group, wanted) for group in groups]
        return {**self._params, "remote_block_ids": fitted}

    def unspent(self) -> None:
        """The engine refused the whole request as invalid, before it pulled anything: the claim is as good as new."""
        self.custody = msgspec.structs.replace(self.custody, used=False)


def fit_blocks(blocks: list[int], wanted: int) -> list[int]:
    """Cut or pad (with the last id) to ``wanted`` ids."""
    return blocks[:wanted] if len(blocks) >= wanted else blocks + [blocks[-1]] * (wanted - len(blocks))


def is_claim(params: Json | None) -> bool:
    """Has an engine really pinned something?"""
    return bool(params) and bool(params and params.get("do_remote_prefill") and params.get("remote_block_ids"))


class ClaimRow(msgspec.Struct, frozen=True):
    """One open claim, for operators: who holds which pinned KV, since and until when (s on the gateway's clock)."""

    request: int
    instance: int
    tokens: int
    issued_at_s: float
    use_until_s: float
    lease_until_s: float
    used: bool


class ClaimTable:
    """All claims whose KV may still be pinned. ``expired`` counts those that ran out unused."""

    def __init__(self) -> None:
        self._open: dict[int, Claim] = {}
        self.expired = 0
        self.issued = 0

    def __len__(self) -> int:
        return len(self._open)

    def put(self, claim: Claim) -> None:
        """Take note of a new claim."""
        self.issued += 1
        self._open[id(claim)] = claim

    def settle(self, claim: Claim | None) -> None:
        """The pull is over (the target computes): the owner has been told to free the blocks."""
        if claim is not None:
            self._open.pop(id(claim), None)

    def owner_gone(self, instance: int) -> None:
        """An instance died: nothing is pinned there any more."""
        for key in [k for k, c in self._open.items() if c.custody.owner == instance]:
            del self._open[key]

    def sweep(self, now_s: float) -> None:
        """Drop claims whose lease has run out: the engine has freed the blocks by itself."""
        for key, claim in list(self._open.items()):
            if now_s - claim.custody.issued_at_s > claim.custody.lease_s:
                del self._open[key]
                if not claim.custody.used:
                    self.expired += 1

    def rows(self) -> Iterator[ClaimRow]:
        """Every open claim."""
        for claim in self._open.values():
            c = claim.custody
            safe = c.issued_at_s + SAFE_SHARE_OF_LEASE * c.lease_s
            yield ClaimRow(claim.request, c.owner, c.tokens, c.issued_at_s, safe, c.issued_at_s + c.lease_s, c.used)
