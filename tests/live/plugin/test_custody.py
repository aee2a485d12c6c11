"""Block lists fit what is pulled, from the first block on."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from penstock.live.plugin.penstock_engine.custody import blocks_of, fitted, padded, signed


@given(st.lists(st.integers(), min_size=1, max_size=20), st.integers(1, 300), st.integers(1, 32))
def test_a_padded_list_is_as_long_as_the_tokens_need(ids: list[int], tokens: int, size: int) -> None:
    result = padded(ids, tokens, size)
    assert len(result) == blocks_of(tokens, size)
    assert (len(result) - 1) * size < tokens <= len(result) * size
    kept = min(len(ids), len(result))
    assert result[:kept] == ids[:kept]
    assert all(block == ids[-1] for block in result[kept:])


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([1, 4, 32]), st.integers(0, 2))
def test_a_puller_never_reads_beyond_what_is_there(prompt: int, tokens: int, size: int, spare: int) -> None:
    ids = list(range(100, 100 + blocks_of(tokens, size) + spare))
    params: dict[str, Any] = signed({"remote_block_ids": [ids], "x": 1}, tokens, size)
    found = fitted(params, prompt, size)
    assert found is not None
    use, (used,) = found
    assert use == min(prompt, tokens)
    assert used == ids[: blocks_of(use, size)]
    assert params["x"] == 1


def test_parameters_of_others_are_left_alone() -> None:
    params: dict[str, Any] = signed({"remote_block_ids": [[1, 2]]}, 8, 4)
    assert fitted(params, 8, 4) == (8, [[1, 2]])
    assert fitted(params, 8, 16) is None
    assert fitted({"remote_block_ids": [[1, 2]]}, 8, 4) is None
    assert fitted(params | {"remote_block_ids": [[1], [2]]}, 8, 4) is None
    assert fitted(params | {"remote_block_ids": None}, 8, 4) is None
