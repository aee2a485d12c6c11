"""What the gateway's tests share: quick engines, what an engine says when asked directly, and moves to order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from penstock.core.events import MoveOrdered
from penstock.core.types import MigrationLevel, Role
from penstock.live.carried import CarriedSession
from penstock.live.emulated.instance import EmulatedEngine
from penstock.live.emulated.settings import EmulatedSettings
from penstock.live.emulated.vocabulary import decode_output
from penstock.live.health import Watch
from penstock.live.http.messages import Response
from penstock.perf.step import LinearStepModel
from penstock.sim.cluster import InstanceSpec
from tests.live.emulated.support import expected
from tests.live.support import Bench, Stream

ENGINE = "emulated-engine"
"""The model name of ``quick`` engines."""
WATCHFUL = Watch(silence_s=0.3, silence_steps=10.0, deep_probe_s=1.0, every_s=0.05)
"""Finds a hanging engine soon."""
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def quick(step_s: float = 0.002, blocks: int = 2000, block_size: int = 16, **further: Any) -> EmulatedSettings:
    """An engine whose steps take ``step_s`` and whose transfers take next to nothing. Its lease is longer than
    ``settled`` waits, so that no test passes because a lease ran out, unless it says so.
    """
    model = LinearStepModel(step_s, 1e-6, 1e-9, 1e-7)
    instance = InstanceSpec(Role.MIXED, model, blocks, block_size, link_bytes_per_s=1e9)
    given = {"handshake_s": 0.001, "link_latency_s": 1e-4, "kv_bytes_per_token": 100.0, "lease_s": 60.0} | further
    return EmulatedSettings(instance=instance, **given)


async def direct(bench: Bench, body: dict[str, Any], path: str = COMPLETIONS, engine: int = 0) -> Response:
    """Ask an engine without the gateway."""
    url = bench.fleet.engines[engine].url
    headers = {"content-type": "application/json"}
    return await bench.client.fetch(url, "POST", path, msgspec.json.encode(body), headers, timeout_s=60)


def chunks_of(raw: bytes) -> list[dict[str, Any]]:
    """The chunks of a streamed answer."""
    lines = [line[6:] for line in raw.split(b"\n\n") if line.startswith(b"data: ")]
    assert lines[-1] == b"[DONE]"
    return [msgspec.json.decode(line) for line in lines[:-1]]


def text_of(prompt: list[int], count: int) -> str:
    """The text of what follows ``prompt``."""
    return decode_output(expected(prompt, count))


async def order(bench: Bench, stream: Stream, target: int = -1, level: MigrationLevel | None = None) -> bool:
    """Have a running decode moved (to another decode instance if not said otherwise), and wait for the end of that;
    False if it was rolled back or the request ended.
    """
    if level is not None:
        bench.world.controller.migration_level = level
    session = current(bench, stream)
    if session is None:
        await stream.over.wait()
        return False
    before = session.moves
    bench.world.tell(MoveOrdered(session.request, target if target >= 0 else other(session), "ordered"))
    while session.move is not None and not stream.over.is_set():
        await more(stream)
    return session.moves > before


def current(bench: Bench, stream: Stream) -> CarriedSession | None:
    """The stream's session, unless it is over."""
    assert stream.head is not None
    name = stream.head.headers["x-request-id"]
    found = next((s for s in bench.world.sessions.values() if s.name == name), None)
    assert found is None or isinstance(found, CarriedSession)
    return found


async def more(stream: Stream, count: int = 1) -> None:
    """Wait for further chunks, or the end."""
    await stream.tokens(len(stream.chunks) + count)


def other(session: CarriedSession, among: tuple[int, ...] = (1, 2)) -> int:
    """Another instance than the one where it decodes."""
    return next(i for i in among if i != session.where)


async def until(what: Callable[[], Any], timeout_s: float = 20.0) -> None:
    """Wait for what no event tells of."""
    async with asyncio.timeout(timeout_s):
        while not what():
            await asyncio.sleep(0.002)


async def idle_within(engine: EmulatedEngine, seconds: float) -> None:
    """The engine has nothing to do any more, soon."""
    async with asyncio.timeout(seconds):
        await engine.idle()
