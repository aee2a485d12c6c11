"""The gateway's end of a plugin, against a scripted one."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import pytest
import zmq

from penstock.core.errors import PenstockError
from penstock.core.types import Role
from penstock.live import link as link_module
from penstock.live.emulated.fleet import EmulatedFleet
from penstock.live.emulated.settings import EmulatedSettings
from penstock.live.link import Link, LinkError, linked
from penstock.live.plugin.penstock_engine.messages import PROTOCOL, Answer, Command, Prediction, Running, Step
from penstock.live.serve import Deployment, EngineAddress
from penstock.live.sockets import LoopSocket, next_port
from tests.live.answers import until
from tests.live.support import run, setup

encode = msgspec.msgpack.encode
LEVELS = (0.1, 0.5, 0.9)


class Plugin:
    """Answers hello; keeps everything else in ``commands`` for the test to answer. ``say`` publishes."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], engine_id: str = "one", port: str = "*") -> None:
        self.engine_id = engine_id
        self.protocol = PROTOCOL
        self.commands: list[tuple[list[bytes], Command]] = []
        self.hellos = 0
        self.number = 0
        # The port above a free one may be another's, and what a test has just closed may still be closing.
        for _ in range(200):
            self.stream, router = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
            try:
                self.stream.bind(f"tcp://127.0.0.1:{port}")
                self.address = self.stream.getsockopt_string(zmq.LAST_ENDPOINT)
                router.bind(next_port(self.address))
                break
            except zmq.ZMQError:
                self.stream.close(linger=0)
                router.close(linger=0)
                threading.Event().wait(0.01)
        else:
            raise AssertionError("no two free ports")
        self.router = LoopSocket(router, self._heard)

    def _heard(self, frames: list[bytes]) -> None:
        command = msgspec.msgpack.decode(frames[3], type=Command)
        if command.op == "hello":
            self.hellos += 1
            self.answer(frames, Answer(engine_id=self.engine_id, protocol=self.protocol, quantiles=LEVELS))
        else:
            self.commands.append((frames, command))

    def answer(self, frames: list[bytes], answer: Answer) -> None:
        self.router.send([*frames[:3], encode(answer)])

    def say(
        self, predictions: list[Prediction] | None = None, engine_id: str | None = None, step_s: float = 0.0
    ) -> None:
        self.number += 1
        running = [Running("r", 1, 1, 1)]
        step = Step(engine_id or self.engine_id, self.number, 0.0, step_s, 3, 50, 100, 7, running, predictions or [])
        self.stream.send(encode(step))

    def close(self) -> None:
        self.stream.close(linger=0)
        self.router.close()


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Plugin, Link]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    plugin = Plugin(context)
    link: Link | None = None
    try:  # a context that is left to the garbage collector with open sockets hangs the process
        link = await linked(context, plugin.address)
        assert link is not None
        await heard(plugin, link)
        yield plugin, link
    finally:
        if link is not None:
            link.close()
        plugin.close()
        context.destroy(linger=0)


async def heard(plugin: Plugin, link: Link) -> None:
    """A subscription takes a moment to arrive: publish until something has been heard."""
    async with asyncio.timeout(5):
        while link.step is None or link.step.engine_id != plugin.engine_id:
            plugin.say()
            await asyncio.sleep(0.005)


def test_state_is_the_latest_one_whatever_was_lost() -> None:
    async def work() -> None:
        async with pair() as (plugin, link):
            assert link.step is not None and link.fresh() and link.step.free_blocks == 50
            plugin.number += 1000  # as many were lost
            plugin.say(step_s=0.02)
            await until(lambda: link.step is not None and link.step.number == plugin.number)
            assert link.step_s == pytest.approx(0.02)
            plugin.say(step_s=0.12)
            await until(lambda: link.step_s > 0.02)
            assert link.step_s == pytest.approx(0.04)
            assert link.garbage == 0 and link.median == 1

    run(work)


def test_predictions_reach_whoever_watches_the_request() -> None:
    async def work() -> None:
        async with pair() as (plugin, link):
            seen: list[Prediction] = []
            link.watch("mine-1a2b", seen.append)
            other: list[Prediction] = []
            link.watch("theirs-3c4d", other.append)
            mine = Prediction("cmpl-mine-1a2b-0-ffff", 20, (1.0, 2.0, 3.0))
            plugin.say([mine, Prediction("cmpl-foreign-0", 1, (1.0, 2.0, 3.0)), Prediction("x", 1, (1.0,))])
            await until(lambda: seen)
            assert seen == [mine] and other == []
            assert link.predictions == 2 and link.garbage == 1  # one has not the levels that hello named
            link.unwatch("mine-1a2b")
            plugin.say([mine])
            await until(lambda: link.predictions == 3)
            assert seen == [mine]

    run(work)


def test_answers_go_to_their_questions_also_out_of_order() -> None:
    async def work() -> None:
        async with pair() as (plugin, link):
            asked = [asyncio.create_task(link.ask(Command("handoff", name), 5.0)) for name in ("a", "b")]
            await until(lambda: len(plugin.commands) == 2)
            by_id = {command.id: frames for frames, command in plugin.commands}
            plugin.answer(by_id["b"], Answer(tokens=2))
            plugin.answer(by_id["a"], Answer(error="it has ended"))
            assert (await asked[1]).tokens == 2
            with pytest.raises(LinkError, match="it has ended"):
                await asked[0]

    run(work)


