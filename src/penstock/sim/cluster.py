"""What is simulated: the instances, their links, and what goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from penstock.core.errors import PenstockError
from penstock.core.types import MigrationLevel, Role
from penstock.perf.energy import ClockLevel, PowerModel
from penstock.perf.sm_share import SATURATION
from penstock.perf.step import StepModel


@dataclass(frozen=True)
class InstanceSpec:
    """One engine replica.

    ``capacity_blocks`` blocks of ``block_size`` tokens hold KV; ``max_num_seqs`` and ``max_num_batched_tokens`` are
    vLLM's; ``link_bytes_per_s`` is the bandwidth of its link, each way. ``restart_evicted`` makes an evicted request
    start over from its prompt, as queueing models assume (WAIT, section 2); vLLM computes its KV again and goes on.
    ``async_scheduling``, ``prefix_caching`` and ``chunked_prefill`` are vLLM's options (see ``sim.engine``); the second
    finds what prompts share where the trace has hashes, and what is left of a preempted request's KV.
    ``clocks`` are the levels that a policy's ``Clock`` may choose from, ascending; ``step_model`` is that of the
    highest, at which the instance runs without one. ``power`` is of the whole instance; without it joules are unknown.
    Where a policy divides the GPU, ``sm_saturation`` is the share of the SMs that draws all the memory bandwidth, and
    ``shared_bandwidth`` the share of it that two parts reach together.
    """

    role: Role
    step_model: StepModel
    capacity_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    link_bytes_per_s: float = 25e9
    restart_evicted: bool = False
    async_scheduling: bool = False
    prefix_caching: bool = True
    chunked_prefill: bool = True
    clocks: tuple[ClockLevel, ...] = ()
    power: PowerModel | None = None
    sm_saturation: float = SATURATION
    shared_bandwidth: float = 1.0

    def __post_init__(self) -> None:
        if self.capacity_blocks < 1 or self.block_size < 1 or self.link_bytes_per_s <= 0:
            raise PenstockError("an instance needs at least one KV block and a link", "check capacity and bandwidth")
        if any(a.mhz >= b.mhz for a, b in zip(self.clocks, self.clocks[1:], strict=False)):
            raise PenstockError("the clock levels do not rise", "list each clock once, the lowest first")
        if not 1 <= self.max_num_seqs <= self.max_num_batched_tokens:
            raise PenstockError(
                f"max_num_seqs {self.max_num_seqs} must be between 1 and max_num_batched_tokens "
                f"{self.max_num_batched_tokens}",
                "every running request needs one token of the batch budget",
            )

    @property
    def capacity_tokens(self) -> int:
        """Tokens whose KV fits."""
        return self.capacity_blocks * self.block_size


@dataclass(frozen=True)
class ClusterSpec:
    """The instances and what joins them.

    ``handshake_s`` is paid at the first transfer between two instances (0.1 to 0.4 s with NIXL, vLLM notes), unless
    they were connected beforehand, which is the default here because ``penstock serve`` does so.
    """

    instances: tuple[InstanceSpec, ...]
    kv_bytes_per_token: float
    link_latency_s: float = 1e-3
    handshake_s: float = 0.0
    lease_s: float = 30.0
    migration_level: MigrationLevel = MigrationLevel.PRECOPY


class FaultKind(StrEnum):
    """What can happen to an instance."""

    DOWN = "down"
    UP = "up"
    SLOW = "slow"


@dataclass(frozen=True)
class Fault:
    """An injected event: at ``time_s``, instance ``instance`` goes down, comes up, or runs ``factor`` times slower."""

    time_s: float
    instance: int
    kind: FaultKind
    factor: float = 1.0


@dataclass(frozen=True)
class ForcedMove:
    """An injected migration, whatever the policy thinks (tests, and ``penstock ctl migrate`` live)."""

    time_s: float
    request: int
    target: int


class LengthSource(Protocol):
    """What stands in for the engine's length predictor: a guess at the remaining tokens of a request."""

    def remaining(self, request: int, true_remaining: int, generated: int) -> float:
        """Predicted remaining tokens, given the truth (which only the simulator knows)."""
        ...


@dataclass(frozen=True)
class Scenario:
    """Everything about a run that is neither the trace nor the policy.

    Attributes
    ----------
    noise : float
        Standard deviation of the log of a step's duration, redrawn every 64 steps of an instance (0 = none).
    sample_s : float or None
        Sample the timeline this often (seconds of simulated time); None samples nothing.
    until_s : float or None
        Stop at this time; what is unfinished is reported as such.
    stepping : bool
        Take every step (the oracle), instead of leaping.
    deadlines : bool
        Note how late each request's tokens come (``RequestColumns.lateness_s``).
    """

    seed: int = 0
    noise: float = 0.0
    sample_s: float | None = None
    until_s: float | None = None
    stepping: bool = False
    deadlines: bool = False
    faults: Sequence[Fault] = field(default=())
    forced_moves: Sequence[ForcedMove] = field(default=())
