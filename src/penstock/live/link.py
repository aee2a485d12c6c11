"""The gateway's end of an engine plugin: the engine's latest state, what it predicts, and commands with answers.

Messages are those of :mod:`penstock.live.plugin.penstock_engine.messages`. ZeroMQ connects and reconnects by itself.
Steps are only ever the latest one; a gateway that is too slow loses some, and never piles them up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec
import zmq

from penstock.live.plugin.penstock_engine.messages import PROTOCOL, Answer, Command, Prediction, Step
from penstock.live.sockets import Frames, LoopSocket, next_port

log = logging.getLogger("penstock.live")
HELLO_S = 1.0
"""How long an engine may take to say who it is. Ours: it answers at once even if it is idle."""
FRESH_S = 1.0
"""An older step says nothing about now: the engine is idle, hangs, or is gone."""
QUEUED_STEPS = 64
"""Steps that may wait to be read before the engine's are dropped."""
AGAIN_S = 1.0
"""Least time between two questions who an engine is that seems to be another one."""
NAMES_KEPT = 4096
STEP_WEIGHT = 0.2
"""Weight of the latest step in the moving mean of step times. Ours: a prefill among decodes is no trend."""
Predicted = Callable[[Prediction], None]


class LinkError(Exception):
    """The plugin did not do what it was told; ``str`` says why. ``late`` is true where it still may."""

    def __init__(self, reason: str, late: bool = False) -> None:
        super().__init__(reason)
        self.late = late


