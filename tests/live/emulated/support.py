"""A small fleet, a client that speaks JSON to it, and the tokens that any right answer must have."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import uvloop

from penstock.core.types import Role
from penstock.live.emulated import EmulatedEngine, EmulatedFleet, EmulatedSettings
from penstock.live.emulated.vocabulary import SEED, advance, next_token, opened_by
from penstock.live.http import Call, Head, HttpClient, HttpFault, SseReader
from penstock.perf.step import LinearStepModel
from penstock.sim.cluster import InstanceSpec

PATIENCE_S = 30.0  # what has not happened by then never does
PD = {"do_remote_decode": True}


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop, as the product does, and never hang."""

    async def bounded() -> None:
        await asyncio.wait_for(main, 2 * PATIENCE_S)

    uvloop.run(bounded())


def spec(blocks: int = 400, block_size: int = 16, **further: Any) -> InstanceSpec:
    """An instance whose steps take about a millisecond."""
    model = LinearStepModel(0.001, 1e-6, 1e-9, 1e-6)
    return InstanceSpec(Role.MIXED, model, blocks, block_size, link_bytes_per_s=1e9, **further)


def settings(instance: InstanceSpec | None = None, **further: Any) -> EmulatedSettings:
    """Quick transfers, the rest as shipped."""
    given = {"handshake_s": 0.001, "link_latency_s": 1e-4, "kv_bytes_per_token": 100.0} | further
    return EmulatedSettings(instance=instance or spec(), **given)


def expected(prompt: str | Sequence[int], count: int) -> list[int]:
    """What follows a prompt, one token at a time and from first principles."""
    tokens = list(prompt.encode()) if isinstance(prompt, str) else list(prompt)
    start = len(tokens)
    state = SEED
    for token in tokens:
        state = advance(state, token)
    for _ in range(count):
        tokens.append(next_token(state, opened_by(tokens[-3:])))
        state = advance(state, tokens[-1])
    return tokens[start:]


class Stream:
    """A streamed answer: ``ids`` so far, ``chunks`` as JSON; ``reached`` waits for a number of tokens."""

    def __init__(self) -> None:
        self.call: Call
        self.status = 0
        self.chunks: list[Any] = []
        self.ids: list[int] = []
        self.text = ""
        self.ended = False  # by [DONE]
        self.fault: HttpFault | None = None
        self._done = False
        self._reader = SseReader()
        self._changed = asyncio.Event()

    def on_head(self, head: Head) -> None:
        self.status = head.status

    def on_body(self, data: bytes) -> None:
        for payload in self._reader.feed(data):
            if payload == b"[DONE]":
                self.ended = True
                continue
            chunk = json.loads(payload)
            self.chunks.append(chunk)
            for choice in chunk.get("choices", ()):
                self.ids += choice.get("token_ids") or []
                self.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        self._changed.set()

    def on_end(self) -> None:
        self._done = True
        self._changed.set()

    def on_fault(self, fault: HttpFault) -> None:
        self.fault = fault
        self.on_end()

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait for something that only what comes in can bring about."""
        while not true():
            assert not self._done, f"ended before that: {self.fault}, {self.chunks[-1:]}"
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), PATIENCE_S)

    async def reached(self, tokens: int) -> None:
        """Wait for this many tokens."""
        await self.until(lambda: len(self.ids) >= tokens)

    async def over(self) -> Stream:
        """Wait for the end, good or bad."""
        while not self._done:
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), PATIENCE_S)
        return self


class Bench:
    """A running fleet and a client. ``clean`` is what must be true at the end."""

    def __init__(self, fleet: EmulatedFleet, urls: list[str], client: HttpClient) -> None:
        self.fleet = fleet
        self.urls = urls
        self.client = client
        self.model = fleet.engines[0].plan.model

    def __getitem__(self, i: int) -> EmulatedEngine:
        return self.fleet.engines[i]

    async def get(self, i: int, path: str) -> bytes:
        """The body of a page."""
        found = await self.client.fetch(self.urls[i], "GET", path, timeout_s=PATIENCE_S)
        assert found.status == 200, found
        return found.body

    async def post(self, i: int, path: str, **body: Any) -> tuple[int, Any]:
        """Status and JSON."""
        raw = json.dumps(body).encode()
        found = await self.client.fetch(self.urls[i], "POST", path, raw, timeout_s=PATIENCE_S)
        return found.status, json.loads(found.body) if found.body else None

    async def complete(self, i: int, prompt: Any, max_tokens: int = 16, **body: Any) -> Any:
        """A whole completion with token ids, which must succeed."""
        status, found = await self.post(
            i, "/v1/completions", prompt=prompt, max_tokens=max_tokens, return_token_ids=True, **body
        )
        assert status == 200, found
        return found

    async def ids(self, i: int, prompt: Any, max_tokens: int = 16, **body: Any) -> list[int]:
        """Token ids of a completion."""
        found: list[int] = (await self.complete(i, prompt, max_tokens, **body))["choices"][0]["token_ids"]
        return found

    async def prefill(self, i: int, prompt: Any) -> dict[str, Any]:
        """Compute a prompt and pin it; the transfer parameters."""
        found: dict[str, Any] = (await self.complete(i, prompt, 1, kv_transfer_params=PD))["kv_transfer_params"]
        return found

    def stream(self, i: int, prompt: Any, max_tokens: int = 16, path: str = "/v1/completions", **body: Any) -> Stream:
        """Begin a streamed completion with token ids, or a chat (``prompt`` being its messages)."""
        stream = Stream()
        what = {"messages" if "chat" in path else "prompt": prompt, "max_tokens": max_tokens, "stream": True}
        raw = json.dumps({"return_token_ids": True} | what | body).encode()
        stream.call = self.client.open(self.urls[i], "POST", path, stream, body=raw)
        return stream

    async def metric(self, i: int, name: str) -> float:
        """One sample of ``/metrics``."""
        for line in (await self.get(i, "/metrics")).decode().splitlines():
            if line.startswith(name + "{"):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no metric {name}")


@asynccontextmanager
async def bench(count: int = 1, clean: bool = True, **further: Any) -> AsyncIterator[Bench]:
    """A fleet that must be found empty at the end (unless ``clean`` is False)."""
    fleet = EmulatedFleet()
    urls = await fleet.start(settings(**further), count)
    client = HttpClient()
    try:
        yield Bench(fleet, urls, client)
        if clean:
            await fleet.idle(PATIENCE_S)
            assert fleet.integrity() == []
    finally:
        await client.close()
        await fleet.stop()
