"""The sockets: an idle engine answers, a busy one is asked, and a subscriber that does not read costs nothing."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from penstock.live.local.launch import _free_ports
from penstock.live.plugin.penstock_engine.channel import Commands, Stream
from penstock.live.plugin.penstock_engine.messages import Answer, Command, Running, Step
from tests.live.plugin.peer import Peer


@pytest.fixture
def port() -> int:
    """The first of two free ports."""
    return _free_ports(1, 2)[0]


@pytest.fixture
def commands(port: int) -> Iterator[Commands]:
    """Commands of an idle engine."""
    made = Commands(f"tcp://127.0.0.1:{port + 1}", Answer(vllm="0", engine_id="e"))
    yield made
    made.close()


def test_an_idle_engine_answers_by_itself(commands: Commands, port: int) -> None:
    async def work() -> None:
        async with Peer(f"tcp://127.0.0.1:{port}") as peer:
            assert (await peer.ask("hello")).engine_id == "e"
            assert "idle" in (await peer.ask("handoff", "r")).error
            for nonsense in (b"", b"\xc1", msgspec.msgpack.encode([1, 2])):
                assert (await peer.raw(nonsense)).error.startswith("not a command")
            assert commands.take() == []

    asyncio.run(work())


def test_a_busy_engine_is_asked(commands: Commands, port: int) -> None:
    async def work() -> None:
        commands.busy(True)
        async with Peer(f"tcp://127.0.0.1:{port}") as peer, Peer(f"tcp://127.0.0.1:{port}") as other:
            first, second = asyncio.create_task(peer.ask("hold", "a")), asyncio.create_task(other.ask("hold", "b"))
            async with asyncio.timeout(10):
                while len(commands._inbox) < 2:
                    await asyncio.sleep(0.01)
            assert (await peer_hello(port)).engine_id == "e"  # whatever the engine is doing
            commands.busy(False)  # what was taken in stays
            taken = commands.take()
            assert len(taken) == 2
            assert commands.take() == []
            for ticket, command in reversed(taken):
                commands.answer(ticket, Answer(hold=command.id))
            assert (await first).hold == "a"
            assert (await second).hold == "b"

    asyncio.run(work())


async def peer_hello(port: int) -> Answer:
    """Ask who it is."""
    async with Peer(f"tcp://127.0.0.1:{port}") as third:
        return await third.ask("hello")


def test_strangers_are_ignored(commands: Commands, port: int) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(f"tcp://127.0.0.1:{port + 1}")
        stranger.send_multipart([b"x"])
        stranger.send_multipart([b"", b"1", b"2", b"3"])
        stranger.send_multipart([b"", b"n", msgspec.msgpack.encode(Command("hello"))])
        assert stranger.poll(10_000)
        assert stranger.recv_multipart()[1] == b"n"


def test_the_thread_ends(port: int) -> None:
    before = threading.active_count()
    made = Commands(f"tcp://127.0.0.1:{port + 1}", Answer())
    assert threading.active_count() == before + 1
    made.close()
    assert threading.active_count() == before


def test_an_address_in_use_is_an_error(port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(zmq.ZMQError):
            Stream(f"tcp://127.0.0.1:{port}")
        with pytest.raises(zmq.ZMQError):
            Commands(f"tcp://127.0.0.1:{port}", Answer())


def test_a_subscriber_that_does_not_read_delays_nothing(port: int) -> None:
    stream = Stream(f"tcp://127.0.0.1:{port}")
    with zmq.Context() as context, context.socket(zmq.SUB) as lazy:
        lazy.linger = 0
        lazy.rcvhwm = 1
        lazy.subscribe(b"")
        lazy.connect(f"tcp://127.0.0.1:{port}")
        time.sleep(0.3)
        step = Step("e", 1, 0.0, 0.0, 0, 1, 1, 0, [Running(f"cmpl-{i}", 1, 2, 3) for i in range(2000)], [])
        begin = time.monotonic()
        for _ in range(2000):  # 60 MB: more than all buffers hold
            stream.send(step)
        assert time.monotonic() - begin < 10
        assert msgspec.msgpack.decode(lazy.recv(), type=Step) == step
    stream.close()
