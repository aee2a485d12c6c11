"""What a policy sees: the requests in flight and the cluster, as the controller believes them to be.

Lives beside the policies rather than in ``control/`` because policies read it and the controller writes it, and
imports point one way only.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.core.custody import Custody
from penstock.core.events import NO_PREDICTION, InstanceUp, Load
from penstock.core.types import Role, Slo


class Stage(IntEnum):
    """Where a request is in its life. ``control.lifecycle`` says which changes are legal."""

    ARRIVED = 0
    PREFILLING = 1
    PREFILLED = 2
    TRANSFERRING = 3
    DECODING = 4
    MIGRATING = 5
    RECOMPUTING = 6
    FINISHED = 7
    REJECTED = 8
    ABORTED = 9


class RequestRecord:
    """One request in flight. ``generated`` counts tokens the client has; instances are -1 while there is none."""

    def __init__(
        self, request: int, prompt_tokens: int, slo: Slo, slo_class: int, prefix: tuple[int, ...], arrival_s: float
    ) -> None:
        self.request = request
        self.prompt_tokens = prompt_tokens
        self.slo = slo
        self.slo_class = slo_class
        self.prefix = prefix
        self.arrival_s = arrival_s
        self.stage: Stage = Stage.ARRIVED
        self.custody: Custody | None = None
        self.prefill_instance = -1
        self.decode_instance = -1
        self.planned_decode = -1
        self.migrating_to = -1
        self.prefill_estimate_s = 0.0
        self.promised_tokens = 0
        self.generated = 0
        self.movable = True
        self.in_place = False
        self.served = False
        self.first_token_s = -1.0
        self.predicted_remaining = NO_PREDICTION

    def context_tokens(self) -> int:
        """Tokens of prompt and output so far."""
        return self.prompt_tokens + self.generated


_EMPTY: NDArray[np.intp] = np.empty(0, np.intp)


class ClusterView:
    """The cluster as columns, one row an instance: a policy scores all instances in a few array operations.

    ``running``, ``waiting``, ``running_tokens``, ``free_blocks``, ``step_s`` and ``clock`` (level, -1 where there is
    none to choose) repeat the engine's latest word; the ``prefill_*``, ``pending_*`` and ``moving`` (migrations in or
    out) columns are the controller's own book of what it has ordered since. ``preemptions`` counts those since the
    rescheduler last looked.
    Rows of instances that are down keep their last values; they and the held ones are in none of the index arrays.
    """

    def __init__(self) -> None:
        # The columns are typed Any because the compiled form indexes them one element at a time.
        self.size = 0
        self.role: Any = np.empty(0, np.int8)
        self.up: Any = np.empty(0, np.bool_)
        self.held: Any = np.empty(0, np.bool_)
        self.slow: Any = np.empty(0)
        self.capacity_tokens: Any = np.empty(0)
        self.block_size: Any = np.empty(0)
        self.max_running: Any = np.empty(0)
        self.prefill_requests: Any = np.empty(0)
        self.prefill_tokens: Any = np.empty(0)
        self.prefill_estimate_s: Any = np.empty(0)
        self.pending_requests: Any = np.empty(0)
        self.pending_tokens: Any = np.empty(0)
        self.running: Any = np.empty(0)
        self.waiting: Any = np.empty(0)
        self.running_tokens: Any = np.empty(0)
        self.free_blocks: Any = np.empty(0)
        self.step_s: Any = np.empty(0)
        self.growth: Any = np.empty(0)
        self.synced_at_s: Any = np.empty(0)
        self.clock: Any = np.empty(0, np.int8)
        self.preemptions: Any = np.empty(0)
        self.moving: Any = np.empty(0)
        self.prefills: Any = _EMPTY
        self.decodes: Any = _EMPTY
        self.mixed: Any = _EMPTY
        self.everyone: Any = _EMPTY

    # -- what policies ask ------------------------------------------------------------------------------------------

    def resident_tokens(self, now_s: float, rows: Any) -> Any:
        """KV tokens of running and promised decodes on ``rows``, carried forward from the latest word to ``now_s``.

        Each running request adds one token a step, so the running part grows by ``running / step_s`` tokens/s, which
        :meth:`sync` keeps in ``growth``. ``now_s`` must not lie before the latest word.

        Parameters
        ----------
        now_s : float
        rows : intp[k]

        Returns
        -------
        float64[k]
        """
        grown = self.growth[rows] * (now_s - self.synced_at_s[rows])
        return np.rint(self.running_tokens[rows] + self.pending_tokens[rows] + grown)

    def decode_requests(self, rows: Any) -> Any:
        """Decodes running on or promised to ``rows``, float64[k]."""
        return self.running[rows] + self.pending_requests[rows]

    def index_of(self, role: Role) -> Any:
        """Instances that are up and carry ``role``, ascending, intp[k]."""
        if role == Role.PREFILL:
            return self.prefills
        return self.decodes if role == Role.DECODE else self.mixed

    # -- what the controller writes ---------------------------------------------------------------------------------

    def add(self, event: InstanceUp, now_s: float) -> None:
        """A new instance, or an old one back from the dead with nothing on it."""
        i = event.instance
        if i >= self.size:
            self._grow(i + 1)
        self.role[i] = int(event.role)
        self.up[i] = True
        self.slow[i] = 1.0
        self.capacity_tokens[i] = event.capacity_blocks * event.block_size
        self.block_size[i] = event.block_size
        self.max_running[i] = event.max_running
        self.free_blocks[i] = event.capacity_blocks
        self.synced_at_s[i] = now_s
        self.reindex()

    def remove(self, i: int) -> None:
        """An instance is gone, and with it all that was on it."""
        self.up[i] = False
        for column in (
            self.prefill_requests,
            self.prefill_tokens,
            self.prefill_estimate_s,
            self.pending_requests,
            self.pending_tokens,
            self.running,
            self.waiting,
            self.running_tokens,
            self.growth,
            self.preemptions,
            self.moving,
        ):
            column[i] = 0.0
        self.step_s[i] = np.inf
        self.reindex()

    def relabel(self, i: int, role: Role) -> None:
        """Change a role."""
        self.role[i] = int(role)
        self.reindex()

    def hold(self, i: int, held: bool) -> None:
        """Take an instance out of all placements, or back in; what runs there goes on."""
        self.held[i] = held
        self.reindex()

    def sync(self, i: int, load: Load, now_s: float) -> None:
        """Take an engine's latest word."""
        self.running[i] = load.running
        self.waiting[i] = load.waiting
        self.running_tokens[i] = load.decode_tokens
        self.free_blocks[i] = load.free_blocks
        self.clock[i] = load.clock
        decoding = load.step_s > 0.0 and load.running > 0
        self.step_s[i] = load.step_s if decoding else np.inf
        self.growth[i] = load.running / load.step_s if decoding else 0.0
        self.synced_at_s[i] = now_s

    def reindex(self) -> None:
        """Rebuild the index arrays after a role or an up/down change."""
        open_to_work = self.up & ~self.held
        self.prefills = np.flatnonzero(open_to_work & (self.role == int(Role.PREFILL)))
        self.decodes = np.flatnonzero(open_to_work & (self.role == int(Role.DECODE)))
        self.mixed = np.flatnonzero(open_to_work & (self.role == int(Role.MIXED)))
        self.everyone = np.flatnonzero(open_to_work)

    def _grow(self, size: int) -> None:
        for name in (
            "capacity_tokens",
            "block_size",
            "max_running",
            "prefill_requests",
            "prefill_tokens",
            "prefill_estimate_s",
            "pending_requests",
            "pending_tokens",
            "running",
            "waiting",
            "running_tokens",
            "growth",
            "free_blocks",
            "synced_at_s",
            "preemptions",
            "moving",
        ):
            setattr(self, name, _extended(getattr(self, name), size, 0.0))
        self.slow = _extended(self.slow, size, 1.0)
        self.step_s = _extended(self.step_s, size, np.inf)
        self.clock = _extended(self.clock, size, -1)
        self.role = _extended(self.role, size, 0)
        self.up = _extended(self.up, size, False)
        self.held = _extended(self.held, size, False)
        self.size = size


def _extended(column: Any, size: int, fill: Any) -> Any:
    out = np.full(size, fill, column.dtype)
    out[: len(column)] = column
    return out
