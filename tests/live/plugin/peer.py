"""A plain client of the engine plugin's two sockets."""

from __future__ import annotations

import asyncio
from typing import Self

import msgspec
import zmq
import zmq.asyncio

from penstock.live.plugin.penstock_engine.messages import Answer, Command, Prediction, Step


class Peer:
    """Commands to one engine, and all steps that it sent since. Use as an asynchronous context manager."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._context = zmq.asyncio.Context()
        self._commands = self._context.socket(zmq.DEALER)
        self._commands.connect(f"{host}:{int(port) + 1}")
        self._stream = self._context.socket(zmq.SUB)
        self._stream.subscribe(b"")
        self._stream.connect(address)
        self._number = 0
        self.steps: list[Step] = []
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._read())
        await asyncio.sleep(0.2)  # a subscription takes a moment, and what is sent before it is lost
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._reader is not None
        self._reader.cancel()
        self._context.destroy(linger=0)

    async def _read(self) -> None:
        while True:
            self.steps.append(msgspec.msgpack.decode(await self._stream.recv(), type=Step))

    async def raw(self, payload: bytes, timeout_s: float = 20.0) -> Answer:
        """Send any bytes as a command and wait for the answer."""
        self._number += 1
        number = str(self._number).encode()
        await self._commands.send_multipart([b"", number, payload])
        frames = await asyncio.wait_for(self._commands.recv_multipart(), timeout_s)
        assert frames[:2] == [b"", number]
        return msgspec.msgpack.decode(frames[2], type=Answer)

    async def ask(self, op: str, name: str = "", timeout_s: float = 20.0) -> Answer:
        """One command and its answer."""
        return await self.raw(msgspec.msgpack.encode(Command(op, name)), timeout_s)

    async def until(self, name: str, output_tokens: int, timeout_s: float = 30.0) -> None:
        """Wait until the request runs and has so many output tokens."""
        async with asyncio.timeout(timeout_s):
            while not any(
                name in one.id and one.output_tokens >= output_tokens
                for one in (self.steps[-1].running if self.steps else ())
            ):
                await asyncio.sleep(0.002)

    def predictions(self, name: str) -> list[Prediction]:
        """All that came about one request."""
        return [one for step in self.steps for one in step.predictions if name in one.id]