def test_a_late_answer_is_told_and_a_late_error_is_not() -> None:
    async def work() -> None:
        async with pair() as (plugin, link):
            late: list[Answer] = []
            for _ in range(2):
                with pytest.raises(LinkError) as caught:
                    await link.ask(Command("handoff", "a"), 0.02, late.append)
                assert caught.value.late
            given_up = asyncio.create_task(link.ask(Command("handoff", "b"), 5.0, late.append))
            await until(lambda: len(plugin.commands) == 3)
            given_up.cancel()
            await asyncio.gather(given_up, return_exceptions=True)
            plugin.answer(plugin.commands[0][0], Answer(error="gone"))
            plugin.answer(plugin.commands[1][0], Answer(tokens=5))
            plugin.answer(plugin.commands[2][0], Answer(tokens=6))
            plugin.answer(plugin.commands[2][0], Answer(tokens=7))  # nobody asked twice
            await until(lambda: len(late) == 2)
            await link.greet()
            assert [a.tokens for a in late] == [5, 6]

    run(work)


def test_garbage_is_counted_and_changes_nothing() -> None:
    async def work() -> None:
        async with pair() as (plugin, link):
            before = link.step
            for frame in (b"", b"\xc1", b"\x90", encode({"a": 1}), encode(["one", 1]), os.urandom(200)):
                plugin.stream.send(frame)
            asked = asyncio.create_task(link.ask(Command("hold", "a"), 5.0))
            await until(lambda: plugin.commands)
            frames = plugin.commands[0][0]
            for wrong in ([frames[0], b"x"], [*frames[:3], b"\xc1"], [*frames[:3], b"", b"", b""]):
                plugin.router.send(wrong)
            plugin.router.send([frames[0], b"", b"no such number", encode(Answer(tokens=9))])
            await until(lambda: link.garbage >= 9)
            assert link.step is before
            plugin.answer(frames, Answer(tokens=1))
            assert (await asked).tokens == 1

    run(work)


def test_an_engine_that_was_restarted_is_greeted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "AGAIN_S", 0.01)

    async def work() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        plugin = Plugin(context, "one")
        link: Link | None = None
        try:
            link = await linked(context, plugin.address)
            assert link is not None
            hellos: list[Answer] = []
            link.on_hello = hellos.append
            await heard(plugin, link)
            plugin.close()
            other = Plugin(context, "two", plugin.address.rpartition(":")[2])
            assert other.address == plugin.address
            try:
                await heard(other, link)
                assert [h.engine_id for h in hellos] == ["two"]
                assert link.garbage > 0  # what it said before it was known
            finally:
                other.close()
        finally:
            if link is not None:
                link.close()
            plugin.close()
            context.destroy(linger=0)

    run(work)


def test_no_plugin_is_no_link_and_neither_is_another_protocol(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(link_module.Link.greet, "__defaults__", (0.1,))

    async def work() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        plugin = Plugin(context)
        try:
            plugin.protocol = PROTOCOL + 1
            assert await linked(context, plugin.address) is None
            address = plugin.address
            plugin.close()
            assert await linked(context, address) is None
        finally:
            plugin.close()
            context.destroy(linger=0)

    run(work)
    lines = [r.getMessage() for r in caplog.records if "no engine plugin" in r.getMessage()]
    assert len(lines) == 2 and f"protocol {PROTOCOL + 1}" in lines[0] and "no answer" in lines[1]


def test_closing_ends_what_waits_and_leaves_nothing_behind() -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async def work() -> None:
        before, tasks = 0, len(asyncio.all_tasks())
        for turn in range(4):
            async with pair() as (plugin, link):
                waiting = asyncio.create_task(link.ask(Command("handoff", "a"), 30.0))
                await until(partial(bool, plugin.commands))
                link.close()
                link.close()
                with pytest.raises(LinkError, match="closed"):
                    await waiting
                with pytest.raises(LinkError, match="closed"):
                    await link.ask(Command("hello"), 1.0)
            if turn == 0:
                before = descriptors()
        assert descriptors() <= before
        assert len(asyncio.all_tasks()) == tasks

    run(work)


def test_a_gateway_that_does_not_read_piles_nothing_up() -> None:
    async def work() -> None:
        async with pair() as (plugin, link):
            padding = [Prediction("p" * 1000, 1, (0.0,) * 3)] * 100
            first = plugin.number
            for _ in range(3000):  # 300 MB, while this loop does not turn
                plugin.say(padding)
            await asyncio.sleep(0.2)
            plugin.say()
            await until(lambda: link.step is not None and link.step.number > first)
            taken = link.predictions / len(padding)
            assert 0 < taken < 2900  # the rest was thrown away at the engine

    run(work)


def test_a_gateway_that_does_not_start_leaves_no_link_open() -> None:
    async def work() -> None:
        fleet = EmulatedFleet()
        urls = await fleet.start(EmulatedSettings(), 1)
        deployment = Deployment(setup())
        twice = [EngineAddress(urls[0], Role.MIXED, plugin=fleet.plugins[0])] * 2
        try:
            with pytest.raises(PenstockError, match="attached already"):
                await deployment.start(twice)
            assert deployment.world.instances[0].link is None
            assert deployment.world._sockets is not None and deployment.world._sockets.closed
        finally:
            await fleet.stop()

    run(work)
