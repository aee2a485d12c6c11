"""What the admin API takes and gives, as types. Times in seconds; instances and requests by number and name."""

from __future__ import annotations

import msgspec


class Refused(Exception):
    """An operator's order that is not carried out: HTTP ``status``, what is wrong, what to do."""

    def __init__(self, status: int, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.status = status
        self.problem = problem
        self.remedy = remedy


class Problem(msgspec.Struct, frozen=True):
    """Body of every answer that is no success."""

    error: str
    remedy: str = ""


# -- orders -----------------------------------------------------------------------------------------------------------


class Wait(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whether to answer at the end, or after ``timeout_s`` at the latest; ``force`` overrides what would be refused."""

    wait: bool = False
    timeout_s: float = 60.0
    force: bool = False


class MigrateOrder(Wait, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``to`` is an instance; None leaves the choice to the policy."""

    to: int | None = None


class FlipOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``role`` is prefill, decode or mixed."""

    role: str
    force: bool = False


class AttachOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A server that runs already, and its role."""

    url: str
    role: str


class PolicyOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A preset and its options, as numbers or text."""

    name: str
    options: dict[str, str | float] = {}


# -- answers ----------------------------------------------------------------------------------------------------------


class InstanceRow(msgspec.Struct, frozen=True):
    """One instance. ``remaining`` requests still need it; ``draining`` says that they are being moved away.

    ``plugin`` is what its plugin offers, empty where it has none; ``waiting`` and ``preemptions`` (since the engine
    started) are known from a plugin only.
    """

    instance: int
    url: str
    role: str
    health: str
    down_reason: str
    held: bool
    draining: bool
    remaining: int
    decodes: int
    prefills: int
    kv_tokens: int
    kv_capacity_tokens: int
    inter_token_s: float
    migration: str
    model: str
    version: str
    plugin: list[str] = []
    predictor: str = ""
    waiting: int = 0
    preemptions: int = 0


class InstanceList(msgspec.Struct, frozen=True):
    """Every attached instance."""

    instances: list[InstanceRow]


class RequestRow(msgspec.Struct, frozen=True):
    """One request. ``number`` is the controller's (-1: it still waits at the door), ``instance`` None for none.

    ``why_not`` says why it cannot be moved now, where ``movable`` is False.
    """

    id: str
    number: int
    stage: str
    instance: int | None
    prompt_tokens: int
    generated: int
    max_tokens: int | None
    movable: bool
    why_not: str
    moving_to: int | None
    moves: int
    age_s: float
    slo_class: str


class RequestList(msgspec.Struct, frozen=True):
    """The oldest of ``total`` requests that were asked for."""

    total: int
    requests: list[RequestRow]


class CustodyRow(msgspec.Struct, frozen=True):
    """KV of ``tokens`` tokens pinned on ``instance``, to be pulled within ``use_within_s``; both times may be over."""

    id: str
    number: int
    instance: int
    tokens: int
    used: bool
    age_s: float
    use_within_s: float
    lease_left_s: float


class CustodyList(msgspec.Struct, frozen=True):
    """Every claim whose KV may still be pinned."""

    claims: list[CustodyRow]


class Counters(msgspec.Struct, frozen=True):
    """Since the gateway started."""

    requests: dict[str, int]
    migrations_done: int
    migrations_rolled_back: int
    rollback_reasons: dict[str, int]
    flips: int
    fences: int
    engine_errors: int
    refused_at_door: int
    claims_issued: int
    leases_expired: int
    protocol_errors: int


class StatusAnswer(msgspec.Struct, frozen=True):
    """The gateway at a glance. ``tick_s`` is None where the policy needs no ticks."""

    penstock: str
    model: str
    policy: str
    tick_s: float | None
    uptime_s: float
    instances_up: int
    instances: int
    in_flight: int
    parked: int
    queued: int
    max_inflight: int
    claims: int
    counters: Counters


class MigrateAnswer(msgspec.Struct, frozen=True):
    """``outcome``: ``started`` (not waited for), ``moving`` (not over in time), ``done``, ``rolled back`` or ``over``
    (the request ended, or lost its instance); ``reason`` for the latter two.
    """

    id: str
    source: int
    target: int
    outcome: str
    reason: str = ""
    seconds: float = 0.0


class Blocker(msgspec.Struct, frozen=True):
    """A request that a drain waits for, and why."""

    id: str
    stage: str
    why: str


class HoldAnswer(msgspec.Struct, frozen=True):
    """How far a drain (or detach) is; ``waiting_for`` names the first few of ``remaining`` requests."""

    instance: int
    held: bool
    health: str
    draining: bool
    drained: bool
    remaining: int
    moved: int
    waiting_for: list[Blocker] = []


class FlipAnswer(msgspec.Struct, frozen=True):
    """A role before and after."""

    instance: int
    before: str
    role: str
    notes: list[str] = []


class AttachAnswer(msgspec.Struct, frozen=True):
    """The number that the instance has got."""

    instance: int
    url: str
    role: str


class PolicyAnswer(msgspec.Struct, frozen=True):
    """The policy before and now; ``options`` as given."""

    before: str
    policy: str
    options: dict[str, str]
    tick_s: float | None
    notes: list[str] = []
