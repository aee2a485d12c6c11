"""Tokens of the emulated engine: bytes, a few markers, and a next token that depends on all tokens before it.

Ids 0 to 255 are bytes of UTF-8; markers follow; all further ids are valid and stand for nothing. The next token is a
pure function of the token ids so far, so any instance continues a sequence as any other would: that is what lets a
test tell a correct migration from one that lost, repeated or confused a token. It stands for greedy decoding;
temperature and seeds change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint16]

SIZE: Final = 1 << 16
BOS: Final = 256
EOS: Final = 257
END: Final = 258
ROLES: Final = {"system": 259, "developer": 259, "user": 260, "assistant": 261, "tool": 262, "function": 262}
_NAMES: Final = {256: "<|bos|>", 257: "<|eos|>", 258: "<|end|>"} | {
    259: "<|system|>",
    260: "<|user|>",
    261: "<|assistant|>",
    262: "<|tool|>",
}

MULTIPLIER: Final = 0xD1342543DE82EF95
SEED: Final = 0x9E3779B97F4A7C15
MASK: Final = (1 << 64) - 1
_EOS_MIX: Final = 0xBF58476D1CE4E5B9


def _byte_table() -> tuple[int, ...]:
    """4096 bytes with the frequencies of a text: letters, marks, what JSON must escape, and first bytes of UTF-8."""
    weights = {
        "etaoinshrdlu": 170,
        "cmfwypvbgkjqxz": 55,
        "ETAOINS": 12,
        "0123456789": 10,
        ",.;:!?-'()": 14,
        '"\\/<&\n': 8,
    }
    table = [ord(c) for chars, weight in weights.items() for c in chars for _ in range(weight)]
    for lead, count in ((0xC3, 70), (0xE4, 12), (0xE5, 12), (0xE6, 12), (0xE7, 12), (0xE8, 12), (0xF0, 24)):
        table += [lead] * count
    return tuple(table + [ord(" ")] * (4096 - len(table)))


BYTES: Final = _byte_table()
"""What follows in the middle of nothing, by the upper twelve bits of the state."""


def advance(state: int, token: int) -> int:
    """The state after one more token."""
    return (state * MULTIPLIER + token + 1) & MASK


def continuation(opened: bytes, state: int) -> int:
    """The next byte of a character that has been begun: valid UTF-8, from blocks where every character exists."""
    low, high = 0x80, 0xBF
    if len(opened) == 1:
        low, high = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x9F, 0x9F), 0xF4: (0x80, 0x8F)}.get(
            opened[0], (low, high)
        )
    elif opened == b"\xf0\x9f":
        low = high = 0x98  # emoticons
    return low + (state >> 52) % (high - low + 1)


def is_open(tail: bytes) -> bool:
    """Is ``tail`` the beginning of one UTF-8 character, and not all of it?"""
    if not tail or len(tail) >= width(tail[0]):
        return False
    try:
        tail.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and error.start == 0
    return False


def width(lead: int) -> int:
    """Bytes of a character that begins with ``lead``; 1 for what begins none."""
    if 0xC2 <= lead <= 0xDF:
        return 2
    if 0xE0 <= lead <= 0xEF:
        return 3
    return 4 if 0xF0 <= lead <= 0xF4 else 1


def opened_by(tokens: Sequence[int]) -> bytes:
    """The character that the last tokens have begun and not ended; empty if there is none."""
    for size in range(min(3, len(tokens)), 0, -1):
        tail = tokens[-size:]
        if all(t < 256 for t in tail) and is_open(bytes(tail)):
            return bytes(tail)
    return b""


def next_token(state: int, opened: bytes, eos_below: int = 0) -> int:
    """The token that follows. ``eos_below / 2**64`` is the share of positions where a sequence ends."""
    if opened:
        return continuation(opened, state)
    if eos_below and (state * _EOS_MIX) & MASK < eos_below:
        return EOS
    return BYTES[state >> 52]


class Powers:
    """Powers of the multiplier and of its inverse, as far as they have been needed."""

    def __init__(self) -> None:
        self.up = np.ones(1, np.uint64)
        self.down = np.ones(1, np.uint64)

    def reach(self, count: int) -> None:
        """Have powers 0 to ``count``."""
        if len(self.up) > count:
            return
        size = max(1024, 2 * count) + 1
        self.up = _powers(MULTIPLIER, size)
        self.down = _powers(pow(MULTIPLIER, -1, 1 << 64), size)


def _powers(base: int, size: int) -> npt.NDArray[np.uint64]:
    factors = np.full(size, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


_powers_of = Powers()


def states_of(tokens: Ids) -> npt.NDArray[np.uint64]:
    """The state after each of the tokens, in one pass.

    The state is a polynomial in the multiplier M modulo 2**64, and M has an inverse there: so a running sum of
    ``token * M**-i``, times ``M**n``, gives all states at once.
    """
    n = len(tokens)
    _powers_of.reach(n)
    terms = (tokens.astype(np.uint64) + np.uint64(1)) * _powers_of.down[1 : n + 1]
    sums = np.cumsum(terms, dtype=np.uint64) + np.uint64(SEED)
    states: npt.NDArray[np.uint64] = sums * _powers_of.up[1 : n + 1]
    return states


class Prompt:
    """A prompt, ready to be continued: its ids, its state, the character it leaves open, and its block hashes.

    ``blocks`` holds the state after each full block, which stands for everything up to there: a hash chain.
    """

    START: Final = SEED
    __slots__ = ("blocks", "ids", "opened", "state")

    def __init__(self, ids: Ids, block_size: int) -> None:
        self.ids = ids
        states = states_of(ids)
        self.state = int(states[-1])
        self.opened = opened_by(ids[-3:].tolist())
        self.blocks: tuple[int, ...] = tuple(states[block_size - 1 :: block_size].tolist())

    def __len__(self) -> int:
        return len(self.ids)


def encode(text: str) -> Ids:
    """Token ids of a text. Half of a surrogate pair, which JSON can carry, becomes a question mark."""
    return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16)


def encode_chat(messages: Sequence[tuple[str, str]], answer: bool = True) -> Ids:
    """The chat template: BOS, then role marker, content and end marker of each message, then the assistant's marker."""
    parts: list[Ids] = [np.array([BOS], np.uint16)]
    for role, content in messages:
        parts += [np.array([ROLES.get(role, ROLES["user"])], np.uint16), encode(content), np.array([END], np.uint16)]
    if answer:
        parts.append(np.array([ROLES["assistant"]], np.uint16))
    return np.concatenate(parts)


def decode(tokens: Sequence[int]) -> str:
    """Text of any token ids, markers by name (``/detokenize``)."""
    parts: list[str] = []
    run = bytearray()
    for token in tokens:
        if token < 256:
            run.append(token)
            continue
        parts.append(run.decode("utf-8", "replace"))
        run.clear()
        parts.append(name_of(token))
    parts.append(run.decode("utf-8", "replace"))
    return "".join(parts)


def decode_output(tokens: Sequence[int]) -> str:
    """Text of generated tokens as an answer holds it: no markers, and no part of a character that is not whole here."""
    return bytes([t for t in tokens if t < 256]).decode("utf-8", "ignore")


def name_of(token: int) -> str:
    """A token as a text of its own."""
    if token < 128:
        return chr(token)
    if token < 256:
        return "�"
    return _NAMES.get(token, f"<|unused_{token}|>")
