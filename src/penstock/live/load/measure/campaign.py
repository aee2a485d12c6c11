"""Which experiments, in which order, for how long."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

from penstock.live.load.measure.probes import Probe, Row
from penstock.live.load.measure.watched import Lost

SHORTEST = 16
SHORT_CONTEXT = 32
OUTPUT = 2048
FILL = 0.8
"""Share of the KV capacity that a batch may fill, so that nothing is preempted."""
PAST_BLOCKS = (8, 32, 128)
TOGETHER = (2, 4, 8)
TOGETHER_NEW = 32
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LONG_CONTEXT = 4096
BATCH_SHARE = 0.1
"""Share of the time that the prompts of one batch of streams may take (the first time; then they are cached)."""

Run = Callable[[Probe], Awaitable[list[Row]]]


@dataclass(frozen=True)
class Limits:
    """What may be asked of the engine.

    ``batched_tokens`` is its ``max_num_batched_tokens``: a prompt of more would take several steps. ``batch`` bounds
    streams at once. ``model_len`` and ``capacity_tokens`` are None where unknown.
    """

    batched_tokens: int = 2048
    batch: int = 64
    model_len: int | None = None
    capacity_tokens: int | None = None
    block_size: int = 16

    @property
    def longest(self) -> int:
        """Prompt tokens that one step can compute."""
        sizes = [self.batched_tokens]
        sizes += [] if self.model_len is None else [self.model_len - 2]
        sizes += [] if self.capacity_tokens is None else [int(self.capacity_tokens * FILL)]
        return max(SHORTEST, min(sizes))


@dataclass(frozen=True)
class Campaign:
    """What came of it: one row an experiment (the median of its repetitions), and what went wrong."""

    rows: list[Row]
    rounds: float
    notes: list[str]


def experiments(limits: Limits, most_tokens: int) -> list[Run]:
    """All experiments, those that a short campaign must not miss first.

    ``most_tokens`` bounds the prompt tokens of a batch of streams: what the engine can prefill in a bearable time.
    """
    longest = limits.longest
    single: list[Run] = []
    for new in _ends_first(_doubling(SHORTEST, longest)):
        single += [partial(Probe.together, prompts=1, new=new, ahead=longest), partial(Probe.alone, new=new)]
    pasts: list[Run] = []
    for blocks in PAST_BLOCKS:
        past = blocks * limits.block_size
        for new in (64, 512):
            if past + new <= min(limits.model_len or 10**9, limits.capacity_tokens or 10**9) * FILL and new <= longest:
                pasts.append(partial(Probe.on_past, new=new, past=past, ahead=longest))
    several: list[Run] = [
        partial(Probe.together, prompts=n, new=TOGETHER_NEW, ahead=longest)
        for n in TOGETHER
        if n * TOGETHER_NEW <= limits.batched_tokens
    ]
    batches = _running(limits, most_tokens)
    mixed: list[Run] = []
    for i in range(max(len(group) for group in (batches, single, several, pasts))):
        mixed += [group[i] for group in (batches, single, several, pasts) if i < len(group)]
    return mixed


async def carry_out(
    probe: Probe, limits: Limits, seconds: float, progress: Callable[[float, int], None] | None = None
) -> Campaign:
    """Repeat all experiments until the time is up.

    The first round is cut short only at the time limit; what then lacks is said in the notes.

    Parameters
    ----------
    progress : callable, optional
        Called with seconds spent and rows measured, after every experiment.
    """
    start, rounds, measured = perf_counter(), 0, 0
    runs = experiments(limits, int(await _prefill_rate(probe, limits) * seconds * BATCH_SHARE))
    found: dict[tuple[int, int], list[Row]] = {}
    lost: dict[int, str] = {}
    barren: dict[int, int] = {}
    done = 0
    while True:
        for i, run in enumerate(runs):
            if perf_counter() - start >= seconds or (rounds and (i in lost or barren.get(i) == rounds)):
                continue
            try:
                rows = await run(probe)
            except Lost as problem:
                lost[i] = problem.problem
                rows = []
            for k, row in enumerate(rows):
                found.setdefault((i, k), []).append(row)
            barren[i] = barren.get(i, 0) + (not rows)
            measured, done = measured + len(rows), done + 1
            if progress is not None:
                progress(perf_counter() - start, measured)
        rounds += 1
        if perf_counter() - start >= seconds or len(lost) == len(runs):
            break
    notes = [f"{len(lost)} of {len(runs)} experiments failed, first: {next(iter(lost.values()))}"] if lost else []
    if done < len(runs):
        notes.append(f"the time was enough for {done} of {len(runs)} experiments: give more --seconds")
    return Campaign([_middle(rows) for _, rows in sorted(found.items())], done / len(runs), notes)


async def _prefill_rate(probe: Probe, limits: Limits) -> float:
    """Tokens per second; also lets the engine compile or capture what it does at the first occasion."""
    for new in (SHORTEST, limits.longest):
        await probe.first_token_s(probe.fresh(new))
    return limits.longest / await probe.first_token_s(probe.fresh(limits.longest))


def _running(limits: Limits, most_tokens: int) -> list[Run]:
    room = limits.model_len or 10**9
    runs: list[tuple[int, int]] = []
    for streams in _ends_first([*(n for n in BATCHES if n < limits.batch), limits.batch]):
        share = 10**9 if limits.capacity_tokens is None else int(limits.capacity_tokens * FILL / streams) - OUTPUT // 8
        longest = min(room // 2, share, most_tokens // streams, LONG_CONTEXT)
        for length in (SHORT_CONTEXT, longest):
            if length >= SHORT_CONTEXT and (streams, length) not in runs:
                runs.append((streams, length))
    found: list[Run] = []
    for streams, length in runs:
        output = min(OUTPUT, room - length - 1)
        if limits.capacity_tokens is not None:
            output = min(output, limits.capacity_tokens // streams - length - limits.block_size)
        room_beside = min(limits.longest, limits.batched_tokens - streams)
        news = [new for new in (64, 256, 1024) if new <= room_beside]
        if output >= 100:
            found.append(partial(Probe.running, streams=streams, length=length, output=output, news=news))
    return found


def _doubling(low: int, high: int) -> list[int]:
    """low, 2 low, 4 low, ... and high."""
    found = [low]
    while found[-1] * 2 < high:
        found.append(found[-1] * 2)
    return [*found, high] if high > low else found


def _ends_first(values: list[int]) -> list[int]:
    """The first, the last, then those between: a fit wants the ends most."""
    return values if len(values) < 3 else [values[0], values[-1], *values[1:-1][::2], *values[1:-1][1::2]]


def _middle(rows: list[Row]) -> Row:
    """The row with the median time (its context goes with it)."""
    target = median(row.seconds for row in rows)
    return min(rows, key=lambda row: abs(row.seconds - target))
