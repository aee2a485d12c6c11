"""The decisions a policy is made of, one small class each.

A part reads the :class:`~penstock.policy.view.ClusterView` and the request and answers; it never changes them. State
of its own (a round-robin counter, a cooldown) is its own business, as long as the same questions in the same order
get the same answers. Parts of different papers combine, because each answers one question only.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

from penstock.core.events import Event, Tick
from penstock.core.types import MigrationLevel, Role
from penstock.perf.energy import ClockLevel
from penstock.perf.step import StepModel
from penstock.perf.tuning import Profiler
from penstock.policy.engine import EngineKit
from penstock.policy.view import ClusterView, RequestRecord


class Refusal(StrEnum):
    """Why a request is refused. Data, so that clients, metrics and reports say the same."""

    NO_INSTANCE = "no instance with a fitting role is up"
    TOO_LONG = "prompt does not fit in the KV cache of any instance"
    QUEUE_FULL = "queue is full"
    SLO_UNREACHABLE = "SLO cannot be met any more"


class Beliefs(msgspec.Struct, frozen=True):
    """What a policy believes things cost. The simulator's truth may differ; that is the point.

    ``step`` predicts step times; ``kv_bytes_per_token`` and ``link_bytes_per_s`` predict transfers (seconds =
    ``link_latency_s`` + bytes / bandwidth). ``clocks`` are the clock levels with a step model each, ascending; empty
    where there are none to choose from. ``tuning`` times decode beside fine-tuning; None where it cannot be known.
    """

    step: StepModel
    kv_bytes_per_token: float
    link_bytes_per_s: float
    link_latency_s: float = 0.0
    max_batched_tokens: int = 8192
    clocks: tuple[ClockLevel, ...] = ()
    tuning: Profiler | None = None

    def prefill_s(self, prompt_tokens: int) -> float:
        """Seconds to prefill one prompt alone, in chunks of the batch budget."""
        total, done = 0.0, 0
        while done < prompt_tokens:
            chunk = min(self.max_batched_tokens, prompt_tokens - done)
            total += self.step.step_s(0, 0, [chunk], [done])
            done += chunk
        return total

    def decode_step_s(self, requests: int, tokens: int) -> float:
        """Seconds of one pure decode step of ``requests`` that read ``tokens`` of KV together."""
        return self.step.step_s(requests, tokens, [], [])

    def transfer_s(self, tokens: int) -> float:
        """Seconds to move the KV of ``tokens`` over an idle link."""
        return self.link_latency_s + tokens * self.kv_bytes_per_token / self.link_bytes_per_s


class Choice:
    """An instance, and whether it meets the part's own test (SLO, capacity). -1 means there is none at all.

    :meth:`wait` answers "not now": the request stays with the controller, which asks again, first come first served
    within its SLO class, whenever room may have come.
    """

    def __init__(self, instance: int, fits: bool = True) -> None:
        self.instance = instance
        self.fits = fits
        self.waits = False

    @staticmethod
    def wait() -> Choice:
        """No instance now. After its prefill a request must not wait longer than its KV's lease."""
        choice = Choice(-1, False)
        choice.waits = True
        return choice


class Part:
    """Base of all parts.

    ``observe`` sees every event after the view has been updated, if ``observes`` is set. ``estimates`` asks the
    controller to keep ``prefill_estimate_s`` (believed seconds of prefill work) in the view.
    """

    observes = False
    estimates = False

    def observe(self, event: Event, view: ClusterView, now_s: float) -> None:
        """Take note of an event (history of lengths, measured intervals)."""

    def forget(self, request: int, now_s: float) -> None:
        """A request has left where it was: it has ended, was refused, or its KV is lost and it is placed anew.

        Told after :meth:`observe`, but before a new placement; only to parts that observe.
        """

    def adopt(self, request: RequestRecord, instance: int, now_s: float) -> None:
        """A request was placed on an instance under another policy, before this one was chosen."""


class Admission(Part):
    """May this request come in?"""

    def refuse(self, request: RequestRecord, view: ClusterView, now_s: float) -> Refusal | None:
        """Return a reason to refuse, or None to admit. The default admits all."""
        return None


