"""The two sockets of an engine: a stream that never makes it wait, and commands that a thread takes in for it."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import NamedTuple

import msgspec
import zmq

from .messages import Answer, Command, Step

_LOST_BEYOND = 256  # messages queued for a subscriber that does not read; what comes after is dropped
_ENCODER = msgspec.msgpack.Encoder()


class Stream:
    """PUB socket of the steps, for one thread.

    Raises
    ------
    zmq.ZMQError
        The address cannot be bound.
    """

    def __init__(self, address: str) -> None:
        self._socket = _socket(zmq.PUB, address)

    def send(self, step: Step) -> None:
        """Send to who listens now. Returns at once, whatever they do."""
        with contextlib.suppress(zmq.Again):
            self._socket.send(_ENCODER.encode(step), zmq.NOBLOCK)

    def close(self) -> None:
        """Close the socket; what is not sent is dropped."""
        self._socket.close(linger=0)


class Ticket(NamedTuple):
    """Whom to answer: the caller's address on the socket and its number of the request."""

    caller: bytes
    number: bytes


class Commands:
    """ROUTER socket of the commands, served by a thread of its own.

    The thread answers what needs no look at the engine: `hello`, nonsense, and anything while the engine is idle, since
    an idle engine takes no steps. The rest waits until the scheduler's thread takes it (`take`) and answers
    (`answer`).

    Parameters
    ----------
    address : str
        To bind.
    hello : Answer
        What to say to a hello.

    Raises
    ------
    zmq.ZMQError
        The address cannot be bound.
    """

    def __init__(self, address: str, hello: Answer) -> None:
        self._hello = hello
        self._lock = threading.Lock()
        self._busy = False
        self._inbox: deque[tuple[Ticket, Command]] = deque()
        self._router = _socket(zmq.ROUTER, address)
        inside = f"inproc://penstock-answers-{id(self)}"
        self._answers = _socket(zmq.PULL, inside)
        self._outbox: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._outbox.connect(inside)
        self._thread = threading.Thread(target=self._serve, name="penstock-commands", daemon=True)
        self._thread.start()

    def busy(self, busy: bool) -> None:
        """Say whether there is anything that a command could be about. Commands taken in before stay for `take`."""
        with self._lock:
            self._busy = busy

    @property
    def waiting(self) -> bool:
        """Whether `take` would return something: the engine must make a step."""
        return bool(self._inbox)

    def take(self) -> list[tuple[Ticket, Command]]:
        """Everything that has come since the last call."""
        if not self._inbox:  # nearly always
            return []
        with self._lock:
            taken = list(self._inbox)
            self._inbox.clear()
        return taken

    def answer(self, ticket: Ticket, answer: Answer) -> None:
        """Answer one that was taken; from the thread that takes."""
        with contextlib.suppress(zmq.Again):
            self._outbox.send_multipart([*ticket, _ENCODER.encode(answer)], zmq.NOBLOCK)

    def close(self) -> None:
        """End the thread and close the sockets."""
        self._outbox.send(b"")
        self._thread.join()
        self._outbox.close(linger=0)

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._answers, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._answers in ready:
                frames = self._answers.recv_multipart()
                if len(frames) == 1:
                    break
                caller, number, answer = frames
                self._reply(Ticket(caller, number), answer)
            if self._router in ready:
                self._received(self._router.recv_multipart())
        self._router.close(linger=0)
        self._answers.close(linger=0)

    def _received(self, frames: list[bytes]) -> None:
        if len(frames) != 4 or frames[1]:
            return  # not one of ours: there is no number to answer to
        ticket = Ticket(frames[0], frames[2])
        try:
            command = msgspec.msgpack.decode(frames[3], type=Command)
        except msgspec.MsgspecError as error:
            self._reply(ticket, _ENCODER.encode(Answer(error=f"not a command: {error}")))
            return
        if command.op == "hello":
            self._reply(ticket, _ENCODER.encode(self._hello))
            return
        with self._lock:
            if self._busy:
                self._inbox.append((ticket, command))
                return
        self._reply(ticket, _ENCODER.encode(Answer(error="no such request: the engine is idle")))

    def _reply(self, ticket: Ticket, answer: bytes) -> None:
        with contextlib.suppress(zmq.Again):
            self._router.send_multipart([ticket.caller, b"", ticket.number, answer], zmq.NOBLOCK)


def _socket(kind: int, address: str) -> zmq.Socket[bytes]:
    made: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    made.setsockopt(zmq.SNDHWM, _LOST_BEYOND)
    try:
        made.bind(address)
    except zmq.ZMQError:
        made.close(linger=0)
        raise
    return made
