"""What the world tells the controller. Every event says all that the controller may know: it has no other eyes.

Events are frozen structs, so a log of them is a complete input: ``penstock replay`` feeds it to the same controller
and gets the same actions. Times are not part of an event; the world passes ``now`` (seconds) beside it.
"""

from __future__ import annotations

import msgspec

from penstock.core.types import MigrationLevel, Role, Slo

NO_PREDICTION = -1.0
"""Value of a predicted length where the world has no predictor."""


class Load(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One instance as its engine sees itself at the moment of an event.

    ``decode_tokens`` are the KV tokens of running decodes; ``free_blocks`` counts blocks neither used nor pinned;
    ``step_s`` is the duration of the latest step (0 when idle); ``clock`` the clock level (0 is the lowest), -1 where
    there is none to choose.
    """

    running: int
    waiting: int
    decode_tokens: int
    free_blocks: int
    step_s: float
    clock: int = -1


class Event(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Base of all events."""


class RequestArrived(Event, frozen=True, tag=True, gc=False):
    """A request is at the door. ``prefix`` holds hashes of its leading prompt blocks where the source has them.

    ``movable`` is False where a running decode has state that cannot be carried elsewhere; ``in_place`` asks for one
    instance to do both phases, because even the KV after the prefill cannot be handed over.
    """

    request: int
    prompt_tokens: int
    slo: Slo
    slo_class: int = 0
    prefix: tuple[int, ...] = ()
    movable: bool = True
    in_place: bool = False


class PrefillDone(Event, frozen=True, tag=True, gc=False):
    """The first token is out; the KV is pinned on ``instance`` until it is pulled or the lease runs out.

    ``prompt_tokens`` is the exact length of the prompt where the arrival could only estimate it, else 0.
    """

    request: int
    instance: int
    load: Load
    predicted_remaining: float = NO_PREDICTION
    prompt_tokens: int = 0


class DecodeStarted(Event, frozen=True, tag=True, gc=False):
    """The KV has arrived (or was there already) and the request has joined the decode batch of ``instance``."""

    request: int
    instance: int
    load: Load


class Finished(Event, frozen=True, tag=True, gc=False):
    """The request has all its tokens; its KV is free."""

    request: int
    instance: int
    generated: int
    load: Load


class Aborted(Event, frozen=True, tag=True, gc=False):
    """The client went away."""

    request: int


class Preempted(Event, frozen=True, tag=True, gc=False):
    """``instance`` ran out of blocks and threw the request's KV away; it will recompute it there."""

    request: int
    instance: int
    load: Load


class MigrationDone(Event, frozen=True, tag=True, gc=False):
    """The request decodes on ``target`` now and its KV on ``source`` is free."""

    request: int
    source: int
    target: int
    source_load: Load
    target_load: Load


class MigrationFailed(Event, frozen=True, tag=True, gc=False):
    """The move came to nothing; the request is where it was, or lost with its instance."""

    request: int
    source: int
    target: int
    reason: str


class Interrupted(Event, frozen=True, tag=True, gc=False):
    """The engine dropped one request but lives on; ``generated`` tokens have reached the client. It starts again."""

    request: int
    instance: int
    generated: int
    reason: str


class InstanceHeld(Event, frozen=True, tag=True, gc=False):
    """An operator drains an instance (``held``) or gives it back: it keeps what runs there and gets nothing new."""

    instance: int
    held: bool


class FlipOrdered(Event, frozen=True, tag=True, gc=False):
    """An operator wants another role for an instance."""

    instance: int
    role: Role


class PolicyChosen(Event, frozen=True, tag=True, gc=False):
    """An operator wants another policy from now on: a preset's name and its options as text."""

    policy: str
    options: dict[str, str] = {}


class MoveOrdered(Event, frozen=True, tag=True, gc=False):
    """An operator (or a test) wants a running decode on ``target``, or anywhere else (-1); ignored if it cannot move
    now.
    """

    request: int
    target: int
    reason: str = "ordered"


class InstanceUp(Event, frozen=True, tag=True, gc=False):
    """An instance is ready. ``capacity_blocks`` blocks of ``block_size`` tokens hold its KV."""

    instance: int
    role: Role
    capacity_blocks: int
    block_size: int
    max_running: int
    migration_levels: tuple[MigrationLevel, ...] = ()


class InstanceDown(Event, frozen=True, tag=True, gc=False):
    """An instance is gone with everything on it. ``lost`` requests must go elsewhere; ``generated[i]`` tokens of
    ``lost[i]`` have reached the client.
    """

    instance: int
    lost: tuple[int, ...] = ()
    generated: tuple[int, ...] = ()


class InstanceSlow(Event, frozen=True, tag=True, gc=False):
    """An instance runs ``factor`` times slower than its profile (1 = recovered)."""

    instance: int
    factor: float


class Tick(Event, frozen=True, tag=True, gc=False):
    """Time to reconsider. Columns, one row a running decode: id, tokens generated, predicted remaining tokens.

    ``loads[i]`` belongs to instance ``instances[i]``.
    """

    instances: tuple[int, ...]
    loads: tuple[Load, ...]
    requests: tuple[int, ...]
    generated: tuple[int, ...]
    predicted_remaining: tuple[float, ...]
