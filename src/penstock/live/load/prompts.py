"""Prompt content: random, seeded, and shared exactly where the trace says that prompts share a prefix.

Content is cut from one pool of random token ids, so that a prompt costs a copy and not a draw of random numbers. The
first ids of a prompt (and of a prefix block) spell out a 64-bit number that only it has, so two prompts never share
a leading block of a prefix cache by accident.
"""

from __future__ import annotations

import numpy as np

from penstock.core.errors import PenstockError
from penstock.live.load.words import WORDS
from penstock.workload.trace import I64, Trace

POOL = 1 << 20
_MASK = (1 << 64) - 1
_UNIQUE, _SHARED = 0x5EED, 0x5A4E


def parse_vocab(text: str) -> range:
    """``300-499`` as the ids 300 to 499, ``512`` as 0 to 511.

    Raises
    ------
    PenstockError
        It is neither, or holds fewer than two ids.
    """
    low, dash, high = text.strip().partition("-")
    try:
        found = range(int(low), int(high) + 1) if dash else range(int(low))
    except ValueError:
        found = range(0)
    if len(found) < 2 or found[0] < 0:
        raise PenstockError(f"--vocab {text!r} is no range of token ids", "give 300-499, or 512 for 0 to 511")
    return found


class Pool:
    """Random token ids to cut prompts from; equal vocabularies and seeds give equal pools."""

    def __init__(self, vocab: range, seed: int) -> None:
        self.vocab = vocab
        self._ids: I64 = np.random.default_rng(seed & _MASK).integers(vocab.start, vocab.stop, POOL)

    def cut(self, key: int, length: int) -> I64:
        """``length`` ids for a 64-bit key; fewer are the beginning of more, and other keys begin otherwise."""
        lead = self._spelled(key)[:length]
        pieces, start, left = [np.array(lead, dtype=np.int64)], key % POOL, length - len(lead)
        while left > 0:
            piece = self._ids[start : start + left]
            pieces.append(piece)
            left -= len(piece)
            start = 0
        return np.concatenate(pieces)

    def _spelled(self, key: int) -> list[int]:
        base, first, digits = len(self.vocab), self.vocab.start, []
        while key:
            key, digit = divmod(key, base)
            digits.append(first + digit)
        return digits


class Prompts:
    """The prompts of a trace; equal arguments give equal prompts.

    Parameters
    ----------
    trace : Trace
        Lengths and, where it has them, prefix hashes: equal hashes at equal positions give equal tokens.
    vocab : range
        Ids to draw from.
    seed : int
        Of all content.
    salt : int
        Another salt, other content (for prompts that no cache can hold).
    """

    def __init__(self, trace: Trace, vocab: range, seed: int = 0, salt: int = 0) -> None:
        self._trace = trace
        self._seed = mix(seed, salt)
        self._pool = Pool(vocab, self._seed)

    def tokens(self, i: int, length: int | None = None, ratio: float = 1.0) -> list[int]:
        """Token ids of request ``i``.

        Parameters
        ----------
        length : int, optional
            Instead of the trace's prompt length.
        ratio : float
            Ids per token of the trace, by which the length of shared blocks is stretched (for text, where ids are
            words).
        """
        left = int(self._trace.prompt_tokens[i]) if length is None else length
        prefixes, cut = self._trace.prefixes, self._pool.cut
        parts: list[I64] = []
        if prefixes is not None:
            block = max(1, round(prefixes.block_tokens * ratio))
            for h in prefixes.of(i):
                if left <= 0:
                    break
                parts.append(cut(mix(self._seed ^ _SHARED, h), min(block, left)))
                left -= block
        if left > 0:
            parts.append(cut(mix(self._seed ^ _UNIQUE, i), left))
        ids: list[int] = (parts[0] if len(parts) == 1 else np.concatenate(parts)).tolist()
        return ids

    def text(self, i: int, words: int, ratio: float = 1.0) -> str:
        """``words`` common words for request ``i``; shared blocks as in :meth:`tokens`."""
        start, n = self._pool.vocab.start, len(WORDS)
        return " ".join([WORDS[(token - start) % n] for token in self.tokens(i, words, ratio)])


def mix(*parts: int) -> int:
    """A 64-bit number that depends on every bit of the parts (splitmix64, Steele et al. 2014)."""
    state = 0
    for part in parts:
        state = (state ^ (part & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state
