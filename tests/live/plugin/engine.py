"""A small engine around `live.Live`: vLLM's scheduler, block pool, NIXL's two sides and a puller, as in vLLM 0.32.

Only what matters to custody of blocks is here. With ``lag`` = 1 it schedules one step ahead of the results, as vLLM's
asynchronous scheduling does. Every slot of every block remembers what was written to it last.
"""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

from penstock.live.plugin.penstock_engine.channel import Ticket
from penstock.live.plugin.penstock_engine.live import HOLD, Live
from penstock.live.plugin.penstock_engine.messages import Answer, Command, Step

BLOCK = 4
CHUNK = 10  # tokens of a prefill in one step


class Status(Enum):
    """vLLM's RequestStatus."""

    WAITING = 1
    RUNNING = 2
    PREEMPTED = 3
    FINISHED_STOPPED = 4
    FINISHED_LENGTH_CAPPED = 5
    FINISHED_ABORTED = 6


class Block:
    """vLLM's KVCacheBlock, with its contents."""

    is_null = False

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_cnt = 0
        self.slots: list[tuple[str, int] | None] = [None] * BLOCK


class Pool:
    """vLLM's BlockPool."""

    def __init__(self, count: int) -> None:
        self.blocks = [Block(index) for index in range(count)]
        self.num_gpu_blocks = count + 1

    def get_num_free_blocks(self) -> int:
        """Blocks that nobody refers to."""
        return sum(not block.ref_cnt for block in self.blocks)

    def touch(self, blocks: list[Block]) -> None:
        """Refer to blocks once more."""
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks: Any) -> None:
        """Refer to blocks once less."""
        for block in blocks:
            block.ref_cnt -= 1
            assert block.ref_cnt >= 0

    def allocate(self, count: int) -> list[Block] | None:
        """Take free ones, or none if they are too few."""
        free = [block for block in self.blocks if not block.ref_cnt][:count]
        if len(free) < count:
            return None
        self.touch(free)
        return free


class Request:
    """vLLM's Request; ``stops_at`` is the number of output tokens of which the last is its end of text."""

    def __init__(self, name: str, prompt: int, max_tokens: int, stops_at: int) -> None:
        self.request_id = name
        self.num_prompt_tokens = prompt
        self.max_tokens = max_tokens
        self.stops_at = stops_at
        self.status = Status.WAITING
        self.kv_transfer_params: dict[str, Any] | None = None
        self.sampling_params = object()
        self.resumable = self.use_structured_output = False
        self.mm_features: list[object] = []
        self.prompt_embeds = None
        self.num_output_tokens = self.num_computed_tokens = self.num_in_flight_tokens = 0
        self.placeholders = self.epoch = 0
        self.blocks: list[Block] = []

    @property
    def num_tokens(self) -> int:
        """Of prompt and output."""
        return self.num_prompt_tokens + self.num_output_tokens


class Port:
    """Commands and answers, without sockets."""

    def __init__(self) -> None:
        self.inbox: list[tuple[Ticket, Command]] = []
        self.answers: dict[bytes, Answer] = {}
        self.wanted = False

    @property
    def waiting(self) -> bool:
        return bool(self.inbox)

    def busy(self, busy: bool) -> None:
        self.wanted = busy

    def take(self) -> list[tuple[Ticket, Command]]:
        taken, self.inbox = self.inbox, []
        return taken

    def answer(self, ticket: Ticket, answer: Answer) -> None:
        assert ticket.number not in self.answers, "answered twice"
        self.answers[ticket.number] = answer