class PrefillPlacement(Part):
    """Which instance prefills this request? In a mixed policy: which instance serves it?

    One write is allowed: ``request.planned_decode``, for policies that choose both instances on arrival (xLLM).
    """

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """Choose when the request arrives (or must be computed again after a failure)."""
        raise NotImplementedError


class WaitingRoom(Part):
    """In which order are requests that a prefill placement told to wait asked again? Without one: first come first
    served within each SLO class.
    """

    def enter(self, request: RequestRecord) -> None:
        """A request must wait."""
        raise NotImplementedError

    def leave(self, request: RequestRecord) -> None:
        """It has been placed, or is gone."""
        raise NotImplementedError

    def order(self, view: ClusterView, now_s: float) -> list[RequestRecord]:
        """Who is asked now, in this order until the first that must go on waiting. Empty: nobody has a chance."""
        raise NotImplementedError

    def hopeless(self, view: ClusterView, now_s: float) -> list[RequestRecord]:
        """Who is to be refused now. Asked with :meth:`order`; the default refuses nobody."""
        return []


class DecodePlacement(Part):
    """Which instance decodes this request?"""

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """Choose at the end of the prefill; ``request.prefill_instance`` holds the KV."""
        raise NotImplementedError


class Move(msgspec.Struct, frozen=True, gc=False):
    """A running decode that should go elsewhere, and why."""

    request: int
    source: int
    target: int
    reason: str


class Running:
    """The running decodes at a tick, as columns: int64[n] ids, instances, context; float64[n] predicted remaining.

    Requests that are already moving are not in it. ``predicted`` is ``NO_PREDICTION`` where the world has none.
    """

    def __init__(self, requests: Any, instances: Any, prompt: Any, generated: Any, predicted: Any) -> None:
        self.requests = requests
        self.instances = instances
        self.prompt = prompt
        self.generated = generated
        self.predicted = predicted


class Rescheduler(Part):
    """Which running decodes should move? Asked every ``interval_s`` seconds."""

    interval_s = 0.5

    def moves(self, running: Running, view: ClusterView, now_s: float) -> list[Move]:
        """Return the moves to start now."""
        raise NotImplementedError


class RoleChange(msgspec.Struct, frozen=True, gc=False):
    """An instance that should change its role, and why."""

    instance: int
    role: Role
    reason: str


class Roles(Part):
    """Which instance plays which role?"""

    interval_s = 1.0

    def relieve(self, phase: Role, request: RequestRecord, view: ClusterView, now_s: float) -> RoleChange | None:
        """No instance of ``phase`` met the placement's test: flip one towards it? Asked before the work is placed."""
        return None

    def review(self, event: Tick, view: ClusterView, now_s: float) -> list[RoleChange]:
        """Periodic review, every ``interval_s`` seconds."""
        return []

    def after(self, event: Event, view: ClusterView, now_s: float) -> list[RoleChange]:
        """Change of roles right after an event (asked only if ``observes`` is set)."""
        return []


class Policy:
    """A composition of parts. ``decode=None`` serves in place (no disaggregation).

    ``engine`` holds what acts inside the engines; the live world leaves their queues and batches to vLLM.
    """

    def __init__(
        self,
        name: str,
        prefill: PrefillPlacement,
        decode: DecodePlacement | None = None,
        admission: Admission | None = None,
        rescheduler: Rescheduler | None = None,
        roles: Roles | None = None,
        migration_level: MigrationLevel | None = None,
        observers: tuple[Part, ...] = (),
        engine: EngineKit | None = None,
        room: WaitingRoom | None = None,
    ) -> None:
        self.name = name
        self.prefill = prefill
        self.decode = decode
        self.admission = admission
        self.rescheduler = rescheduler
        self.roles = roles
        self.migration_level = migration_level
        self.engine = engine
        self.room = room
        parts = [prefill, decode, admission, rescheduler, roles, room, *observers]
        seen: list[Part] = []
        for part in parts:
            if part is not None and part.observes and not any(part is s for s in seen):
                seen.append(part)
        self.observers = seen
        self.estimates = any(p is not None and p.estimates for p in parts)

    def tick_s(self) -> float | None:
        """Seconds between the ticks this policy needs; None if it needs none."""
        wanted = [p.interval_s for p in (self.rescheduler, self.roles) if p is not None]
        return min(wanted) if wanted else None
