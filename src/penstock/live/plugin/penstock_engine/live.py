"""What the plugin does in the scheduler's thread: the stream of steps, hand-offs, holds.

No vLLM is imported here: requests, block pool and stock scheduler come in as they are, so this runs in tests against
stand-ins. `scheduler.py` hangs it into vLLM.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import msgspec

from .channel import Ticket
from .custody import padded, signed
from .messages import Answer, Command, Prediction, Running, Step

LOG = logging.getLogger("vllm.penstock")

HOLD = "penstock-hold-"
"""How the ids begin under which NIXL knows held blocks. No request of vLLM's is called so."""

_PULSE_S = 0.05  # between messages of an engine that steps without work, as it does every millisecond while it holds
_CHOICE = re.compile(r"\d+_")  # vLLM's ids of the sequences of a request with several

Finish = Callable[[Any, tuple[list[int], ...]], tuple[bool, dict[str, Any] | None]]
"""Stock ``request_finished``: request and block ids to whether the blocks stay, and the transfer parameters."""


class Stock(Protocol):
    """What is used of NIXL's stock scheduler side."""

    engine_id: str
    block_size: int
    _reqs_in_batch: set[str]
    _reqs_not_processed: set[str]


class Port(Protocol):
    """Where commands come from and answers go (`channel.Commands`)."""

    @property
    def waiting(self) -> bool:
        """Whether there is one."""

    def busy(self, busy: bool) -> None:
        """Whether any are wanted."""

    def take(self) -> list[tuple[Ticket, Command]]:
        """Those that came."""

    def answer(self, ticket: Ticket, answer: Answer) -> None:
        """Answer one."""


class _Refused(Exception):
    """The command cannot be done; the text says why."""


class _Handoff(msgspec.Struct, frozen=True):
    ticket: Ticket
    request: Any
    max_tokens: int
    params: dict[str, Any] | None


class _Hold(msgspec.Struct):
    blocks: list[Any]
    ticket: Ticket | None  # of the answer that is due when the worker knows the hold
    answer: Answer