class Stock:
    """NIXL's scheduler side."""

    engine_id = "engine"
    block_size = BLOCK

    def __init__(self) -> None:
        self._reqs_in_batch: set[str] = set()
        self._reqs_not_processed: set[str] = set()
        self._reqs_need_send: set[str] = set()

    def request_finished(self, request: Any, ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        """As pull_scheduler.py."""
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_decode"):
            return False, None
        if request.status.name not in ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED"):
            self._reqs_not_processed.add(request.request_id)
            return False, None
        delay = any(ids)
        if delay:
            self._reqs_need_send.add(request.request_id)
        return delay, {
            "do_remote_prefill": True,
            "remote_block_ids": ids,
            "remote_request_id": request.request_id,
            "remote_num_tokens": request.num_computed_tokens,
        }

    def take(self) -> tuple[set[str], set[str], set[str]]:
        """The part of the metadata that is for the worker."""
        taken = self._reqs_in_batch, self._reqs_not_processed, self._reqs_need_send
        self._reqs_in_batch, self._reqs_not_processed, self._reqs_need_send = set(), set(), set()
        return taken


class Worker:
    """NIXL's worker side, and the connector's part there (`worker.PenstockSide`)."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.leased: set[str] = set()
        self.notified: set[str] = set()
        self.expiring: set[str] = set()
        self.late: set[str] = set()

    def run(self, meta: tuple[set[str], set[str], set[str]], released: list[str]) -> set[str]:
        """One step; returns what need not be kept any more."""
        in_batch, dropped, leases = meta
        self.known |= in_batch
        assert not dropped & self.leased
        self.known -= dropped
        self.leased |= leases & self.known
        done = {name for name in released if name in self.known}
        done |= self.notified & (self.known - done)
        self.late |= self.notified - done - {name for name in self.notified if name in released}
        done |= self.expiring & self.leased
        self.notified, self.expiring = set(), set()
        self.known -= done
        self.leased -= done
        return done


class Engine:
    """All of it."""

    def __init__(self, blocks: int, lag: int) -> None:
        self.pool = Pool(blocks)
        self.stock = Stock()
        self.port = Port()
        self.worker = Worker()
        self.steps: list[Step] = []
        self.lag = lag
        self.live = Live(
            self.stock,
            self.stock.request_finished,
            self.steps.append,
            self.port,
            ("handoff", "precopy"),
            max_model_len=1000,
        )
        self.live.bind(SimpleNamespace(block_pool=self.pool, get_blocks=self._get_blocks))
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.queue: list[Request] = []
        self.pinned: dict[str, list[Block]] = {}
        self.ended: dict[str, Request] = {}
        self._flights: list[Any] = []
        self._untold = False  # of an ended request, to the worker: vLLM makes a step more for that
        self._commands = 0

    def _get_blocks(self, name: str) -> Any:
        return SimpleNamespace(blocks=(self.requests[name].blocks,))

    def add(self, request: Request) -> None:
        """A request comes."""
        self.requests[request.request_id] = request
        self.queue.append(request)
        self.live.added(request)

    def command(self, op: str, name: str) -> bytes:
        """Send a command; returns the number under which its answer will be."""
        self._commands += 1
        number = str(self._commands).encode()
        ticket = Ticket(b"peer", number)
        if self.port.wanted:
            self.port.inbox.append((ticket, Command(op, name)))
        else:
            self.port.answer(ticket, Answer(error="idle"))
        return number

    @property
    def has_work(self) -> bool:
        """Whether vLLM would not go idle now."""
        return bool(self._flights) or self._has_requests

    @property
    def _has_requests(self) -> bool:
        return bool(self.running or self.queue or self.pinned or self._untold) or self.live.unfinished()

    def step(self) -> None:
        """Schedule a step, and take in the results of the oldest in flight."""
        if not self._has_requests:
            self._land(*self._flights.pop(0))
            return
        scheduled, preempted = self._schedule()
        output = SimpleNamespace(
            num_scheduled_tokens={request.request_id: count for request, count in scheduled},
            preempted_req_ids=preempted,
        )
        held, released = self.live.step(output)
        meta = self.stock.take()
        self._untold = False
        rows = []
        for request, count in scheduled:
            begin = request.num_computed_tokens
            request.num_computed_tokens += count
            request.num_in_flight_tokens += count
            samples = request.num_computed_tokens >= request.num_tokens + request.placeholders
            request.placeholders += samples
            rows.append((request, request.epoch, begin, count, samples, list(request.blocks)))
        self._flights.append((meta, held, released, rows))
        if len(self._flights) > self.lag or not scheduled:
            self._land(*self._flights.pop(0))

    def _schedule(self) -> tuple[list[tuple[Request, int]], set[str]]:
        scheduled: list[tuple[Request, int]] = []
        preempted: set[str] = set()
        index = 0
        while index < len(self.running):
            request = self.running[index]
            index += 1
            last = request.num_computed_tokens + 2 - request.placeholders
            if request.placeholders and last >= request.num_prompt_tokens + request.max_tokens:
                continue
            count = min(CHUNK, request.num_tokens + request.placeholders - request.num_computed_tokens)
            while not self._grow(request, count):
                victim = self.running.pop()
                self._preempt(victim)
                preempted.add(victim.request_id)
                if victim is request:
                    break
            else:
                scheduled.append((request, count))
                continue
            break
        while self.queue and not preempted:
            request = self.queue[0]
            count = min(CHUNK, request.num_tokens)
            if not self._grow(request, count):
                break
            self.queue.pop(0)
            request.status = Status.RUNNING
            self.running.append(request)
            scheduled.append((request, count))
        return scheduled, preempted

    def _grow(self, request: Request, count: int) -> bool:
        need = -(-(request.num_computed_tokens + count) // BLOCK) - len(request.blocks)
        more = self.pool.allocate(max(0, need))
        if more is None:
            return False
        request.blocks += more
        return True

    def _preempt(self, request: Request) -> None:
        self.pool.free_blocks(request.blocks)
        request.blocks = []
        request.status = Status.PREEMPTED
        request.num_computed_tokens = request.placeholders = 0
        request.epoch += 1  # what is in flight is dropped, as for engines that must deliver KV
        self.queue.insert(0, request)

    def _land(self, meta: Any, held: list[str], released: list[str], rows: list[Any]) -> None:
        done = self.worker.run(meta, released)
        for request, _, begin, count, _, blocks in rows:
            for at in range(begin, begin + count):
                blocks[at // BLOCK].slots[at % BLOCK] = (request.request_id, at)
        for request, epoch, _, count, samples, _ in rows:
            request.num_in_flight_tokens -= count
            if request.status.name.startswith("FINISHED") or request.epoch != epoch or not samples:
                continue
            request.num_output_tokens += 1
            request.placeholders -= 1
            if request.num_output_tokens == request.stops_at:
                self._finish(request, Status.FINISHED_STOPPED)
            elif request.num_output_tokens >= request.max_tokens:
                self._finish(request, Status.FINISHED_LENGTH_CAPPED)
        output = SimpleNamespace(finished_sending=done)
        self.live.updated(output, [], set(held))
        for name in output.finished_sending:
            assert not name.startswith(HOLD)
            self.pool.free_blocks(self.pinned.pop(name))

    def abort(self, name: str) -> None:
        """The client went away."""
        self._finish(self.requests[name], Status.FINISHED_ABORTED)

    def _finish(self, request: Request, status: Status) -> None:
        request.status = status
        self._untold = True
        for row in (self.running, self.queue):
            if request in row:
                row.remove(request)
        del self.requests[request.request_id]
        self.ended[request.request_id] = request
        used = request.blocks[: -(-request.num_computed_tokens // BLOCK)]
        stays, _ = self.live.finished(request, ([block.block_id for block in used],))
        if stays:
            self.pinned[request.request_id] = request.blocks
        else:
            self.pool.free_blocks(request.blocks)

    def read(self, answer: Answer, name: str) -> None:
        """Pull what an answer offers, and check that it is request ``name``'s KV."""
        assert answer.params is not None
        params: dict[str, Any] = answer.params
        (ids,) = params["remote_block_ids"]
        tokens = params["penstock_tokens"]
        assert isinstance(tokens, int)
        assert len(ids) == -(-answer.tokens // BLOCK)
        for at in range(tokens):
            assert self.pool.blocks[ids[at // BLOCK]].slots[at % BLOCK] == (name, at)
        self.worker.notified.add(str(answer.params["remote_request_id"]))
