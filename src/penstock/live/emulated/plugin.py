"""The plugin of an emulated engine: the same two sockets and the same answers as a real one's.

See :mod:`penstock.live.plugin.penstock_engine.messages`. One process may run dozens of these, so a message tells of
many steps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from penstock.core.errors import PenstockError
from penstock.live.emulated.choice import Choice
from penstock.live.emulated.driver import Driver
from penstock.live.emulated.fabric import Fabric
from penstock.live.emulated.foresight import LEVELS, Foresight
from penstock.live.emulated.settings import Plan
from penstock.live.emulated.transfers import Host, Transfers
from penstock.live.plugin.penstock_engine.messages import Answer, Command, Running, Step
from penstock.live.sockets import Frames, LoopSocket, next_port

_BIND_TRIES = 100
_BIND_PAUSE_S = 0.02
_read_command = msgspec.msgpack.Decoder(Command).decode
_encode = msgspec.msgpack.encode
Reply = Callable[[Answer], None]


class EmulatedPlugin:
    """Serves one instance from ``start`` to ``close``; ``delay_s`` is a fault: commands are done so much later."""

    def __init__(self, plan: Plan, driver: Driver, transfers: Transfers, fabric: Fabric, host: Host) -> None:
        self._plan = plan
        self._driver = driver
        self._transfers = transfers
        self._fabric = fabric
        self._host = host
        self._foresight = Foresight(plan.settings, fabric.origins) if plan.settings.predict else None
        self._stream: zmq.Socket[bytes]
        self._commands: LoopSocket
        self.delay_s = 0.0
        self._open = False
        self._timer: asyncio.TimerHandle | None = None
        self._number = 0
        self._stopping: dict[int, Reply] = {}
        self._holds = 0
        driver.on_work = self._wake
        driver.on_gone = self._gone
        transfers.on_pinned = self._pinned

    async def start(self, host: str, port: int) -> int:
        """Listen on ``port`` and the one above it, or on two free ones where it is 0; return the first.

        Raises
        ------
        PenstockError
            They are taken.
        """
        shown = f"[{host}]" if ":" in host else host
        for _ in range(_BIND_TRIES):
            stream, commands = self._fabric.sockets.socket(zmq.PUB), self._fabric.sockets.socket(zmq.ROUTER)
            try:
                stream.bind(f"tcp://{shown}:{port or '*'}")
                address = stream.getsockopt_string(zmq.LAST_ENDPOINT)
                commands.bind(next_port(address))
            except zmq.ZMQError:  # its own sockets of before a restart may still be closing
                stream.close(linger=0)
                commands.close(linger=0)
                await asyncio.sleep(_BIND_PAUSE_S if port else 0)
                continue
            self._stream = stream
            self._commands = LoopSocket(commands, self._heard)
            self._open = True
            return int(address.rpartition(":")[2])
        raise PenstockError(f"no ports for the plugin on {host}", "free some")

    def close(self) -> None:
        """The instance has died."""
        if self._open:
            self._open = False
            self._stream.close(linger=0)
            self._commands.close()
            if self._timer is not None:
                self._timer.cancel()

    # -- commands ---------------------------------------------------------------------------------------------------

    def _heard(self, frames: Frames) -> None:
        if len(frames) != 4:
            return
        peer, _, number, payload = frames

        def reply(answer: Answer) -> None:
            if self._open:
                self._commands.send([peer, b"", number, _encode(answer)])

        try:
            command = _read_command(payload)
        except msgspec.MsgspecError:
            self._host.when_awake(lambda: reply(Answer("not a command")))
            return
        if self.delay_s:
            loop = asyncio.get_running_loop()
            loop.call_later(self.delay_s, self._host.when_awake, lambda: self._do(command, reply))
        else:
            self._host.when_awake(lambda: self._do(command, reply))

    def _do(self, command: Command, reply: Reply) -> None:
        if not self._open:
            return
        if command.op == "hello":
            reply(self._hello())
        elif command.op == "handoff":
            self._hand_off(command.id, reply)
        elif command.op == "hold":
            reply(self._hold(command.id))
        elif command.op == "release":
            reply(Answer() if self._transfers.drop(command.id) else Answer(f"there is no hold {command.id}"))
        else:
            reply(Answer(f"there is no command {command.op!r}"))

    def _hello(self) -> Answer:
        abilities = ["handoff"]
        if self._driver.engine.cache is not None:
            abilities.append("precopy")
        if self._foresight is None:
            return Answer(vllm="emulated", engine_id=self._transfers.engine_id, abilities=tuple(abilities))
        return Answer(
            vllm="emulated",
            engine_id=self._transfers.engine_id,
            abilities=(*abilities, "predict"),
            predictor="noisy-oracle",
            quantiles=LEVELS,
        )

    def _hand_off(self, name: str, reply: Reply) -> None:
        choice = self._find(name)
        if choice is None:
            reply(Answer("no running request, or several, have this id"))
        elif not self._driver.stop_after_next(choice):
            reply(Answer("the request ends with its next token"))
        else:
            self._stopping[choice.request] = reply

    def _hold(self, name: str) -> Answer:
        choice = self._find(name)
        if choice is None:
            return Answer("no running request, or several, have this id")
        found = self._driver.hold(choice)
        if found is None:
            return Answer("the request has no full block")
        blocks, give_back = found
        self._holds += 1
        hold = f"hold-{self._holds}-{choice.name}"
        tokens = blocks * self._plan.spec.block_size
        params = self._transfers.keep(hold, choice.all_tokens()[:tokens], tokens, give_back)
        return Answer(tokens=tokens, params=params, hold=hold)

    def _find(self, name: str) -> Choice | None:
        found = [choice for choice in self._driver.running.values() if name in choice.name]
        return found[0] if len(found) == 1 else None

    def _pinned(self, choice: Choice, params: dict[str, Any]) -> None:
        reply = self._stopping.pop(choice.request, None)
        if reply is not None:
            reply(Answer(tokens=choice.tokens, params=params))

    def _gone(self, choice: Choice) -> None:
        reply = self._stopping.pop(choice.request, None)
        if reply is not None:
            reply(Answer("the request ended first"))

    # -- the stream -------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._timer is None and self._open:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._plan.settings.stream_s, self._tell)

    def _tell(self) -> None:
        """Send the state; go on until the instance is idle and has said so."""
        self._timer = None
        if not self._open:
            return
        if not self._host.hung:
            self._stream.send(_encode(self._step()), zmq.NOBLOCK)
        if self._driver.choices:
            self._wake()

    def _step(self) -> Step:
        driver = self._driver
        now = driver.advance()
        load = driver.engine.load(now)
        driver.arm()
        choices = list(driver.running.values())
        for seq in driver.engine.chunks:
            starting = driver.choices.get(seq.request)
            if starting is not None and seq.request not in driver.running:
                choices.append(starting)
        running = [Running(c.name, len(c.prompt), len(c.out), max(c.tokens - 1, 0)) for c in choices]
        predictions = []
        if self._foresight is not None:
            predictions = [p for p in map(self._foresight.due, driver.running.values()) if p is not None]
        self._number += 1
        return Step(
            self._transfers.engine_id,
            self._number,
            time.monotonic(),
            load.step_s / self._plan.settings.speed if running else 0.0,
            len(driver.choices) - len(running),
            load.free_blocks,
            self._plan.spec.capacity_blocks,
            driver.engine.preemptions,
            running,
            predictions,
        )