class Link:
    """One engine's plugin at ``tcp://HOST:PORT``, the stream's address.

    ``hello`` is what it last said about itself, ``step`` the latest state (None before the first), ``heard_s`` when
    that came (event loop's clock), ``step_s`` the moving mean of busy steps (s, 0 before the first). ``predictions``
    counts those received, ``garbage`` the messages that were none or another engine's. ``on_hello`` is called when an
    engine that was restarted has said who it is now, ``on_step`` after every step.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.address = address
        self.hello: Answer | None = None
        self.step: Step | None = None
        self.heard_s = -FRESH_S
        self.step_s = 0.0
        self.predictions = 0
        self.garbage = 0
        self.closed = False
        self.on_hello: Callable[[Answer], None] | None = None
        self.on_step: Callable[[Step], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._number = 0
        self._open: dict[bytes, asyncio.Future[Answer]] = {}
        self._late: dict[bytes, Callable[[Answer], None]] = {}
        self._watched: dict[str, Predicted] = {}
        self._names: dict[str, str] = {}
        self._asked_s = -AGAIN_S
        self._greeting: asyncio.Task[None] | None = None
        self._read_step = msgspec.msgpack.Decoder(Step)
        self._read_answer = msgspec.msgpack.Decoder(Answer)
        stream = context.socket(zmq.SUB)
        stream.setsockopt(zmq.RCVHWM, QUEUED_STEPS)
        stream.setsockopt(zmq.SUBSCRIBE, b"")
        commands = context.socket(zmq.DEALER)
        for socket, where in ((stream, address), (commands, next_port(address))):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, 50)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
            socket.connect(where)
        self._stream = LoopSocket(stream, self._on_stream)
        self._commands = LoopSocket(commands, self._on_answer)

    # -- commands ---------------------------------------------------------------------------------------------------

    async def greet(self, timeout_s: float = HELLO_S) -> Answer:
        """Ask the engine who it is.

        Raises
        ------
        LinkError
            No answer in time, or another protocol.
        """
        answer = await self.ask(Command("hello"), timeout_s)
        if answer.protocol != PROTOCOL:
            raise LinkError(f"it speaks protocol {answer.protocol}, this gateway {PROTOCOL}")
        self.hello = answer
        return answer

    async def ask(self, command: Command, timeout_s: float, late: Callable[[Answer], None] | None = None) -> Answer:
        """Have something done.

        Parameters
        ----------
        command : Command
        timeout_s : float
        late : callable, optional
            Told the answer if it comes after the timeout, or after the caller was cancelled, and is no error.

        Raises
        ------
        LinkError
            The plugin refused, did not answer in time, or the link was closed.
        """
        if self.closed:
            raise LinkError("the link is closed")
        self._number += 1
        number = self._number.to_bytes(8, "big")
        if not self._commands.send([b"", number, msgspec.msgpack.encode(command)]):
            raise LinkError("too many commands are unanswered")
        answered: asyncio.Future[Answer] = self._loop.create_future()
        self._open[number] = answered
        if late is not None:  # from the start: the answer may come in the very moment of the timeout
            self._late[number] = late
        try:
            answer = await asyncio.wait_for(answered, timeout_s)
        except TimeoutError:
            raise LinkError(f"no answer to {command.op} in {timeout_s:g} s", late=True) from None
        finally:
            del self._open[number]
            if answered.done() and not answered.cancelled():
                self._late.pop(number, None)
        if answer.error:
            raise LinkError(answer.error)
        return answer

    # -- what the engine says of its own accord ---------------------------------------------------------------------

    def fresh(self) -> bool:
        """Is ``step`` young enough to be believed?"""
        return self._loop.time() - self.heard_s < FRESH_S

    def watch(self, name: str, predicted: Predicted) -> None:
        """Call ``predicted`` for every prediction about the request whose name at the engine contains ``name``."""
        self._watched[name] = predicted

    def unwatch(self, name: str) -> None:
        """Stop that; does nothing for an unknown name."""
        self._watched.pop(name, None)

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels of predicted quantiles, rising; none where nothing is predicted."""
        return self.hello.quantiles if self.hello is not None else ()

    @property
    def median(self) -> int:
        """Which of the levels is the median, or the nearest to it; -1 where nothing is predicted."""
        levels = self.levels
        return min(range(len(levels)), key=lambda i: abs(levels[i] - 0.5), default=-1)

    def close(self) -> None:
        """Hang up: whoever waits for an answer gets a LinkError. May be called twice."""
        if self.closed:
            return
        self.closed = True
        self._stream.close()
        self._commands.close()
        if self._greeting is not None:
            self._greeting.cancel()
        for answered in self._open.values():
            if not answered.done():
                answered.set_exception(LinkError("the link was closed"))
        self._late.clear()
        self._watched.clear()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _on_answer(self, frames: Frames) -> None:
        try:
            _, number, payload = frames
            answer = self._read_answer.decode(payload)
        except (ValueError, msgspec.MsgspecError):
            self.garbage += 1
            return
        answered = self._open.get(number)
        if answered is not None and not answered.done():
            answered.set_result(answer)
            return
        late = self._late.pop(number, None)
        if late is not None and not answer.error:
            late(answer)

    def _on_stream(self, frames: Frames) -> None:
        try:
            step = self._read_step.decode(frames[-1])
        except msgspec.MsgspecError:
            self.garbage += 1
            return
        if self.hello is None:
            return
        if step.engine_id != self.hello.engine_id:
            self.garbage += 1
            self._ask_again()
            return
        self.step = step
        self.heard_s = self._loop.time()
        if step.step_s > 0.0:
            self.step_s += (STEP_WEIGHT if self.step_s else 1.0) * (step.step_s - self.step_s)
        if self.on_step is not None:
            self.on_step(step)
        for prediction in step.predictions:
            self._tell(prediction)

    def _tell(self, prediction: Prediction) -> None:
        if self.hello is None or len(prediction.remaining) != len(self.hello.quantiles):
            self.garbage += 1
            return
        self.predictions += 1
        name = self._names.get(prediction.id)
        if name is None:
            if len(self._names) >= NAMES_KEPT:
                self._names.clear()
            name = next((watched for watched in self._watched if watched in prediction.id), "")
            self._names[prediction.id] = name
        predicted = self._watched.get(name)
        if predicted is not None:
            predicted(prediction)

    def _ask_again(self) -> None:
        """Another engine speaks at this address: the old one was restarted."""
        now = self._loop.time()
        if now - self._asked_s >= AGAIN_S and (self._greeting is None or self._greeting.done()):
            self._asked_s = now
            self._greeting = self._loop.create_task(self._renew())

    async def _renew(self) -> None:
        try:
            hello = await self.greet()
        except LinkError as error:
            log.info("plugin: %s", error, extra={"url": self.address})
            return
        self._names.clear()
        if self.on_hello is not None:
            self.on_hello(hello)


async def linked(context: zmq.Context[zmq.Socket[bytes]], address: str) -> Link | None:
    """The link to a plugin that answers; None, and a line in the log, where none does."""
    link = Link(context, address)
    try:
        await link.greet()
    except LinkError as error:
        log.warning("no engine plugin at %s (%s): requests move without it", address, error)
        link.close()
        return None
    except BaseException:
        link.close()
        raise
    return link
