"""What a simulation hands to the reports: columns, nothing computed yet."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from penstock.workload.trace import F64, I64, Trace


class Outcome(IntEnum):
    """How a request ended; every request ends in exactly one of these."""

    UNFINISHED = 0
    FINISHED = 1
    REJECTED = 2


@dataclass(frozen=True)
class RequestColumns:
    """One row a request of the trace; times in seconds since the trace began, NaN where it never happened.

    ``decode_start_s`` is when the request joined its first decode batch. ``emitted`` counts tokens sent to the client.
    ``lateness_s`` is the most that a token after the first of a finished request came after its deadline, arrival +
    TTFT + i TPOT of the run's targets (negative: all were early; -inf: none has one); None where nobody looked.
    """

    outcome: NDArray[np.int8]
    prefill_start_s: F64
    first_token_s: F64
    decode_start_s: F64
    finish_s: F64
    emitted: I64
    prefill_instance: NDArray[np.int32]
    decode_instance: NDArray[np.int32]
    preemptions: NDArray[np.int32]
    migrations: NDArray[np.int32]
    lateness_s: F64 | None = None


@dataclass(frozen=True)
class TokenGaps:
    """Every inter-token gap of the run, compressed.

    Row ``i`` stands for ``count[i]`` consecutive steps of a batch of ``batch[i]`` requests, whose durations form the
    arithmetic progression ``first_s[i] + j * rise_s[i]``: ``batch * count`` gaps. A single gap has count = batch = 1.
    """

    first_s: F64
    rise_s: F64
    count: I64
    batch: I64


@dataclass(frozen=True)
class Migrations:
    """One row a completed migration. ``pause_s`` is the client-visible gap between two tokens around the move."""

    start_s: F64
    done_s: F64
    request: I64
    source: NDArray[np.int32]
    target: NDArray[np.int32]
    tokens: I64
    level: NDArray[np.int8]
    pause_s: F64
    reason: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flips:
    """One row a role change."""

    time_s: F64
    instance: NDArray[np.int32]
    role: NDArray[np.int8]


@dataclass(frozen=True)
class Timeline:
    """Samples at ``time_s[t]`` of each instance ``[t, i]``: resident KV tokens, running, waiting, used blocks, role."""

    time_s: F64
    resident_tokens: I64
    running: NDArray[np.int32]
    waiting: NDArray[np.int32]
    used_blocks: I64
    role: NDArray[np.int8]


@dataclass(frozen=True)
class InstanceColumns:
    """One row an instance: totals over the run; ``role`` is the one at the end (``Flips`` has the changes).

    ``energy`` is None for a run that was measured from outside. ``finetune_tokens`` counts the tokens of finished
    micro-batches; None where no instance fine-tunes.
    """

    role: NDArray[np.int8]
    capacity_blocks: I64
    block_size: I64
    busy_s: F64
    steps: I64
    prefill_tokens: I64
    decode_tokens: I64
    peak_blocks: I64
    preemptions: I64
    bytes_in: F64
    bytes_out: F64
    energy: EnergyColumns | None = None
    finetune_tokens: I64 | None = None


@dataclass(frozen=True)
class EnergyColumns:
    """What the instances drew: joules float64[n], NaN for one without a power model.

    ``idle_j`` is the part of ``energy_j`` drawn while no step ran. ``clock_mhz``, ``clock_busy_s`` and ``clock_j``,
    float64[n, levels], say at which clock the steps ran, NaN beyond an instance's levels (and MHz where it has none).
    """

    energy_j: F64
    idle_j: F64
    clock_mhz: F64
    clock_busy_s: F64
    clock_j: F64


@dataclass(frozen=True)
class SimResult:
    """A finished simulation."""

    trace: Trace
    policy: str
    requests: RequestColumns
    gaps: TokenGaps
    migrations: Migrations
    flips: Flips
    timeline: Timeline | None
    instances: InstanceColumns
    simulated_s: float
    wall_s: float
    events: int
    reject_reasons: dict[str, int]
    failed_migrations: dict[str, int]
    leases_expired: int = 0
