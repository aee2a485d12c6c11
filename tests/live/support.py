"""A gateway over emulated engines, and clients that see what a user would see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from penstock.core.types import Role
from penstock.experiment.setup import ClusterSetup, Setup, Target
from penstock.live.carried import CarriedSession
from penstock.live.emulated.fleet import EmulatedFleet
from penstock.live.emulated.settings import EmulatedSettings
from penstock.live.gateway import GatewaySettings
from penstock.live.health import Watch
from penstock.live.http.client import HttpClient
from penstock.live.http.messages import Call, Head, HttpFault, Limits, Response
from penstock.live.http.sse import SseReader
from penstock.live.serve import Deployment, EngineAddress

PDD = (Role.PREFILL, Role.DECODE, Role.DECODE)
MODEL = "emulated-llama-3.1-8b"


def run(work: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine, with an end."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work()

    uvloop.run(bounded())


class Stream:
    """One streamed answer as a client sees it."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.chunks: list[dict[str, Any]] = []
        self.raw = b""
        self.done = False
        self.fault: HttpFault | None = None
        self.over = asyncio.Event()
        self.grown = asyncio.Event()
        self.call: Call | None = None
        self._sse = SseReader()

    def on_head(self, head: Head) -> None:
        self.head = head

    def on_body(self, data: bytes) -> None:
        self.raw += data
        if self.head is not None and self.head.status == 200:
            for payload in self._sse.feed(data):
                if payload == b"[DONE]":
                    self.done = True
                else:
                    self.chunks.append(msgspec.json.decode(payload))
        self.grown.set()

    def on_end(self) -> None:
        self.over.set()
        self.grown.set()

    def on_fault(self, fault: HttpFault) -> None:
        self.fault = fault
        self.over.set()
        self.grown.set()

    @property
    def text(self) -> str:
        parts = []
        for chunk in self.chunks:
            for choice in chunk.get("choices", []):
                parts.append(choice["delta"].get("content") or "" if "delta" in choice else choice["text"])
        return "".join(parts)

    @property
    def ids(self) -> list[int]:
        return [t for c in self.chunks for choice in c.get("choices", []) for t in choice.get("token_ids") or []]

    @property
    def finish(self) -> str | None:
        found = [choice["finish_reason"] for c in self.chunks for choice in c.get("choices", [])]
        return next((f for f in found if f is not None), None)

    async def tokens(self, count: int) -> None:
        """Wait until ``count`` chunks with text have come, or the end."""
        while len(self.chunks) < count and not self.over.is_set():
            self.grown.clear()
            await self.grown.wait()


class Bench:
    """Fleet, gateway and client of one test."""

    def __init__(self, fleet: EmulatedFleet, deployment: Deployment, url: str, client: HttpClient) -> None:
        self.fleet = fleet
        self.deployment = deployment
        self.world = deployment.world
        self.url = url
        self.client = client

    def stream(self, body: dict[str, Any], path: str = "/v1/completions", key: str | None = None) -> Stream:
        sink = Stream()
        headers = {"content-type": "application/json"}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        data = msgspec.json.encode({"stream": True, **body})
        sink.call = self.client.open(self.url, "POST", path, sink, headers, data)
        return sink

    async def post(self, body: Any, path: str = "/v1/completions", headers: dict[str, str] | None = None) -> Response:
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        every = {"content-type": "application/json", **(headers or {})}
        return await self.client.fetch(self.url, "POST", path, raw, every, timeout_s=60)

    async def get(self, path: str) -> Response:
        return await self.client.fetch(self.url, "GET", path)

    async def whole(self, body: dict[str, Any], path: str = "/v1/completions") -> Stream:
        stream = self.stream(body, path)
        await stream.over.wait()
        return stream

    def session(self, stream: Stream) -> CarriedSession:
        assert stream.head is not None
        name = stream.head.headers["x-request-id"]
        found = next(s for s in self.world.sessions.values() if s.name == name)
        assert isinstance(found, CarriedSession)
        return found

    async def settled(self) -> None:
        """Nothing pinned, nothing lost: gateway and engines are as empty as before."""
        async with asyncio.timeout(20):
            while self.world.sessions:
                await asyncio.sleep(0.01)
        await self.fleet.idle(20)
        problems = self.fleet.integrity()
        assert problems == [], problems
        assert self.fleet.poisoned == 0
        assert self.world.parked == []
        assert self.world.controller.requests == {}
        assert self.world.metrics.protocol_errors == 0
        assert self.world.metrics.divergences == 0
        for instance in self.world.instances.values():
            assert (instance.streams, instance.tokens, instance.prefills) == (0, 0, 0)


def setup(policy: str = "least-kv", roles: tuple[Role, ...] = PDD, **options: float | str) -> Setup:
    from penstock.core.types import MigrationLevel

    cluster = ClusterSetup(
        hardware="h100",
        prefill=roles.count(Role.PREFILL),
        decode=roles.count(Role.DECODE),
        mixed=roles.count(Role.MIXED),
        migration_level=MigrationLevel.REPROMPT,
    )
    return Setup(policy=policy, options=options, cluster=cluster, slo=Target(1.0, 0.05))


@asynccontextmanager
async def bench(
    roles: tuple[Role, ...] = PDD,
    policy: str = "least-kv",
    engine: EmulatedSettings | Sequence[EmulatedSettings] | None = None,
    gateway: GatewaySettings | None = None,
    record: Path | None = None,
    watch: Watch | None = None,
    limits: Limits | None = None,
    **options: float | str,
) -> AsyncIterator[Bench]:
    """A gateway over as many emulated engines as there are roles."""
    fleet = EmulatedFleet()
    client = HttpClient()
    urls = await fleet.start(engine or EmulatedSettings(speed=1.0, lease_s=3.0), len(roles))
    deployment = Deployment(setup(policy, roles, **options), gateway, record, watch=watch, limits=limits)
    url = await deployment.start(
        [EngineAddress(u, r, plugin=p) for u, r, p in zip(urls, roles, fleet.plugins, strict=True)]
    )
    try:
        yield Bench(fleet, deployment, url, client)
    finally:
        await deployment.stop()
        await client.close()
        await fleet.stop()


def ids(count: int, start: int = 1) -> list[int]:
    """A prompt of token ids."""
    return [32 + (start * 7 + i * 11) % 90 for i in range(count)]
