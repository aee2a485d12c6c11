"""What the controller tells the world to do. An action is an order, not a hope: the world answers with events."""

from __future__ import annotations

import msgspec

from penstock.core.types import MigrationLevel, Role


class Action(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Base of all actions."""


class Prefill(Action, frozen=True, tag=True, gc=False):
    """Compute the prompt (and anything generated so far) on ``instance`` and pin the KV there."""

    request: int
    instance: int


class Decode(Action, frozen=True, tag=True, gc=False):
    """Decode on ``instance``, pulling the KV from where it is pinned; no transfer if it is pinned right there."""

    request: int
    instance: int


class Serve(Action, frozen=True, tag=True, gc=False):
    """Prefill and decode in place on ``instance``, as a plain vLLM replica does."""

    request: int
    instance: int


class Migrate(Action, frozen=True, tag=True, gc=False):
    """Move a running decode with its KV."""

    request: int
    source: int
    target: int
    level: MigrationLevel
    reason: str


class Flip(Action, frozen=True, tag=True, gc=False):
    """Relabel an instance. Running work stays; nothing is drained (Arrow v2, section 5.2)."""

    instance: int
    role: Role
    reason: str


class Reject(Action, frozen=True, tag=True, gc=False):
    """Refuse a request. ``reason`` is a member of :class:`penstock.policy.parts.Refusal`."""

    request: int
    reason: str


AnyAction = Prefill | Decode | Serve | Migrate | Flip | Reject
