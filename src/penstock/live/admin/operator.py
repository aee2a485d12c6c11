"""What an operator may order. Every order becomes events for the controller, so that the event log replays it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from penstock.core.errors import PenstockError
from penstock.core.events import FlipOrdered, InstanceHeld, MoveOrdered, PolicyChosen
from penstock.core.types import Role
from penstock.live.admin import answers as a
from penstock.live.admin.answers import Refused
from penstock.live.admin.drain import NOBODY, Drain
from penstock.live.admin.views import blocker, needed_roles, open_roles, remaining, sessions, why_not_movable
from penstock.live.admin.watch import EventWatch
from penstock.live.carried import CarriedSession
from penstock.live.instance import Health, Instance
from penstock.live.serve import EngineAddress
from penstock.live.session import Session
from penstock.live.settings import attached
from penstock.policy.registry import parse_settings, preset

if TYPE_CHECKING:
    from penstock.live.serve import Deployment

SHOWN = 20
"""Requests that a drain names; the rest are counted."""


class Operator:
    """Carries out orders on one deployment. All methods raise :class:`Refused` for what cannot be done."""

    def __init__(self, deployment: Deployment, watch: EventWatch) -> None:
        self.deployment = deployment
        self.world = deployment.world
        self.watch = watch
        self.drains: dict[int, Drain] = {}

    # -- who is meant -----------------------------------------------------------------------------------------------

    def instance(self, text: str, gone: bool = False) -> Instance:
        """The instance of that number; a detached one only if ``gone``."""
        found = self.world.instances.get(int(text)) if text.isascii() and text.isdigit() else None
        if found is None or (found.health is Health.GONE and not gone):
            known = [i.name for i in self.world.instances.values() if i.health is not Health.GONE]
            raise Refused(404, f"there is no instance {text[:50]}", "there are: " + (", ".join(known) or "none"))
        return found

    def request(self, text: str) -> Session:
        """The request whose id is, or alone begins with, ``text``."""
        found = []
        for session in sessions(self.deployment):
            if session.name == text:
                return session
            if text and session.name.startswith(text):
                found.append(session)
        if len(found) > 1:
            close = ", ".join(s.name for s in found[:3]) + (", ..." if len(found) > 3 else "")
            raise Refused(409, f"{len(found)} requests begin with {text[:80]!r}", f"give more of the id: {close}")
        if not found:
            raise Refused(404, f"no request {text[:80]!r} is in flight", "it may have ended; list them: GET /requests")
        return found[0]

    def drain_of(self, instance: Instance) -> Drain | None:
        """The drain at work on it."""
        drain = self.drains.get(instance.index)
        return drain if drain is not None and drain.running else None

    @property
    def draining(self) -> set[int]:
        """The instances with a drain at work."""
        return {index for index, drain in self.drains.items() if drain.running}

    # -- requests ---------------------------------------------------------------------------------------------------

    async def migrate(self, session: Session, order: a.MigrateOrder) -> a.MigrateAnswer:
        """Move a running decode."""
        why = why_not_movable(session)
        if why or not isinstance(session, CarriedSession):
            raise Refused(409, f"{session.name} cannot move now: {why}", _when(session))
        source, target = session.where, -1
        if order.to is not None:
            target = self._target(order.to, source).index
        outcome = self.watch.outcome_of(session.request)
        start_s = self.world.now()
        try:
            self.world.tell(MoveOrdered(session.request, target, "ordered"))
            move = session.move
            if move is None:
                if outcome.done():
                    raise Refused(409, f"{session.name} cannot move now: {outcome.result()[1]}", "try again")
                raise Refused(409, f"{session.name} stays on {source}: {NOBODY}", "name one: to (penstock ctl: --to)")
            target = move.target.index
            if not order.wait:
                return a.MigrateAnswer(session.name, source, target, "started")
            await asyncio.wait([outcome], timeout=order.timeout_s)
            passed_s = self.world.now() - start_s
            if not outcome.done():
                return a.MigrateAnswer(session.name, source, target, "moving", seconds=passed_s)
            end, reason = outcome.result()
            return a.MigrateAnswer(session.name, source, target, end, reason, passed_s)
        finally:
            self.watch.forget(session.request, outcome)

    def _target(self, to: int, source: int) -> Instance:
        target = self.instance(str(to))
        if target.index == source:
            raise Refused(409, f"the request decodes on {to} already", "name another instance")
        if target.health is not Health.UP:
            raise Refused(409, f"instance {to} is {target.health.value}", "name one that is up")
        if target.held:
            raise Refused(409, f"instance {to} is held", f"undrain it first: penstock ctl undrain {to}")
        return target

    # -- holding and draining ---------------------------------------------------------------------------------------

    async def drain(self, instance: Instance, order: a.Wait) -> a.HoldAnswer:
        """Hold an instance and move everything off it."""
        self._hold(instance, order.force)
        if self.drain_of(instance) is None:
            self.drains[instance.index] = Drain(self.world, self.watch, instance)
        if order.wait:
            await self.drains[instance.index].wait(order.timeout_s)
        return self.progress(instance)

    def undrain(self, instance: Instance) -> a.HoldAnswer:
        """Give it work again; a detach that waits for the drain is called off."""
        self._stop_drain(instance)
        if instance.held:
            instance.held = False
            self.world.tell(InstanceHeld(instance.index, False))
            self.world.unpark()
        return self.progress(instance)

    def progress(self, instance: Instance) -> a.HoldAnswer:
        """How far a drain is."""
        left = remaining(self.world, instance.index)
        drain = self.drains.get(instance.index)
        refusals = drain.refusals if drain is not None else {}
        return a.HoldAnswer(
            instance.index,
            instance.held,
            instance.health.value,
            drain is not None and drain.running,
            instance.held and not left,
            len(left),
            drain.moved if drain is not None else 0,
            [blocker(session, refusals) for session in left[:SHOWN]],
        )

    def _hold(self, instance: Instance, force: bool) -> None:
        if instance.held:
            return
        self._keep_serving(instance, None, force)
        instance.held = True
        self.world.tell(InstanceHeld(instance.index, True))

    def _stop_drain(self, instance: Instance) -> None:
        drain = self.drains.pop(instance.index, None)
        if drain is not None:
            drain.cancel()

    def _keep_serving(self, instance: Instance, role: Role | None, force: bool) -> None:
        """Refuse to take the last instance of a role that the policy needs; ``role`` is the new one, None for none."""
        policy = self.world.controller.policy
        now = open_roles(self.world)
        if force or instance.held or instance.role not in now:
            return
        after = list(now)
        after.remove(instance.role)
        if role is not None:
            after.append(role)
        for needed in needed_roles(policy.decode is not None):
            if needed in now and needed not in after:
                name = needed.name.lower()
                raise Refused(
                    409,
                    f"instance {instance.index} is the last {name} instance: policy {policy.name} could place nothing",
                    f"attach or flip another to {name} first, or use force",
                )

    # -- roles ------------------------------------------------------------------------------------------------------

    def flip(self, instance: Instance, order: a.FlipOrder) -> a.FlipAnswer:
        """Change a role; what runs there stays."""
        role = role_of(order.role)
        before = instance.role
        if role is not before:
            self._keep_serving(instance, role, order.force)
            self.world.tell(FlipOrdered(instance.index, role))
            self.world.unpark()
        notes = []
        policy = self.world.controller.policy
        if policy.roles is not None:
            notes.append(f"policy {policy.name} changes roles by itself and may change this one back")
        if role not in needed_roles(policy.decode is not None):
            notes.append(f"policy {policy.name} gives nothing to {role.name.lower()} instances")
        return a.FlipAnswer(instance.index, before.name.lower(), instance.role.name.lower(), notes)

    # -- coming and going -------------------------------------------------------------------------------------------

    async def attach(self, order: a.AttachOrder) -> a.AttachAnswer:
        """Take in a server that runs already."""
        role = role_of(order.role)
        try:
            server = attached(order.url)
        except PenstockError as error:
            raise Refused(400, error.problem, "give http://HOST:PORT") from None
        url = server.url
        for known in self.world.instances.values():
            if known.url == url and known.health is not Health.GONE:
                raise Refused(409, f"{url} is attached already, as instance {known.index}", "detach it first")
        try:
            index = await self.deployment.attach(EngineAddress(url, role, plugin=server.plugin))
        except PenstockError as error:
            raise Refused(400, error.problem, error.remedy) from None
        instance = self.world.instances[index]
        return a.AttachAnswer(index, instance.url, instance.role.name.lower())

    async def detach(self, instance: Instance, order: a.Wait) -> a.HoldAnswer:
        """Drain an instance and let it go; with ``force`` at once: what runs there starts again elsewhere."""
        if order.force or instance.health is Health.DOWN:
            self._retire(instance)
            return self.progress(instance)
        self._hold(instance, False)
        drain = self.drain_of(instance)
        if drain is None:
            drain = self.drains[instance.index] = Drain(self.world, self.watch, instance)
        drain.then = lambda: self._retire(instance)
        if order.wait:
            await drain.wait(order.timeout_s)
        return self.progress(instance)

    def _retire(self, instance: Instance) -> None:
        self._stop_drain(instance)
        self.world.retire(instance)
        if instance.held:  # should it be attached again, it comes to work
            instance.held = False
            self.world.tell(InstanceHeld(instance.index, False))

    # -- policy -----------------------------------------------------------------------------------------------------

    def policy(self, order: a.PolicyOrder) -> a.PolicyAnswer:
        """Go on under another policy."""
        world = self.world
        controller = world.controller
        options = {key: value if isinstance(value, str) else repr(value) for key, value in order.options.items()}
        try:
            chosen = preset(order.name)
            parse_settings([f"{order.name}.{key}={value}" for key, value in options.items()])
            if controller.build_policy is None:
                raise Refused(409, "this gateway cannot build policies", "start it with penstock serve")
            controller.build_policy(order.name, options)
        except PenstockError as error:
            raise Refused(400, error.problem, error.remedy) from None
        self._roles_for(order.name, chosen.disaggregated)
        before = controller.policy.name
        world.tell(PolicyChosen(order.name, options))
        self.deployment.policy = order.name
        world.start_ticking()
        world.unpark()
        notes = []
        if chosen.predictor is not None and chosen.predictor != "none":
            notes.append("engines predict no lengths here: the policy goes by its own history")
        return a.PolicyAnswer(before, controller.policy.name, options, controller.policy.tick_s(), notes)

    def _roles_for(self, name: str, disaggregated: bool) -> None:
        missing = [r.name.lower() for r in needed_roles(disaggregated) if r not in open_roles(self.world)]
        if missing:
            raise Refused(
                409,
                f"policy {name} needs {' and '.join(missing)} instances, and none may get work",
                f"flip one first, as penstock ctl flip INSTANCE {missing[0]}, or attach one",
            )

    async def close(self) -> None:
        """Stop all drains; instances that were held stay so."""
        for drain in self.drains.values():
            drain.cancel()
        await asyncio.gather(*(d.task for d in self.drains.values()), return_exceptions=True)


def role_of(text: str) -> Role:
    """A role by name."""
    name = text.strip().upper()
    if name not in Role.__members__:
        raise Refused(400, f"{text[:50]!r} is no role", "use prefill, decode or mixed")
    return Role[name]


def _when(session: Session) -> str:
    if session.intake.pinned is not None:
        return "what it asked for keeps it where it is"
    return "try again when it decodes" if session.stage != "decoding" else "let it end"
