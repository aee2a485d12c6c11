"""The experiments: each makes an engine take steps of a known shape and times them from outside.

A step is timed as the time between two tokens that it lies between, so that what HTTP, tokenizer and front end add
drops out. Running streams make decode steps: the gap between their tokens. A prompt that arrives among running streams
makes one mixed step: the gap that ends when its first token comes. Prompts that arrive while a long one is computed
are prefilled together in the step after it: the time from its first token to theirs. A prompt alone gives the time
to the first token with everything; what that has more than its step is what the front end adds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import msgspec
import numpy as np

from penstock.live.http.client import HttpClient
from penstock.live.load.dialect import Dialect, Wishes, common
from penstock.live.load.endpoint import Endpoint
from penstock.live.load.measure.facts import Facts, counter
from penstock.live.load.measure.watched import Watched
from penstock.live.load.prompts import Pool, mix

PATIENCE_S = 120.0
WINDOW = 8
"""Decode steps are timed in windows of so many, so that chunks of several tokens do no harm."""
WINDOWS = 4
SETTLE = 3
"""Tokens of a batch that are not used, after the last stream has joined."""
SPREAD_S, SPREAD = 1e-3, 0.1
"""First tokens that are further apart than this, or this share of the step, did not come from one step."""
BEGUN_S = 2e-3
"""After this the engine has begun with what was sent to it when it was idle."""
OVERLAP_S = 3e-3
"""Prompts sent with less than this to go before the step ahead of them ended may have missed the next one."""
SHORTEST_S = 3e-4
"""Tokens closer together than this came from one step."""
REPEATS = 3
"""Tries of everything that is a single step, for the one in the middle: one try is at the mercy of a hiccup."""
ALONE, PREFILL, TOGETHER, ON_PAST = "alone", "prefill", "prompts together", "prefill on past"
HITS = "vllm:prefix_cache_hits_total"


class Row(msgspec.Struct, frozen=True):
    """A measured step: decodes, their KV tokens, new and past tokens of every prompt chunk, seconds."""

    kind: str
    decodes: int
    context: int
    chunk_new: tuple[int, ...]
    chunk_past: tuple[int, ...]
    seconds: float


@dataclass
class Probe:
    """Runs experiments on one engine; every prompt is new to it unless said otherwise."""

    client: HttpClient
    at: Endpoint
    wishes: Wishes
    dialect: Dialect
    facts: Facts
    pool: Pool
    salt: int
    count: int = field(default=0)

    def fresh(self, length: int) -> list[int]:
        """A prompt that was never sent."""
        self.count += 1
        return self.numbered(self.count, length)

    def numbered(self, number: int, length: int) -> list[int]:
        """A prompt that begins as all of this number do."""
        ids: list[int] = self.pool.cut(mix(self.salt, number), length).tolist()
        return ids

    def send(self, prompt: list[int], output: int, **more: object) -> Watched:
        """Send a request; returns at once."""
        content = common(self.wishes, self.dialect.ids) | {"prompt": prompt, "max_tokens": output, "stream": True}
        body = msgspec.json.encode(content | more)
        watched = Watched()
        watched.call = self.client.open(self.at.origin, "POST", self.at.path, watched, self.at.headers, body)
        return watched

    async def first_token_s(self, prompt: list[int], **more: object) -> float:
        """Seconds to the first token of a request that ends with it."""
        watched = self.send(prompt, 1, **more)
        try:
            await watched.tokens(1, PATIENCE_S)
            await watched.tokens(0, PATIENCE_S)
        finally:
            watched.stop()
        return watched.times_s[0] - watched.sent_s

    async def alone(self, new: int) -> list[Row]:
        """One prompt on an idle engine, front end and round trip included."""
        times = [await self.first_token_s(self.fresh(new)) for _ in range(REPEATS)]
        return [Row(ALONE, 0, 0, (new,), (0,), median(times))]

    async def together(self, prompts: int, new: int, ahead: int) -> list[Row]:
        """``prompts`` new prompts in one step, behind one of ``ahead`` tokens; nothing where that cannot be told."""
        tries = [await self._behind([self.fresh(new) for _ in range(prompts)], ahead) for _ in range(REPEATS)]
        kind = PREFILL if prompts == 1 else TOGETHER
        return [Row(kind, 0, 0, (new,) * prompts, (0,) * prompts, median(s)) for s in _some(tries)]

    async def on_past(self, new: int, past: int, ahead: int) -> list[Row]:
        """One prompt whose beginning (whole blocks) is in the prefix cache; nothing where that cannot be seen."""
        tries = []
        for _ in range(REPEATS):
            prompt = self.fresh(past + new)
            await self.first_token_s(prompt[:past])
            before = await counter(self.client, self.at, HITS)
            seconds = await self._behind([prompt], ahead)
            after = await counter(self.client, self.at, HITS)
            if before is None or after is None or after - before != past:
                return []
            tries.append(seconds)
        return [Row(ON_PAST, 0, 0, (new,), (past,), median(s)) for s in _some(tries)]

    async def _behind(self, prompts: list[list[int]], ahead: int) -> float | None:
        """Seconds of the step that prefills the prompts, which are sent while a long one is computed."""
        blocker = self.send(self.fresh(ahead), 1)
        await asyncio.sleep(BEGUN_S)
        some = [self.send(prompt, 1) for prompt in prompts]
        try:
            for watched in (blocker, *some):
                await watched.tokens(1, PATIENCE_S)
            for watched in (blocker, *some):
                await watched.tokens(0, PATIENCE_S)
        finally:
            for watched in (blocker, *some):
                watched.stop()
        start, firsts = blocker.times_s[0], [watched.times_s[0] for watched in some]
        seconds, apart = max(firsts) - start, max(firsts) - min(firsts)
        in_time = start - some[-1].sent_s > self.facts.round_trip_s + OVERLAP_S
        if not in_time or seconds < SHORTEST_S or apart > max(SPREAD_S, SPREAD * seconds):
            return None
        return seconds

    async def running(self, streams: int, length: int, output: int, news: Sequence[int]) -> list[Row]:
        """Decode steps of ``streams`` requests, then mixed steps with a prompt of each length of ``news``.

        The prompts, of ``length`` tokens, are the same ones every time, so that the prefix cache spares their prefill.
        """
        some = [self.send(self.numbered(-1 - i, length), output) for i in range(streams)]
        try:
            for watched in some:
                await watched.tokens(1, PATIENCE_S)
            rows = [await self._decode(some, length)]
            for new in news:
                several = [await self._mixed(some, length, new) for _ in range(REPEATS)]
                rows.append(sorted(several, key=lambda row: row.seconds)[REPEATS // 2])
        finally:
            for watched in some:
                watched.stop()
        # The engine may be in a step with what was broken off; this ends after it.
        await self.first_token_s(self.fresh(1))
        # Tokens that came in one piece with those before them tell nothing.
        return [row for row in rows if row.seconds >= SHORTEST_S]

    async def _decode(self, some: list[Watched], length: int) -> Row:
        starts = [len(watched.times_s) + SETTLE for watched in some]
        steps = WINDOW * WINDOWS
        await _all(some, [start + steps + 1 for start in starts])
        gaps = []
        for watched, start in zip(some, starts, strict=True):
            marks = np.array(watched.times_s)[start : start + steps + 1 : WINDOW]
            gaps += (np.diff(marks) / WINDOW).tolist()
        # The step that makes token k (from 0) reads the prompt and k tokens; k is on average in the middle.
        context = sum(length + start + (steps + 1) / 2 for start in starts)
        return Row("decode", len(some), round(context), (), (), median(gaps))

    async def _mixed(self, some: list[Watched], length: int, new: int) -> Row:
        prompt = self.fresh(new)
        await _all(some, [len(watched.times_s) + SETTLE for watched in some])
        newcomer = self.send(prompt, 1)
        try:
            await newcomer.tokens(1, PATIENCE_S)
            end_s = newcomer.times_s[0]
            await _all(some, [len(watched.times_s) + 1 for watched in some])
        finally:
            newcomer.stop()
        gaps, context = [], 0
        for watched in some:
            times = np.array(watched.times_s)
            at = int(np.argmin(np.abs(times - end_s)))
            gaps.append(float(times[at] - times[at - 1]))
            context += length + at
        return Row("mixed", len(some), context, (new,), (0,), median(gaps))


def _some(tries: list[float | None]) -> list[list[float]]:
    """The tries that told something, as one list; no list where none did."""
    told = [seconds for seconds in tries if seconds is not None]
    return [told] if told else []


async def _all(some: list[Watched], counts: list[int]) -> None:
    """Wait until every stream has so many tokens."""
    for watched, count in zip(some, counts, strict=True):
        await watched.tokens(count, PATIENCE_S)
