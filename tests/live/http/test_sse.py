"""The reader of server-sent events against a slow reading of the same bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.live.http import SseReader
from tests.live.http.support import cuts

LINE = st.sampled_from(
    [
        b"data: {}",
        b"data:x",
        b"data:  y",
        b"data",
        b"data: ",
        b"",
        b"",
        b"",
        b": ping",
        b"event: m",
        b"id: 1",
        b"dat: a",
    ]
)


def by_the_book(stream: bytes) -> list[bytes]:
    """Line by line, as the standard words it."""
    payloads: list[bytes] = []
    data: list[bytes] = []
    for line in stream.replace(b"\r\n", b"\n").split(b"\n")[:-1]:
        if not line:
            if data:
                payloads.append(b"\n".join(data))
            data = []
            continue
        name, _, value = line.partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
    return payloads


@given(st.lists(st.tuples(LINE, st.sampled_from([b"\n", b"\n", b"\r\n"]))), st.lists(st.integers(0, 10_000)), LINE)
def test_any_cut_gives_the_same_payloads(lines: list[tuple[bytes, bytes]], places: list[int], tail: bytes) -> None:
    stream = b"".join(line + end for line, end in lines) + tail
    reader = SseReader()
    got = [payload for piece in cuts(stream, places) for payload in reader.feed(piece)]
    assert got == by_the_book(stream)


@pytest.mark.parametrize(
    ("data", "payloads"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data: a\r\n\r\n", [b"a"]),
        (b": comment\n\ndata: [DONE]\n\n", [b"[DONE]"]),
        (b"data: a\n", []),
        (b"data: a\n\ndata: b\n", [b"a"]),
    ],
)
def test_known_streams(data: bytes, payloads: list[bytes]) -> None:
    assert SseReader().feed(data) == payloads
