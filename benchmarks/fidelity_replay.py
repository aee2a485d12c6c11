"""A step-by-step replay of vLLM's V1 scheduler with asynchronous scheduling, to test step models against real runs.

Deliberately plain, token by token: it shares nothing with ``penstock.sim``, so it can check it. Semantics of vLLM
0.19 (``v1/core/sched/scheduler.py``, ``async_scheduler.py``, ``v1/core/block_pool.py``, ``v1/engine/core.py``):

* Running requests first, in order; then waiting ones first come first served, while token budget, ``max_num_seqs``
  and blocks last. A waiting request is admitted only if its whole sequence fits into free blocks
  (``scheduler_reserve_full_isl``). Short of a block for a running request, the last running one is thrown out to the
  front of the queue; nothing is admitted in that step.
* Freed blocks go to the end of the free list, a request's last block first, and stay findable until they are handed
  out again, so a request that was thrown out finds a part of its KV when it comes back.
* Asynchronous scheduling: while step N runs, step N + 1 is scheduled from what step N - 1 brought. A request that
  ends in step N keeps its slot and its blocks in step N + 1 but is not computed there.
* The engine looks for new requests once per turn of its loop, when a step has ended; ``queued_ts`` is that moment.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

Batch = tuple[int, int, list[int], list[int]]
"""decodes, their context, new tokens of each prefill chunk, tokens before each chunk"""


@dataclass
class Request:
    """One request and its life; times in seconds, -1 until they happen."""

    index: int
    arrival_s: float
    prompt: int
    outputs: int
    known: int = 0
    in_flight: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    running: bool = False
    queued_s: float = -1.0
    first_s: float = -1.0
    last_s: float = -1.0
    preempted: int = 0

    @property
    def tokens(self) -> int:
        """Tokens whose values are known: prompt and outputs that came back."""
        return self.prompt + self.known


class Blocks:
    """vLLM's block pool: a free list in order of use, in which old contents stay findable until handed out."""

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        # vLLM keeps block 0 for itself.
        self.free: OrderedDict[int, None] = OrderedDict((i, None) for i in range(1, count))
        self.content: dict[int, tuple[int, int]] = {}
        self.found: dict[tuple[int, int], int] = {}

    def hits(self, request: Request) -> list[int]:
        """Leading blocks of the request that are still in the pool; the last token is never taken from there."""
        blocks: list[int] = []
        for i in range((request.tokens - 1) // self.size):
            block = self.found.get((request.index, i))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def grow(self, request: Request, tokens: int) -> bool:
        """Give the request blocks for ``tokens`` tokens, or nothing if they are short."""
        need = -(-tokens // self.size) - len(request.blocks)
        if need > len(self.free):
            return False
        for _ in range(need):
            block, _ = self.free.popitem(last=False)
            old = self.content.pop(block, None)
            if old is not None:
                del self.found[old]
            request.blocks.append(block)
        return True

    def release(self, request: Request, tokens: int) -> None:
        """Take all blocks back; the full ones among the first ``tokens`` tokens stay findable."""
        for i in range(len(request.blocks) - 1, -1, -1):
            block = request.blocks[i]
            if i < tokens // self.size and block not in self.content and (request.index, i) not in self.found:
                self.content[block] = (request.index, i)
                self.found[request.index, i] = block
            self.free[block] = None
        request.blocks = []


@dataclass
class EngineConfig:
    """What of the engine's configuration matters here."""

    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    block_size: int = 16


Scheduled = list[tuple[Request, int, bool]]
"""request, new tokens, whether this step samples a token for it"""


class Scheduler:
    """One engine's scheduler."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.pool = Blocks(config.num_blocks, config.block_size)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def _take(self, request: Request, new: int, scheduled: Scheduled) -> None:
        request.computed += new
        samples = request.computed == request.tokens + request.in_flight
        if samples:
            request.in_flight += 1
        scheduled.append((request, new, samples))

    def _throw_out(self, victim: Request) -> None:
        self.pool.release(victim, min(victim.computed, victim.tokens))
        victim.computed = 0
        victim.running = False
        victim.preempted += 1
        self.waiting.appendleft(victim)

    def schedule(self) -> tuple[Scheduled, Batch]:
        """The next step."""
        budget = self.config.max_num_batched_tokens
        scheduled: Scheduled = []
        thrown_out = False
        i = 0
        while i < len(self.running) and budget > 0:
            request = self.running[i]
            i += 1
            if request.in_flight and request.computed + 2 - request.in_flight >= request.prompt + request.outputs:
                continue
            new = min(request.tokens + request.in_flight - request.computed, budget)
            if new == 0:
                continue
            fits = self.pool.grow(request, request.computed + new)
            while not fits:
                # The last in line is never before `i`, so it is not part of this step yet.
                victim = self.running.pop()
                thrown_out = True
                self._throw_out(victim)
                if victim is request:
                    break
                fits = self.pool.grow(request, request.computed + new)
            if not fits:
                break
            self._take(request, new, scheduled)
            budget -= new
        while not thrown_out and self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            request = self.waiting[0]
            hits = self.pool.hits(request)
            # Hits lie in the free list, so they count against it as well as new blocks.
            if -(-request.tokens // self.pool.size) > len(self.pool.free):
                break
            self.waiting.popleft()
            for block in hits:
                del self.pool.free[block]
            request.blocks = list(hits)
            request.computed = len(hits) * self.pool.size
            new = min(request.tokens - request.computed, budget)
            self.pool.grow(request, request.computed + new)
            request.running = True
            self.running.append(request)
            budget -= new
            self._take(request, new, scheduled)
        return scheduled, _batch(scheduled)

    def finish(self, scheduled: Scheduled, now: float) -> None:
        """The step's output is here."""
        done = False
        for request, _, samples in scheduled:
            if not samples:
                continue
            request.known += 1
            request.in_flight -= 1
            if request.known == 1:
                request.first_s = now
            if request.known == request.outputs:
                request.last_s = now
                done = True
                self.pool.release(request, request.tokens - 1)
                if not request.running:
                    self.waiting.remove(request)
                request.running = False
        if done:
            self.running = [r for r in self.running if r.last_s < 0.0]


def _batch(scheduled: Scheduled) -> Batch:
    decodes, context = 0, 0
    chunk_new: list[int] = []
    chunk_past: list[int] = []
    for request, new, _ in scheduled:
        if new == 1:
            decodes += 1
            context += request.computed
        else:
            chunk_new.append(new)
            chunk_past.append(request.computed - new)
    return decodes, context, chunk_new, chunk_past


def replay(
    requests: list[Request],
    config: EngineConfig,
    group_step_s: Callable[[list[Batch]], float],
    engines: int = 1,
    observe: Callable[[float, float, list[Batch]], None] | None = None,
) -> list[Request]:
    """Serve ``requests`` (sorted by arrival) on ``engines`` engines that step together; times are filled in.

    With more than one engine a request goes to the one with the lowest ``4 * waiting + running`` by counts that are
    refreshed every 100 ms and raised by the front end's own choices in between (vLLM's data-parallel balancing).
    ``observe`` gets (start, end, batches) of each step.
    """
    ranks = [Scheduler(config) for _ in range(engines)]
    counts = [[0, 0] for _ in ranks]
    counted_at = -1.0
    inbox: list[deque[Request]] = [deque() for _ in ranks]
    now, gpu_free, next_request = 0.0, 0.0, 0
    in_flight: deque[tuple[list[Scheduled], float]] = deque()
    while next_request < len(requests) or in_flight or any(s.running or s.waiting for s in ranks) or any(inbox):
        while next_request < len(requests) and requests[next_request].arrival_s <= now:
            request = requests[next_request]
            next_request += 1
            if request.arrival_s - counted_at >= 0.1:
                counts = [[len(s.waiting), len(s.running)] for s in ranks]
                counted_at = request.arrival_s
            target = min(range(engines), key=lambda e: 4 * counts[e][0] + counts[e][1])
            counts[target][0] += 1
            inbox[target].append(request)
        plans = []
        for scheduler, box in zip(ranks, inbox, strict=True):
            while box:
                request = box.popleft()
                request.queued_s = max(now, request.arrival_s)
                scheduler.waiting.append(request)
            plans.append(scheduler.schedule())
        if any(plan for plan, _ in plans):
            batches = [batch for _, batch in plans]
            start = max(now, gpu_free)
            gpu_free = start + group_step_s(batches)
            in_flight.append(([plan for plan, _ in plans], gpu_free))
            if observe is not None:
                observe(start, gpu_free, batches)
            if len(in_flight) < 2:
                continue
        if in_flight:
            done, now = in_flight.popleft()
            for scheduler, plan in zip(ranks, done, strict=True):
                scheduler.finish(plan, now)
        elif next_request < len(requests):
            now = max(now, requests[next_request].arrival_s)
    return requests
