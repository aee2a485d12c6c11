"""The token function: pure, restartable anywhere, and always UTF-8."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penstock.live.emulated.vocabulary import (
    EOS,
    SEED,
    Prompt,
    advance,
    decode,
    decode_output,
    encode,
    is_open,
    next_token,
    opened_by,
    states_of,
)

from .support import expected

tokens_of = st.lists(st.one_of(st.integers(0, 255), st.integers(0, 65535), st.sampled_from([0xE0, 0xF0, 0xF4, 0xED])))


@given(tokens_of.filter(len))
def test_states_in_one_pass_are_those_of_one_token_at_a_time(tokens: list[int]) -> None:
    state, found = SEED, []
    for token in tokens:
        state = advance(state, token)
        found.append(state)
    assert states_of(np.array(tokens, np.uint16)).tolist() == found
    prompt = Prompt(np.array(tokens, np.uint16), 4)
    assert prompt.state == state
    assert prompt.blocks == tuple(found[3::4])


@given(tokens_of.filter(len), st.integers(1, 60))
def test_a_sequence_cut_anywhere_goes_on_as_it_would_have(tokens: list[int], cut: int) -> None:
    whole = expected(tokens, 60)
    prompt = Prompt(np.array(tokens + whole[:cut], np.uint16), 16)
    state, opened, rest = prompt.state, prompt.opened, []
    seen = tokens + whole[:cut]
    for _ in range(60 - cut):
        token = next_token(state, opened)
        rest.append(token)
        seen.append(token)
        state, opened = advance(state, token), opened_by(seen[-3:])
    assert whole[:cut] + rest == whole


@given(st.text(min_size=1), st.integers(1, 300))
def test_output_is_utf8_up_to_the_last_character(text: str, count: int) -> None:
    ids = expected(text, count)
    data = bytes(ids)
    for spare in range(4):
        if spare == 0 or is_open(data[-spare:]):
            try:
                data[: len(data) - spare].decode()
            except UnicodeDecodeError:
                continue
            return
    raise AssertionError("not UTF-8")


def test_output_has_characters_of_every_width() -> None:
    widths = {len(c.encode()) for c in decode_output(expected("x", 4000))}
    assert widths == {1, 2, 3, 4}


def test_an_end_is_a_function_of_the_prefix_too() -> None:
    ends = 0
    for i in range(4000):
        state = int(states_of(encode(f"prompt {i}"))[-1])
        ends += next_token(state, b"", (1 << 64) // 10) == EOS
    assert 300 < ends < 500  # one in ten: deterministic, so this holds always or never


@given(st.text())
def test_text_comes_back(text: str) -> None:
    assert decode(encode(text).tolist()) == text


def test_markers_have_names() -> None:
    assert decode([256, 104, 105, 257, 999]) == "<|bos|>hi<|eos|><|unused_999|>"
