"""The gateway's state as rows that an operator can read. Nothing here changes anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import penstock
from penstock.core.types import Role
from penstock.live.admin.answers import Blocker, Counters, CustodyRow, InstanceRow, RequestRow, StatusAnswer
from penstock.live.carried import CarriedSession
from penstock.live.instance import Health, Instance
from penstock.live.moves import LAST_TOKENS
from penstock.live.session import Session
from penstock.live.world import LiveWorld

if TYPE_CHECKING:
    from penstock.live.serve import Deployment

OPEN = (Health.UP, Health.SUSPECT)


def sessions(deployment: Deployment) -> Iterator[Session]:
    """Every request: with engines, waiting for one, and at the door."""
    yield from deployment.world.sessions.values()
    yield from deployment.world.parked
    yield from (session for session in deployment.gateway.queue if not session.over)


def why_not_movable(session: Session) -> str:
    """Why a request cannot be moved now, or an empty string."""
    if not isinstance(session, CarriedSession):
        return session.intake.pinned or "served in place"
    if session.move is not None:
        return f"moving to {session.move.target.index}"
    if session.stage != "decoding":
        return session.stage
    if session.limit() - session.generated < LAST_TOKENS:
        return "almost complete"
    return ""


def request_row(session: Session, now_s: float) -> RequestRow:
    """One request."""
    why = why_not_movable(session)
    move = session.move if isinstance(session, CarriedSession) else None
    return RequestRow(
        session.name,
        session.request,
        session.stage,
        session.where if session.where >= 0 else None,
        session.prompt_tokens,
        session.generated,
        session.intake.max_tokens,
        not why,
        why,
        None if move is None else move.target.index,
        session.moves,
        now_s - session.arrived_s,
        session.intake.slo_class,
    )


def needed(session: Session) -> set[int]:
    """The instances whose loss the request would notice: where it works, where its KV is, where it moves to."""
    found = {session.where}
    if session.claim is not None:
        found.add(session.claim.custody.owner)
    if isinstance(session, CarriedSession) and session.move is not None:
        found.add(session.move.target.index)
    return found


def remaining(world: LiveWorld, instance: int) -> list[Session]:
    """The requests that need ``instance``."""
    return [session for session in world.sessions.values() if instance in needed(session)]


def blocker(session: Session, refusals: dict[int, str]) -> Blocker:
    """A request that a drain waits for. ``refusals`` are reasons of earlier attempts, by number."""
    return Blocker(
        session.name, session.stage, why_not_movable(session) or refusals.get(session.request, "to be moved")
    )


def instance_rows(world: LiveWorld, chosen: list[Instance], draining: set[int]) -> list[InstanceRow]:
    """The chosen instances."""
    needs: Counter[int] = Counter()
    for session in world.sessions.values():
        needs.update(needed(session))
    return [_instance_row(i, i.index in draining, needs[i.index]) for i in chosen]


def _instance_row(instance: Instance, draining: bool, left: int) -> InstanceRow:
    able, link = instance.abilities, instance.link
    step = link.step if link is not None else None
    return InstanceRow(
        instance.index,
        instance.url,
        instance.role.name.lower(),
        instance.health.value,
        instance.down_reason,
        instance.held,
        draining,
        left,
        instance.streams,
        instance.prefills,
        instance.tokens,
        able.blocks * able.block_size,
        instance.itl_s,
        max(able.levels).name.lower(),
        able.model,
        able.version,
        list(able.plugin),
        link.hello.predictor if link is not None and link.hello is not None else "",
        step.waiting if step is not None else 0,
        step.preemptions if step is not None else 0,
    )


def custody_rows(world: LiveWorld) -> list[CustodyRow]:
    """Every open claim, the oldest first."""
    now = world.now()
    found = []
    for row in world.claims.rows():
        session = world.sessions.get(row.request)
        found.append(
            CustodyRow(
                "" if session is None else session.name,
                row.request,
                row.instance,
                row.tokens,
                row.used,
                now - row.issued_at_s,
                row.use_until_s - now,
                row.lease_until_s - now,
            )
        )
    return sorted(found, key=lambda row: -row.age_s)


def open_roles(world: LiveWorld) -> list[Role]:
    """The role of every instance that may get work."""
    return [i.role for i in world.instances.values() if i.health in OPEN and not i.held]


def needed_roles(disaggregated: bool) -> tuple[Role, ...]:
    """The roles without which a policy can place nothing."""
    return (Role.PREFILL, Role.DECODE) if disaggregated else (Role.MIXED,)


def status(deployment: Deployment) -> StatusAnswer:
    """The gateway at a glance."""
    world, gateway = deployment.world, deployment.gateway
    metrics, policy = world.metrics, world.controller.policy
    outcomes: dict[str, int] = {}
    for (_, outcome), count in metrics.outcomes.items():
        outcomes[outcome] = outcomes.get(outcome, 0) + count
    moves: dict[str, int] = {}
    for (_, _, end), count in metrics.migrations.items():
        moves[end] = moves.get(end, 0) + count
    counters = Counters(
        outcomes,
        moves.get("done", 0),
        moves.get("rolled_back", 0),
        dict(metrics.move_failures),
        metrics.flips,
        metrics.fences,
        metrics.engine_errors,
        metrics.refused_at_door,
        world.claims.issued,
        world.claims.expired,
        metrics.protocol_errors,
    )
    attached = [i for i in world.instances.values() if i.health is not Health.GONE]
    return StatusAnswer(
        penstock.__version__,
        gateway.model,
        policy.name,
        policy.tick_s(),
        world.now(),
        sum(i.health is Health.UP for i in attached),
        len(attached),
        len(world.sessions),
        len(world.parked),
        len(gateway.queue),
        gateway.settings.max_inflight,
        len(world.claims),
        counters,
    )
