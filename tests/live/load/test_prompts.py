"""Prompt content: seeded, of the right length, and shared exactly where the trace says so."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.live.load.prompts import POOL, Pool, Prompts, parse_vocab
from penstock.live.load.words import WORDS
from penstock.workload.jsonlines import ragged
from penstock.workload.trace import Trace

VOCAB = range(300, 500)


def trace_of(lengths: list[int], hashes: list[list[int]] | None = None, block: int = 8) -> Trace:
    n = len(lengths)
    return Trace(
        np.zeros(n),
        np.array(lengths, np.int64),
        np.ones(n, np.int64),
        np.zeros(n, np.int16),
        prefixes=None if hashes is None else ragged(hashes, block),
    )


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(0, 2**70), st.integers(0, 3))
def test_lengths_and_seeds(lengths: list[int], seed: int, salt: int) -> None:
    trace = trace_of(lengths)
    prompts, again = Prompts(trace, VOCAB, seed, salt), Prompts(trace, VOCAB, seed, salt)
    for i, length in enumerate(lengths):
        tokens = prompts.tokens(i)
        assert len(tokens) == length
        assert set(tokens) <= set(VOCAB)
        assert tokens == again.tokens(i)


def test_no_two_prompts_share_a_block_by_chance() -> None:
    n = 5000
    prompts = Prompts(trace_of([64] * n), VOCAB, 3)
    assert len({tuple(prompts.tokens(i)[:16]) for i in range(n)}) == n
    salted = Prompts(trace_of([64] * n), VOCAB, 3, salt=4)
    assert salted.tokens(0) != prompts.tokens(0)


def test_equal_hashes_are_equal_tokens() -> None:
    hashes = [[1, 2, 3], [1, 2, 4], [1], []]
    prompts = Prompts(trace_of([24, 20, 30, 9], hashes), VOCAB)
    first, second, third, last = (prompts.tokens(i) for i in range(4))
    assert first[:16] == second[:16]
    assert first[16:] != second[16:]
    assert [len(x) for x in (first, second, third, last)] == [24, 20, 30, 9]
    assert third[:8] == first[:8]
    assert third[8:16] != first[8:16]
    assert last[:8] != first[:8]
    words = [prompts.text(i, n, ratio=0.5).split() for i, n in ((0, 12), (1, 10))]
    assert words[0][:8] == words[1][:8]
    assert [len(x) for x in words] == [12, 10]
    assert set(words[0]) <= set(WORDS)


def test_a_shorter_cut_begins_a_longer_one() -> None:
    pool = Pool(VOCAB, 1)
    key = POOL - 5  # starts near the end of the pool: wraps around
    long = pool.cut(key, POOL + 20).tolist()
    assert pool.cut(key, 40).tolist() == long[:40]
    assert len(long) == POOL + 20


def test_vocabularies() -> None:
    assert parse_vocab("300-499") == VOCAB
    assert parse_vocab("512") == range(512)
    for text in ("", "9-9", "-3", "a-b", "5-2", "1"):
        with pytest.raises(PenstockError, match="range of token ids"):
            parse_vocab(text)
