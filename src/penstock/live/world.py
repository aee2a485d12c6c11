"""The live world: the same controller as in the simulator, fed by what real engines do.

Everything runs on one event loop. Sessions and moves report events by ``tell``; the controller answers with actions,
which ``tell`` carries out at once. Nothing in here decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import zmq

from penstock.control.controller import Controller
from penstock.core.actions import Action, Decode, Flip, Migrate, Prefill, Reject, Serve
from penstock.core.events import (
    Event,
    InstanceDown,
    InstanceUp,
    Interrupted,
    MigrationFailed,
    RequestArrived,
    Tick,
)
from penstock.core.types import MigrationLevel, Role
from penstock.live.carried import CarriedSession
from penstock.live.claims import Claim, ClaimRefused, ClaimTable
from penstock.live.http.client import HttpClient
from penstock.live.instance import Abilities, Health, Instance, best_level, with_plugin
from penstock.live.intake import COMPLETION_PATH, Pinned
from penstock.live.link import Link, linked
from penstock.live.metrics import LiveMetrics
from penstock.live.moves import begin, refusal
from penstock.live.relayed import RelayedSession
from penstock.live.segment import EngineError, ask
from penstock.live.session import NOWHERE, Session
from penstock.policy.parts import Refusal

CHARS_PER_TOKEN = 4.0
"""First guess of how long a prompt is; learnt from the prompts that engines have rendered."""
PARK_S = 60.0
"""How long a request waits for an instance to come up before the client is told that there is none."""


class LiveWorld:
    """Requests, instances and claims of one gateway; ``now`` is its clock (seconds since it was made)."""

    def __init__(
        self,
        controller: Controller,
        client: HttpClient,
        metrics: LiveMetrics,
        record: Any = None,
        engine_headers: dict[str, str] | None = None,
        call_timeout_s: float = 600.0,
    ) -> None:
        self.controller = controller
        self.client = client
        self.metrics = metrics
        self.record = record
        self.engine_headers = engine_headers or {}
        self.call_timeout_s = call_timeout_s
        self.lease_s = controller.lease_s
        self.log = logging.getLogger("penstock.live")
        self.loop = asyncio.get_running_loop()
        self.start_s = self.loop.time()
        self.instances: dict[int, Instance] = {}
        self.sessions: dict[int, Session] = {}
        self.claims = ClaimTable()
        self.classes: dict[str, int] = {"default": 0}
        self.max_model_len = 2**31
        self.parser_in_chat = False
        self.on_suspect: Callable[[Instance], None] | None = None
        self.on_ended: Callable[[], None] | None = None
        self.parked: list[Session] = []
        self._next = 0
        self._sockets: zmq.Context[zmq.Socket[bytes]] | None = None
        self._chars_per_token = CHARS_PER_TOKEN
        self._ticking: asyncio.Task[None] | None = None
        self._errands: set[asyncio.Task[None]] = set()
        self._doubted: dict[int, list[tuple[Session, EngineError]]] = {}

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run ``work`` to its end whoever loses interest; what it raises is for whoever awaits it."""
        task = self.loop.create_task(work)
        self._errands.add(task)
        task.add_done_callback(self._errand_over)
        return task

    def _errand_over(self, task: asyncio.Task[None]) -> None:
        self._errands.discard(task)
        if not task.cancelled():
            task.exception()  # seen: nobody may be waiting for it any more

    def release(self, claim: Claim | None, sequence: list[int]) -> None:
        """Free pinned KV that nobody will use: an engine frees it once it is pulled, so pull it and throw it away."""
        if claim is not None and not claim.custody.used:
            self.spawn(self._pull_away(claim, sequence))

    async def _pull_away(self, claim: Claim, sequence: list[int]) -> None:
        owner = claim.custody.owner
        if self.instances[owner].health is not Health.UP:
            return
        others = [i for i in self.instances.values() if i.health is Health.UP and i.index != owner]
        if not others:
            return
        idlest = min(others, key=lambda i: i.tokens)
        body = {"model": idlest.abilities.model, "prompt": sequence, "max_tokens": 1, "temperature": 0}
        try:
            body["kv_transfer_params"] = claim.redeem(len(sequence), self.now())
            await ask(self.client, idlest, COMPLETION_PATH, body, self.engine_headers, self.call_timeout_s)
        except (ClaimRefused, EngineError) as error:
            self.log.info("claim not released", extra={"instance": owner, "reason": str(error)})
            return
        self.claims.settle(claim)

    def now(self) -> float:
        """Seconds on the gateway's clock."""
        return self.loop.time() - self.start_s

    # -- events and actions -----------------------------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        """Give the controller an event and carry out what it answers."""
        now = self.now()
        try:
            actions = self.controller.handle(event, now)
        except Exception:
            # A bug of ours: keep serving everybody else, say so loudly, and let nobody wait for what will not come.
            self.metrics.protocol_errors += 1
            self.log.exception("the controller failed over an event: %s", type(event).__name__)
            session = self.sessions.pop(getattr(event, "request", -1), None)
            if session is not None and not session.over:
                session.fail(500, "the gateway failed this request", "InternalServerError")
            return
        if self.record is not None:
            self.record.write(now, event, actions)
        for action in actions:
            self._do(action)

    def _do(self, action: Action) -> None:
        if isinstance(action, Prefill):
            self.sessions[action.request].prefill(self.instances[action.instance])
        elif isinstance(action, Decode):
            self.sessions[action.request].decode(self.instances[action.instance])
        elif isinstance(action, Serve):
            self.sessions[action.request].serve(self.instances[action.instance])
        elif isinstance(action, Migrate):
            self._migrate(action)
        elif isinstance(action, Flip):
            instance = self.instances[action.instance]
            self.log.info("flip", extra={"instance": instance.index, "role": action.role.name, "reason": action.reason})
            self.metrics.flips += 1
            instance.role = action.role
        elif isinstance(action, Reject):
            self._rejected(self.sessions[action.request], action.reason)

    def _migrate(self, action: Migrate) -> None:
        session = self.sessions[action.request]
        source, target = self.instances[action.source], self.instances[action.target]
        why = "it cannot be carried" if not isinstance(session, CarriedSession) else refusal(session, source, target)
        if why is not None or not isinstance(session, CarriedSession):
            self.metrics.move_failed(action.level, action.reason, why or "")
            self.tell(MigrationFailed(action.request, action.source, action.target, why or ""))
            return
        level = best_level(source.abilities, target.abilities, action.level)
        if source.link is None:  # it went down and came back, or its plugin never spoke
            level = min(level, MigrationLevel.REPROMPT)
        session.move = begin(session, source, target, level, action.reason)

    def _rejected(self, session: Session, reason: str) -> None:
        """The controller will not have it (now)."""
        if reason == Refusal.NO_INSTANCE.value:
            self._park(session)
            return
        self.sessions.pop(session.request, None)
        session.over = True
        session.drop_work()
        self.metrics.ended(session, "rejected")
        if reason == Refusal.TOO_LONG.value:
            session.out.fail(400, "the prompt does not fit in the KV cache of any model server", "BadRequestError")
        else:
            session.out.fail(429, "the request cannot be served in time now", "RateLimitError", 1)
        self._note_ended()

    def _park(self, session: Session) -> None:
        """Nobody can take it now: wait for an instance."""
        self.sessions.pop(session.request, None)
        session.drop_work()
        session.release_claim()
        session.where = NOWHERE
        session.stage = "waiting for an instance"
        self.parked.append(session)
        self.loop.call_later(PARK_S, self._give_up, session)

    def _give_up(self, session: Session) -> None:
        if session in self.parked and not session.over:
            self.parked.remove(session)
            session.over = True
            self.metrics.ended(session, "rejected")
            session.out.fail(503, "no model server is available", "ServiceUnavailableError", 5)
            self._note_ended()

    # -- requests ---------------------------------------------------------------------------------------------------

    def arrive(self, session: Session) -> None:
        """Announce a request (again, under a new number)."""
        self._next += 1
        session.request = self._next
        self.sessions[session.request] = session
        if session.prompt_tokens == 0:
            session.prompt_tokens = max(1, round(session.intake.prompt_chars / self._chars_per_token))
        intake = session.intake
        self.tell(
            RequestArrived(
                session.request,
                session.prompt_tokens + session.generated,
                session.slo,
                self.classes.get(intake.slo_class, 0),
                (),
                intake.pinned is None,
                intake.in_place,
            )
        )

    def ended(self, session: Session, event: Event, outcome: str) -> None:
        """A request is over: tell the controller, and make room."""
        if session in self.parked:
            self.parked.remove(session)
        elif self.sessions.pop(session.request, None) is not None:
            self.tell(event)
        self.metrics.ended(session, outcome)
        session.note_end(outcome)
        self._note_ended()

    def _note_ended(self) -> None:
        if self.on_ended is not None:
            self.on_ended()

    def learn_chars(self, chars: int, tokens: int) -> None:
        """A prompt of ``chars`` characters was ``tokens`` tokens long."""
        if chars and tokens:
            self._chars_per_token += 0.02 * (chars / tokens - self._chars_per_token)

    def demote(self, session: CarriedSession, instance: Instance) -> None:
        """The engine parses its chat output, so that tokens do not tell the text: relay this request instead."""
        self.parser_in_chat = True
        self.log.info("chat output is parsed by the engine; chats are served in place")
        session.drop_work()
        session.release_claim()
        intake = session.intake
        intake.pinned = Pinned.PARSED
        session.out.headers["penstock-movable"] = f"no; reason={Pinned.PARSED}"
        relayed = RelayedSession(self, intake, session.out, session.name, session.slo)
        relayed.request, relayed.arrived_s = session.request, session.arrived_s
        session.over = True
        self.sessions[relayed.request] = relayed
        session.out.owner = relayed
        self.tell(Interrupted(relayed.request, instance.index, 0, Pinned.PARSED))

    # -- engines that fail ------------------------------------------------------------------------------------------

    def interrupted(self, session: Session, instance: Instance, error: EngineError) -> None:
        """An engine failed one request. If that was not the request's fault, find out first whether the engine lives:
        sending the request there again and again would only use up its attempts.
        """
        if instance.health in (Health.DOWN, Health.GONE):  # its fence has already been told, or is being put up
            self._again(session, instance, error)
            return
        if (error.connection or error.status >= 500) and self.on_suspect is not None:
            self._doubted.setdefault(instance.index, []).append((session, error))
            if instance.health is Health.UP:
                instance.health = Health.SUSPECT
                self.on_suspect(instance)
            return
        self._again(session, instance, error)

    def _again(self, session: Session, instance: Instance, error: EngineError) -> None:
        # It may have been given to another instance, or parked, while the engine was being examined.
        if not session.over and session.stage == "interrupted":
            reason = f"error {error.status}" if error.status else "no answer"
            self.tell(Interrupted(session.request, instance.index, session.generated, reason))

    def cleared(self, instance: Instance) -> None:
        """A suspect is alive: only the calls that failed start again."""
        instance.health = Health.UP
        for session, error in self._doubted.pop(instance.index, []):
            self._again(session, instance, error)

    def fence(self, instance: Instance, reason: str) -> None:
        """An instance is dead or hangs: whatever was there goes elsewhere."""
        self.metrics.fences += 1
        self.log.warning("fence", extra={"instance": instance.index, "url": instance.url, "reason": reason})
        self._take_down(instance, reason)

    def _take_down(self, instance: Instance, reason: str) -> None:
        instance.health = Health.DOWN
        instance.down_reason = reason
        doubted = [
            session
            for session, _ in self._doubted.pop(instance.index, [])
            if not session.over and session.stage == "interrupted"
        ]
        self.claims.owner_gone(instance.index)
        lost = [s for s in self.sessions.values() if s.where == instance.index]
        lost += [s for s in doubted if s not in lost]  # of replays that the instance has failed
        for session in list(self.sessions.values()):
            move = session.move if isinstance(session, CarriedSession) else None
            if not isinstance(session, CarriedSession) or move is None or move.target is not instance:
                continue
            if not move.can_go_back:  # a replay: its source has let go of it
                lost.append(session)
            elif session.where != instance.index:
                move.fail("the target went down")
        for session in lost:
            session.count_attempt()
            session.drop_work()
        instance.forget()
        instance.connect(None)
        # What cannot be computed anew is told so; the rest starts again from what the client has.
        for session in [s for s in lost if not s.can_restart]:
            session.fail(502, "the model server failed in the middle of this answer", "InternalServerError")
        lost = [s for s in lost if not s.over]
        numbers = tuple(s.request for s in lost)
        self.tell(InstanceDown(instance.index, numbers, tuple(s.generated for s in lost)))

    async def link_to(self, plugin: str | None) -> Link | None:
        """A connection to the plugin at that address; None where none answers."""
        if plugin is None:
            return None
        if self._sockets is None:
            self._sockets = zmq.Context()
        return await linked(self._sockets, plugin)

    def bring_up(
        self,
        index: int,
        url: str,
        role: Role,
        abilities: Abilities,
        plugin: str | None = None,
        link: Link | None = None,
    ) -> Instance:
        """An instance is ready: a new one, or one that is back. ``link`` is the connection to its plugin."""
        instance = self.instances.get(index)
        if instance is None:
            instance = Instance(index, url, role, abilities, plugin)
            self.instances[index] = instance
        instance.plugin = plugin
        instance.connect(link)
        abilities = with_plugin(abilities, link.hello if link is not None else None)
        instance.abilities = abilities
        instance.health = Health.UP
        instance.down_reason = ""
        self._measure_models()
        up = InstanceUp(
            index, instance.role, abilities.blocks, abilities.block_size, abilities.max_running, abilities.levels
        )
        self.tell(up)
        self.unpark()
        return instance

    def attached(self) -> list[Instance]:
        """All that were not detached."""
        return [i for i in self.instances.values() if i.health is not Health.GONE]

    def _measure_models(self) -> None:
        lengths = [i.abilities.max_model_len for i in self.attached()]
        self.max_model_len = min(lengths) if lengths else self.max_model_len

    def unpark(self) -> None:
        """Something may have changed for those that wait for an instance."""
        waiting, self.parked = self.parked, []
        for session in waiting:
            if not session.over:
                self.arrive(session)

    def retire(self, instance: Instance) -> None:
        """Detach: it is not ours any more. What still runs there goes elsewhere."""
        if instance.health is not Health.DOWN:
            self._take_down(instance, "detached")
        instance.health = Health.GONE
        self.log.info("detach", extra={"instance": instance.index, "url": instance.url})
        self._measure_models()

    def log_fault(self, session: Session, instance: Instance, error: EngineError) -> None:
        """An engine's complaint goes to the log, never to a client."""
        self.metrics.engine_errors += 1
        extra = {"request": session.name, "instance": instance.index, "status": error.status, "reason": error.reason}
        self.log.warning("engine fault", extra=extra)

    # -- ticks ------------------------------------------------------------------------------------------------------

    def start_ticking(self) -> None:
        """Tick at the policy's pace (again, after the policy changed)."""
        if self._ticking is not None:
            self._ticking.cancel()
        self._ticking = self.loop.create_task(self._tick_for_ever())

    async def _tick_for_ever(self) -> None:
        while True:
            pace = self.controller.policy.tick_s()
            await asyncio.sleep(pace if pace is not None else 1.0)
            self.claims.sweep(self.now())
            if pace is not None:
                self.tell(self.tick())

    def tick(self) -> Tick:
        """The state of all running decodes, as columns."""
        up = [i for i in self.instances.values() if i.health in (Health.UP, Health.SUSPECT)]
        rows = [s for s in self.sessions.values() if s.stage == "decoding"]
        return Tick(
            tuple(i.index for i in up),
            tuple(i.load() for i in up),
            tuple(s.request for s in rows),
            tuple(s.generated for s in rows),
            tuple(s.predicted_remaining() for s in rows),
        )

    async def close(self) -> None:
        """End everything that is still here."""
        if self._ticking is not None:
            self._ticking.cancel()
        for task in self._errands:
            task.cancel()
        for session in [*self.sessions.values(), *self.parked]:
            session.fail(503, "the gateway is shutting down", "ServiceUnavailableError", 1)
        for instance in self.instances.values():
            instance.connect(None)
        if self._sockets is not None:
            self._sockets.destroy(linger=0)
        if self.record is not None:
            self.record.close()
