"""One answer, on a clock of our own: times, counts and every way to fail."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.live.http.messages import Head, HttpFault
from penstock.live.load import stream as module
from penstock.live.load.measured import token_gaps
from penstock.live.load.stream import BY_CHUNKS, BY_IDS, BY_USAGE, Gaps, Stream
from penstock.report.metrics import spread_of_gaps

from .scripted import chunk

DONE = b"data: [DONE]\n\n"
END = chunk(choices=[{"text": "", "finish_reason": "length"}])


class Clock:
    """Stands for ``perf_counter``."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "perf_counter", clock)
    return clock


def begun(status: int = 200, content_type: str = "text/event-stream") -> tuple[Stream, Gaps, list[Stream]]:
    gaps = Gaps()
    ended: list[Stream] = []
    stream = Stream(0, gaps, ended.append)
    stream.on_head(Head(status, {"content-type": content_type}))
    return stream, gaps, ended


def text(words: str = "x", **more: Any) -> bytes:
    return chunk(choices=[{"text": words, **more}])


def test_tokens_are_timed_when_their_bytes_come(clock: Clock) -> None:
    stream, gaps, ended = begun()
    for at, data in (
        (1.0, text(token_ids=[5])),
        (1.5, text("", token_ids=[6, 7, 8])),
        (3.5, text(token_ids=[9]) + text(token_ids=[10])),
        (4.0, text("", token_ids=[], finish_reason="length") + DONE),
    ):
        clock.now = at
        stream.on_body(data)
    stream.on_end()
    assert (stream.emitted, stream.counted, stream.error) == (6, BY_IDS, None)
    assert (stream.first_s, stream.last_s, stream.longest_s) == (1.0, 3.5, 2.0)
    assert (sorted(gaps.seconds), gaps.zeros) == ([0.0, 0.5, 2.0], 2)
    assert ended == [stream]
    found = spread_of_gaps(token_gaps(gaps))
    assert (found.count, found.max, found.mean) == (5, 2.0, 0.5)


def test_without_ids_the_usage_counts(clock: Clock) -> None:
    stream, gaps, _ = begun()
    for at in (1.0, 2.0):
        clock.now = at
        stream.on_body(text())
    stream.on_body(END + chunk(choices=[], usage={"prompt_tokens": 9, "completion_tokens": 5}) + DONE)
    stream.on_end()
    assert (stream.emitted, stream.counted, stream.prompt_tokens, list(gaps.seconds)) == (5, BY_USAGE, 9, [1.0])


def test_without_ids_and_usage_every_chunk_with_output_is_a_token(clock: Clock) -> None:
    stream, _, _ = begun()
    clock.now = 1.0
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, {"content": "a"}, {"reasoning": "b"}, {}]
    for delta in deltas:
        stream.on_body(chunk(choices=[{"delta": delta, "finish_reason": None if delta else "stop"}]))
    stream.on_end()
    assert (stream.emitted, stream.counted, stream.error) == (2, BY_CHUNKS, None)


@pytest.mark.parametrize(
    ("data", "kind", "detail"),
    [
        ([text()], "cut off", "without a finish reason"),
        ([text(), chunk(error={"message": "out  of\nmemory"})], "error in the stream", "out of memory"),
        ([text(), b"data: {oops\n\n"], "malformed chunk", ""),
        ([text(finish_reason="abort"), DONE], "finish reason abort", "gave the request up"),
        ([END, DONE], "no token", ""),
    ],
)
def test_streams_that_fail(clock: Clock, data: list[bytes], kind: str, detail: str) -> None:
    stream, _, ended = begun()
    for piece in data:
        stream.on_body(piece)
    stream.on_end()
    stream.on_fault(HttpFault("late"))
    assert stream.error == kind
    assert detail in stream.detail
    assert ended == [stream]


def test_refusals_keep_what_the_server_said() -> None:
    said = {"error": {"message": "queue is full"}}
    for body, detail in ((msgspec.json.encode(said), "queue is full"), (b"<html>busy</html>", "<html>busy</html>")):
        stream, _, _ = begun(429, "text/html")
        stream.on_body(body)
        stream.on_end()
        assert (stream.error, stream.detail) == ("HTTP 429", detail)
    stream, _, ended = begun(200, "application/json")
    assert (stream.error, ended) == ("not a stream", [stream])


def test_faults_before_and_after_the_head() -> None:
    stream = Stream(0, Gaps(), lambda _: None)
    stream.on_fault(HttpFault("cannot connect"))
    assert (stream.error, stream.detail, stream.status) == ("no answer", "cannot connect", 0)
    stream, _, _ = begun()
    stream.on_fault(HttpFault("reset"))
    assert stream.error == "connection lost"
    assert math.isnan(stream.first_s)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.data())
def test_any_cut_of_the_bytes_gives_the_same_count(counts: list[int], data: st.DataObject) -> None:
    """Chunks of any number of tokens, in reads of any size."""
    whole = b"".join(text("é", token_ids=list(range(n))) for n in counts) + END + DONE
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    stream, gaps, _ = begun()
    for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        stream.on_body(whole[start:stop])
    stream.on_end()
    total = sum(counts)
    assert stream.emitted == total
    assert len(gaps.seconds) + gaps.zeros == max(total - 1, 0)
    assert stream.error == (None if total else "no token")
    assert int((token_gaps(gaps).batch * token_gaps(gaps).count).sum()) == max(total - 1, 0)
    assert np.all(token_gaps(gaps).first_s >= 0)
