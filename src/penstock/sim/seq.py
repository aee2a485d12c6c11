"""A request's presence on one engine, and what an engine reports about it."""

from __future__ import annotations

from math import inf
from typing import Final

from penstock.policy.engine import Job

# What the sequence is there for.
PREFILL_ONLY: Final = 0  # compute the prompt, emit one token, keep the KV pinned for a pull
SERVE: Final = 1  # compute (or recompute) what is missing, then decode to the end
PULL: Final = 2  # reserve blocks, wait for KV from elsewhere, then decode to the end
STAGE: Final = 3  # reserve blocks and hold pulled KV, but do not decode yet (first stage of a pre-copy)
REPROMPT: Final = 4  # a re-sent prompt whose KV is here already: one short chunk, then done

# Where it is in the engine.
WAITING: Final = 0
PULLING: Final = 1
READY: Final = 2
PREFILLING: Final = 3
DECODING: Final = 4
PINNED: Final = 5
GONE: Final = 6
PAUSED: Final = 7  # left out of the step by a batching part; keeps its KV and its slot

# What an engine reports at a step boundary.
FIRST_TOKEN: Final = 0  # a prefill (or recompute, see ``Seq.resumed``) ended and a token came out
FINISHED: Final = 1
PREEMPTED: Final = 2
PULL_READY: Final = 3  # blocks are reserved: the transfer may start
JOINED: Final = 4  # pulled KV is in the decode batch from this boundary on
EXTRACTED: Final = 5  # taken out of the batch on request; KV pinned
REPROMPTED: Final = 6


class Pace:
    """How late the tokens of one request come, wherever they come from: all its ``Seq`` share it.

    Token i, from 0, is due at ``due_s + i tpot_s``. ``late_s`` is the most that any token after the first was late,
    negative where all were early. ``sent`` tokens have reached the client: one that is decoded again is not late.
    """

    def __init__(self, due_s: float, tpot_s: float, prompt_tokens: int) -> None:
        self.due_s = due_s
        self.tpot_s = tpot_s
        self.prompt_tokens = prompt_tokens
        self.sent = 0
        self.late_s = -inf

    def emit(self, before: int, steps: int, begin_s: float, first_s: float, rise_s: float) -> None:
        """``steps`` tokens follow the first ``before``, one a step; the steps from ``begin_s`` on as ``Engine`` has it.

        Their times are convex in their number and the deadlines straight: the first new one or the last is the latest.
        """
        j = max(self.sent, 1) - before + 1
        if j < 1:
            j = 1
        if before + steps > self.sent:
            self.sent = before + steps
        if j > steps or self.tpot_s == inf:
            return
        head = begin_s + j * first_s + rise_s * (0.5 * j * (j - 1)) - (before + j - 1) * self.tpot_s
        last = begin_s + steps * first_s + rise_s * (0.5 * steps * (steps - 1)) - (before + steps - 1) * self.tpot_s
        self.late_s = max(self.late_s, head - self.due_s, last - self.due_s)


class Seq:
    """One request on one engine.

    ``tokens`` is the length of the sequence (prompt and output so far) as of ``at_step`` of a decoding sequence, and
    simply the length otherwise. ``computed`` tokens of it have KV here. It ends at ``final_tokens``.
    ``last_token_s`` is when the client got the latest token (-1 before the first). ``job`` is what the engine's parts
    see of it, where there are any; ``pace`` where deadlines of tokens are watched.
    """

    def __init__(self, request: int, kind: int, tokens: int, final_tokens: int, hashes: tuple[int, ...] = ()) -> None:
        self.request = request
        self.kind = kind
        self.prompt_tokens = tokens  # what it was queued with
        self.tokens = tokens
        self.final_tokens = final_tokens
        self.hashes = hashes
        self.state: int = WAITING
        self.order = 0
        self.seen = 0  # the step boundary at which the engine's loop noticed it
        self.computed = 0
        self.blocks = 0
        self.shared: list[int] = []
        self.at_step = 0
        self.phase = 0
        self.ticket = 0  # tells its latest stay in the decode batch from earlier ones
        self.chunk = 0
        self.left_blocks = 0  # what it held when it was preempted; see Engine._still_there
        self.left_at = 0
        self.resumed = False
        self.started_s = -1.0
        self.last_token_s = -1.0
        self.job: Job | None = None
        self.pace: Pace | None = None


class Notice:
    """Something happened to a sequence at a step boundary."""

    def __init__(self, kind: int, seq: Seq) -> None:
        self.kind = kind
        self.seq = seq