class Live:
    """The plugin's state in one engine. All methods are for the scheduler's thread.

    Parameters
    ----------
    stock : Stock
        NIXL's scheduler side.
    finish : Finish
        Its own ``request_finished``.
    send : callable
        Takes a `Step`, and does not block.
    port : Port
        Commands and answers.
    abilities : sequence of str
        Of ``handoff`` and ``precopy``, what the engine can do.
    max_model_len : int
        Tokens at which vLLM ends a request.
    """

    def __init__(
        self,
        stock: Stock,
        finish: Finish,
        send: Callable[[Step], None],
        port: Port,
        abilities: Sequence[str],
        max_model_len: int,
    ) -> None:
        self._stock = stock
        self._finish = finish
        self._send: Callable[[Step], None] | None = send
        self._port = port
        self._abilities = frozenset(abilities)
        self._max_model_len = max_model_len
        self._manager: Any = None
        self._requests: dict[str, Any] = {}
        self._handoffs: dict[str, _Handoff] = {}
        self._pinned: set[str] = set()  # handed off, not yet pulled
        self._holds: dict[str, _Hold] = {}
        self._new_holds: list[str] = []
        self._released: set[str] = set()
        self._predictions: list[Prediction] = []
        self._number = 0
        self._preemptions = 0
        self._sent_s = 0.0
        self._began_s = 0.0
        self._worked = False
        self._was_empty = False
        self._free = 0  # blocks, as last told

    def bind(self, manager: Any) -> None:
        """Give it the KV cache manager, which vLLM makes after the connector."""
        self._manager = manager

    def unfinished(self) -> bool:
        """Whether the engine must step although it has no request: a hold to watch over, a command to answer.

        vLLM asks before it goes idle. Blocks that became free after its last step are told here.
        """
        if self._holds or self._port.waiting:
            return True
        if self._send is not None and self._number and self._manager.block_pool.get_num_free_blocks() != self._free:
            self._guarded_publish({})
        return False

    def added(self, request: Any) -> None:
        """A request came."""
        self._requests[request.request_id] = request
        self._port.busy(True)

    def step(self, output: Any) -> tuple[list[str], list[str]]:
        """A step is scheduled: ``output`` is vLLM's SchedulerOutput. Returns the ids newly held, and those given up."""
        self._preempted(output.preempted_req_ids or ())
        for ticket, command in self._port.take():
            try:
                self._do(ticket, command, output)
            except _Refused as refused:
                self._port.answer(ticket, Answer(error=str(refused)))
            except Exception as error:  # a command must not end an engine
                LOG.exception("Penstock: %s failed", command)
                self._port.answer(ticket, Answer(error=f"{command.op} failed: {error!r}"))
        self._guarded_publish(output.num_scheduled_tokens)
        held, self._new_holds = self._new_holds, []
        released, self._released = sorted(self._released), set()
        return held, released

    def updated(self, output: Any, predictions: Sequence[tuple[str, int, Sequence[float]]], tracked: set[str]) -> None:
        """Read the workers' part of a step: ``output`` is vLLM's KVConnectorOutput.

        Takes the ids of holds out of it, which vLLM's scheduler does not know. ``predictions`` are (request, output
        tokens, quantiles); ``tracked`` are the holds that the workers watch over from now on.
        """
        if self._send is not None:
            self._predictions += [Prediction(i, n, tuple(v)) for i, n, v in predictions if i in self._requests]
        for name in tracked:
            hold = self._holds.get(name)
            if hold is not None and hold.ticket is not None:
                self._port.answer(hold.ticket, hold.answer)
                hold.ticket = None
        if not output.finished_sending:
            return
        ended = {name for name in output.finished_sending if name.startswith(HOLD)}
        self._pinned -= output.finished_sending
        output.finished_sending = output.finished_sending - ended
        for name in ended:
            self._end_hold(name)
        self._settle()

    def finished(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended: as vLLM's ``request_finished``."""
        name = request.request_id
        self._requests.pop(name, None)
        handoff = self._handoffs.pop(name, None)
        try:
            if handoff is None:
                return self._finish(request, block_ids)
            return self._handed_off(handoff, block_ids)
        finally:
            self._settle()

    def _settle(self) -> None:
        if not self._requests and not self._holds and not self._pinned:
            self._port.busy(False)

    def _do(self, ticket: Ticket, command: Command, output: Any) -> None:
        if command.op == "handoff":
            self._handoff(ticket, self._movable(command.id), output)
        elif command.op == "hold":
            self._hold(ticket, self._movable(command.id))
        elif command.op == "release":
            self._release(ticket, command.id)
        else:
            raise _Refused(f"unknown command {command.op!r}")

    # Hand-off

    def _handoff(self, ticket: Ticket, request: Any, output: Any) -> None:
        if "handoff" not in self._abilities:
            raise _Refused("this engine cannot hand off")
        now = request.num_computed_tokens + output.num_scheduled_tokens.get(request.request_id, 0)
        if not request.num_output_tokens or now < request.num_tokens:
            raise _Refused("the request is still being prefilled")
        self._handoffs[request.request_id] = _Handoff(ticket, request, request.max_tokens, request.kv_transfer_params)
        # vLLM reads the limit at each token. With asynchronous scheduling the next token is in flight already and the
        # one after it may be too: the first ends the request, and vLLM drops what comes for an ended request.
        request.max_tokens = request.num_output_tokens + 1
        request.kv_transfer_params = {"do_remote_decode": True, "do_remote_prefill": False}
        self._stock._reqs_in_batch.add(request.request_id)  # or the worker would not know it, and never let it go

    def _handed_off(self, handoff: _Handoff, block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        request = handoff.request
        ended = (
            request.status.name != "FINISHED_LENGTH_CAPPED"
            or request.num_output_tokens >= handoff.max_tokens
            or request.num_tokens >= self._max_model_len
        )
        if not ended:
            delay, params = self._finish(request, block_ids)
            if delay and params:
                size = self._stock.block_size
                groups = [padded(ids, request.num_tokens, size) for ids in params["remote_block_ids"]]
                # The KV of the last token may be missing or in the making; who pulls computes that one again.
                params = signed(params, request.num_tokens - 1, size) | {"remote_block_ids": groups}
                self._pinned.add(request.request_id)
                self._port.answer(handoff.ticket, Answer(tokens=request.num_tokens, params=params))
                return True, params
        self._restore(handoff, f"the request ended by itself ({request.status.name})")
        return self._finish(request, block_ids)

    def _preempted(self, names: Sequence[str] | set[str]) -> None:
        self._preemptions += len(names)
        for name in names:
            handoff = self._handoffs.pop(name, None)
            if handoff is not None:  # its KV is gone; it goes on here as if nothing had been said
                self._restore(handoff, "the request was preempted")

    def _restore(self, handoff: _Handoff, why: str) -> None:
        request = handoff.request
        request.max_tokens = handoff.max_tokens
        request.kv_transfer_params = handoff.params
        self._stock._reqs_not_processed.add(request.request_id)
        self._port.answer(handoff.ticket, Answer(error=why))

    # Holds

    def _hold(self, ticket: Ticket, request: Any) -> None:
        if "precopy" not in self._abilities:
            raise _Refused("this engine cannot hold blocks")
        size = self._stock.block_size
        # What steps in flight compute is not there yet.
        count = (request.num_computed_tokens - request.num_in_flight_tokens) // size
        blocks = list(self._manager.get_blocks(request.request_id).blocks[0])[:count]
        if not count or len(blocks) < count or any(block.is_null for block in blocks):
            raise _Refused("the request has no full block")
        name = f"{HOLD}{uuid.uuid4().hex}"
        # Stock code makes the parameters and starts the lease, as for a request that ended with a prefill for others.
        stand_in = SimpleNamespace(
            request_id=name,
            status=type(request.status).FINISHED_LENGTH_CAPPED,
            kv_transfer_params={"do_remote_decode": True},
            num_computed_tokens=count * size,
            num_tokens=count * size,
        )
        delay, params = self._finish(stand_in, ([block.block_id for block in blocks],))
        if not delay or not params:
            raise _Refused("NIXL does not take the blocks")
        self._stock._reqs_in_batch.add(name)
        self._manager.block_pool.touch(blocks)
        answer = Answer(tokens=count * size, params=signed(params, count * size, size), hold=name)
        self._holds[name] = _Hold(blocks, ticket, answer)
        self._new_holds.append(name)

    def _release(self, ticket: Ticket, name: str) -> None:
        # The worker forgets it and says so; blocks are freed on that report only, as after a pull.
        known = [held for held in (*self._holds, *self._pinned) if name and name in held]
        if len(known) != 1:
            raise _Refused("no such hold" if not known else "several holds")
        self._released.add(known[0])
        self._port.answer(ticket, Answer())

    def _end_hold(self, name: str) -> None:
        hold = self._holds.pop(name, None)
        if hold is None:
            return
        self._manager.block_pool.free_blocks(reversed(hold.blocks))  # the last ones are evicted first, as vLLM does
        if hold.ticket is not None:
            self._port.answer(hold.ticket, Answer(error="the hold has ended"))

    # Requests

    def _movable(self, part: str) -> Any:
        named = [request for name, request in self._requests.items() if part and part in name]
        running = [request for request in named if request.status.name == "RUNNING"]
        if not named:
            raise _Refused("no such request")
        if len(running) != 1:
            raise _Refused("the request is not running" if not running else "several requests")
        request = running[0]
        if request.request_id in self._handoffs:
            raise _Refused("the request is being handed off")
        if request.sampling_params is None or request.resumable:
            raise _Refused("the request is not a plain generation")
        if request.use_structured_output:
            raise _Refused("the request has structured output")
        if _CHOICE.match(request.request_id):
            raise _Refused("the request has several choices")
        if request.mm_features or request.prompt_embeds is not None:
            raise _Refused("the request has input other than tokens")
        if (request.kv_transfer_params or {}).get("do_remote_decode"):
            raise _Refused("the request leaves its KV anyway")
        return request

    # Stream

    def _guarded_publish(self, scheduled: dict[str, int]) -> None:
        if self._send is None:
            return
        try:
            self._publish(scheduled, self._send)
        except Exception:  # a stream must not end an engine
            LOG.exception("Penstock: no more steps are sent")
            self._send = None

    def _publish(self, scheduled: dict[str, int], send: Callable[[Step], None]) -> None:
        now = time.monotonic()
        step_s = now - self._began_s if self._worked else 0.0
        self._number += 1
        self._began_s, self._worked = now, bool(scheduled)
        running = [
            Running(name, request.num_prompt_tokens, request.num_output_tokens, request.num_computed_tokens)
            for name, request in self._requests.items()
            if request.status.name == "RUNNING"
        ]
        pool = self._manager.block_pool
        free = pool.get_num_free_blocks()
        empty = not running and not scheduled
        if empty and self._was_empty and free == self._free and now - self._sent_s < _PULSE_S:
            return
        self._was_empty, self._free, self._sent_s = empty, free, now
        predictions, self._predictions = self._predictions, []
        send(
            Step(
                engine_id=self._stock.engine_id,
                number=self._number,
                time_s=now,
                step_s=step_s,
                waiting=len(self._requests) - len(running),
                free_blocks=free,
                total_blocks=pool.num_gpu_blocks - 1,  # one is vLLM's null block
                preemptions=self._preemptions,
                running=running,
                predictions=predictions,
            )
        )
