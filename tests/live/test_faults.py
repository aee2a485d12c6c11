"""Engines that die, hang or fail, and clients that go away: nobody loses a token, nothing is left behind."""

from __future__ import annotations

import asyncio
import socket

import pytest

from penstock.core.events import InstanceHeld, MoveOrdered
from penstock.core.types import Role
from penstock.live import health
from penstock.live.emulated.instance import EmulatedEngine
from penstock.live.gateway import GatewaySettings
from penstock.live.http.messages import Limits
from penstock.live.instance import Health
from tests.live.answers import ENGINE, WATCHFUL, idle_within, more, other, quick, until
from tests.live.emulated.support import expected
from tests.live.support import PDD, Bench, Stream, bench, ids, run


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instances that are well again are taken back at once, and those that do not answer are given up sooner."""
    monkeypatch.setattr(health, "RECOVERY_S", 0.05)
    monkeypatch.setattr(health, "PROBE_S", 0.2)
    monkeypatch.setattr(health, "SECOND_PROBE_S", 0.2)


def begun(b: Bench, count: int, tokens: int, length: int = 40) -> list[tuple[Stream, list[int]]]:
    """Streams in flight."""
    prompts = [ids(length + i, i) for i in range(count)]
    body = {"max_tokens": tokens, "temperature": 0, "return_token_ids": True}
    return [(b.stream({**body, "prompt": p}), p) for p in prompts]


async def all_right(streams: list[tuple[Stream, list[int]]], tokens: int) -> None:
    async with asyncio.timeout(30):
        for stream, prompt in streams:
            await stream.over.wait()
            assert stream.done and stream.fault is None, stream.raw[-200:]
            assert stream.ids == expected(prompt, tokens)
            assert stream.finish == "length"


async def all_up(b: Bench) -> None:
    await until(lambda: all(i.health is Health.UP for i in b.world.instances.values()))


async def well_again(b: Bench, engine: EmulatedEngine) -> None:
    engine.resume()
    engine.fail_next(0)
    await engine.revive()
    await all_up(b)


@pytest.mark.parametrize("fault", ["kill", "hang", "errors", "500"])
def test_a_decode_engine_goes_with_twenty_streams_in_flight(fault: str) -> None:
    async def work() -> None:
        async with bench(engine=quick(0.004, lease_s=1.0), roles=PDD, watch=WATCHFUL) as b:
            streams = begun(b, 20, 100)
            await asyncio.gather(*(s.tokens(10) for s, _ in streams))
            victim = b.fleet.engines[1]
            assert b.world.instances[1].streams > 0
            if fault == "kill":
                await victim.kill()
            elif fault == "hang":
                victim.hang()
            elif fault == "errors":
                victim.fail_running("secret")
            else:
                victim.fail_next(3)
                victim.fail_running("secret")
            await all_right(streams, 100)
            await well_again(b, victim)
            # It is used again.
            streams = begun(b, 6, 20)
            await asyncio.gather(*(s.tokens(3) for s, _ in streams))
            assert b.world.instances[1].streams > 0
            await all_right(streams, 20)
            await b.settled()

    run(work)


@pytest.mark.parametrize("fault", ["kill", "hang"])
def test_the_prefill_engine_goes_during_a_prefill(fault: str) -> None:
    async def work() -> None:
        roles = (Role.PREFILL, Role.PREFILL, Role.DECODE)
        async with bench(engine=quick(0.03, lease_s=1.0), roles=roles, watch=WATCHFUL) as b:
            streams = begun(b, 6, 8, 300)
            await until(lambda: b.world.instances[0].prefills > 0)
            victim = b.fleet.engines[0]
            await victim.kill() if fault == "kill" else victim.hang()
            await all_right(streams, 8)
            await well_again(b, victim)
            await b.settled()

    run(work)


def test_the_prefill_engine_dies_between_prefill_and_pull() -> None:
    async def work() -> None:
        engine = quick(0.004, link_latency_s=0.2, lease_s=1.0)
        async with bench(engine=engine, roles=(Role.PREFILL, Role.PREFILL, Role.DECODE), watch=WATCHFUL) as b:
            streams = begun(b, 6, 20)
            waiting = "waiting for KV"
            await until(lambda: sum(s.stage == waiting for s in b.world.sessions.values()) >= 3)
            await b.fleet.engines[0].kill()
            await all_right(streams, 20)
            await well_again(b, b.fleet.engines[0])
            await b.settled()

    run(work)


def test_injected_errors_are_tried_again() -> None:
    async def work() -> None:
        async with bench(engine=quick(lease_s=1.0), roles=PDD) as b:
            for engine in b.fleet.engines:
                engine.fail_next(1)
            streams = begun(b, 10, 20)
            await all_right(streams, 20)
            await until(lambda: len(b.world.instances) == 3)
            await all_up(b)
            for engine in b.fleet.engines:
                assert engine.failures == 0 or engine.index == 2
                engine.fail_next(0)
            await b.settled()

    run(work)


def test_all_engines_are_down_and_one_comes_back() -> None:
    async def work() -> None:
        async with bench(engine=quick(0.004, lease_s=1.0), roles=PDD, watch=WATCHFUL) as b:
            streams = begun(b, 8, 40)
            await asyncio.gather(*(s.tokens(5) for s, _ in streams))
            for engine in b.fleet.engines:
                await engine.kill()
            await until(lambda: all(i.health is Health.DOWN for i in b.world.instances.values()))
            await until(lambda: len(b.world.parked) == 8)
            late = await b.post({"prompt": ids(20)})
            assert late.status == 503 and late.headers["retry-after"]
            assert (await b.get("/ready")).status == 503
            assert (await b.get("/health")).status == 200
            for engine in b.fleet.engines:
                await engine.revive()
            await all_right(streams, 40)
            await all_up(b)
            await b.settled()

    run(work)


def test_a_parked_client_may_leave() -> None:
    async def work() -> None:
        async with bench(engine=quick(lease_s=1.0), roles=PDD, watch=WATCHFUL) as b:
            streams = begun(b, 3, 200)
            await asyncio.gather(*(s.tokens(5) for s, _ in streams))
            for engine in b.fleet.engines:
                await engine.kill()
            await until(lambda: len(b.world.parked) == 3)
            for stream, _ in streams:
                assert stream.call is not None
                stream.call.abort()
            await until(lambda: not b.world.parked)
            for engine in b.fleet.engines:
                await engine.revive()
            await all_up(b)
            await b.settled()

    run(work)


# -- clients that go away -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("further", [{}, {"n": 2}, {"stream": False}, {"n": 2, "stream": False}, {"seed": 1}])
@pytest.mark.parametrize("stage", ["prefilling", "waiting for KV", "decoding", "moving"])
def test_a_disconnect_ends_the_work_of_engines(stage: str, further: dict[str, object]) -> None:
    async def work() -> None:
        settings = quick(0.05 if stage == "prefilling" else 0.004, link_latency_s=0.1)
        async with bench(engine=settings, roles=PDD) as b:
            if stage in ("waiting for KV", "moving") and "n" in further:
                return  # both phases are on one engine, and nothing moves
            stream = b.stream({"prompt": ids(500), "max_tokens": 2000, **further})
            wanted = "decoding" if stage == "moving" else stage
            if further.get("stream") is False and wanted == "decoding" and "n" in further:
                wanted = "prefilling"  # a whole answer that is relayed shows no stages
            await until(lambda: any(s.stage == wanted for s in b.world.sessions.values()))
            if stage == "moving" and not further:
                session = b.session(stream)
                b.world.tell(MoveOrdered(session.request, other(session)))
                await more(stream)
            assert stream.call is not None
            stream.call.abort()
            await until(lambda: not b.world.sessions, 1.0)
            for engine in b.fleet.engines[1:]:
                await idle_within(engine, 1.0)
            await idle_within(b.fleet.engines[0], 2.0)
            await b.settled()

    run(work)


def test_a_disconnect_in_the_queue() -> None:
    async def work() -> None:
        settings = GatewaySettings(max_inflight=2, max_queue=3)
        async with bench(engine=quick(0.004), roles=PDD, gateway=settings) as b:
            running = begun(b, 2, 300)
            await asyncio.gather(*(s.tokens(2) for s, _ in running))
            queued = begun(b, 3, 5)
            await until(lambda: len(b.deployment.gateway.queue) == 3)
            refused = await b.post({"prompt": ids(10)})
            assert refused.status == 429
            assert int(refused.headers["retry-after"]) >= 1
            call = queued[1][0].call
            assert call is not None
            call.abort()
            await until(lambda: len(b.deployment.gateway.queue) == 2)
            # The place that has become free is somebody else's now.
            late = asyncio.create_task(b.post({"prompt": ids(10), "max_tokens": 5}))
            for stream, _ in running:
                assert stream.call is not None
                stream.call.abort()
            await all_right([queued[0], queued[2]], 5)
            assert (await late).status == 200
            await b.settled()
            assert not b.deployment.gateway.queue

    run(work)


def test_a_queue_drains_in_order_and_to_the_end() -> None:
    async def work() -> None:
        settings = GatewaySettings(max_inflight=3, max_queue=100)
        async with bench(engine=quick(), roles=PDD, gateway=settings) as b:
            streams = begun(b, 40, 10)
            await all_right(streams, 10)
            await b.settled()

    run(work)


def test_a_reader_that_does_not_read_is_dropped() -> None:
    async def work() -> None:
        limits = Limits(write_buffer=65536)
        settings = quick(0.0005, blocks=4000, model="emulated-" + "x" * 4000)
        async with bench(engine=settings, roles=PDD, limits=limits) as b:
            host, port = b.url.removeprefix("http://").split(":")
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, (host, int(port)))
            body = b'{"prompt":"x","max_tokens":30000,"stream":true}'
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            await loop.sock_sendall(sock, head + body)
            await until(lambda: b.world.sessions)
            await until(lambda: not b.world.sessions, 20)
            assert b.world.metrics.outcomes["default", "disconnected"] == 1
            sock.close()
            await b.settled()

    run(work)


# -- operators ------------------------------------------------------------------------------------------------------


def test_a_held_instance_gets_nothing_new() -> None:
    async def work() -> None:
        async with bench(engine=quick(), roles=PDD) as b:
            b.world.instances[1].held = True
            b.world.tell(InstanceHeld(1, True))
            streams = begun(b, 6, 20)
            await asyncio.gather(*(s.tokens(2) for s, _ in streams))
            assert b.world.instances[1].streams == 0
            await all_right(streams, 20)
            await b.settled()
            assert b.deployment.gateway.model == ENGINE

    run(work)


def test_stopping_the_gateway_tells_clients_and_frees_engines() -> None:
    async def work() -> None:
        async with bench(engine=quick(0.004), roles=PDD) as b:
            streams = begun(b, 4, 2000)
            await asyncio.gather(*(s.tokens(3) for s, _ in streams))
            await b.deployment.stop()
            for stream, _ in streams:
                await stream.over.wait()
            await b.fleet.idle(2)
            assert b.fleet.integrity() == []

    run(work)
