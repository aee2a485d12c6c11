"""Block lists that go from engine to engine: how many blocks belong to how many tokens, and what a puller may read.

NIXL pairs the end of the giver's list with the end of the taker's and checks nothing else: a list that is one block
short ends the taker's process, one that is too long gives it the wrong blocks without a word. So the giver says how
many tokens its list is good for, and a taker with the plugin reads that much, whatever the length of its prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TOKENS = "penstock_tokens"
"""Key in the transfer parameters: tokens whose KV the blocks hold, whole and final."""

BLOCK_SIZE = "penstock_block_size"
"""Key in the transfer parameters: tokens a block."""


def blocks_of(tokens: int, block_size: int) -> int:
    """Blocks that ``tokens`` tokens occupy."""
    return -(-tokens // block_size)


def padded(ids: Sequence[int], tokens: int, block_size: int) -> list[int]:
    """A list for exactly ``tokens`` tokens: cut, or its last block repeated for a token that is computed again."""
    need = blocks_of(tokens, block_size)
    return ([*ids] + [ids[-1]] * need)[:need]


def signed(params: Mapping[str, Any], tokens: int, block_size: int) -> dict[str, Any]:
    """The parameters of a giver whose blocks hold ``tokens`` tokens."""
    return {**params, "remote_num_tokens": tokens, TOKENS: tokens, BLOCK_SIZE: block_size}


def fitted(params: Mapping[str, Any], prompt: int, block_size: int) -> tuple[int, list[list[int]]] | None:
    """Tokens to pull for a prompt of ``prompt`` tokens, and the block lists for just these.

    ``None`` if the parameters come from an engine without the plugin, or with blocks of another size: then vLLM's own
    rules hold.
    """
    tokens = params.get(TOKENS)
    groups = params.get("remote_block_ids")
    if not isinstance(tokens, int) or params.get(BLOCK_SIZE) != block_size or not groups or len(groups) != 1:
        return None
    use = min(prompt, tokens, len(groups[0]) * block_size)
    return use, [list(groups[0])[: blocks_of(use, block_size)]]
