"""The controller: one event in, a list of actions out. No clock, no socket, no randomness of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np

from penstock.control.lifecycle import advance
from penstock.core.actions import Action, Decode, Flip, Migrate, Prefill, Reject, Serve
from penstock.core.custody import Custody
from penstock.core.errors import IllegalTransition
from penstock.core.events import (
    Aborted,
    DecodeStarted,
    Event,
    Finished,
    FlipOrdered,
    InstanceDown,
    InstanceHeld,
    InstanceSlow,
    InstanceUp,
    Interrupted,
    MigrationDone,
    MigrationFailed,
    MoveOrdered,
    PolicyChosen,
    Preempted,
    PrefillDone,
    RequestArrived,
    Tick,
)
from penstock.core.types import MigrationLevel, Role
from penstock.policy.latency import PrefillTimes
from penstock.policy.parts import Beliefs, Choice, Policy, Refusal, RoleChange, Running
from penstock.policy.view import ClusterView, RequestRecord, Stage

DEFAULT_LEASE_S: Final = 30.0
"""vLLM's ``kv_lease_duration``."""


class Controller:
    """Keeps the books (requests, custody, cluster view) and asks the policy's parts for decisions."""

    def __init__(
        self,
        policy: Policy,
        beliefs: Beliefs,
        migration_level: MigrationLevel = MigrationLevel.PRECOPY,
        lease_s: float = DEFAULT_LEASE_S,
        build_policy: Callable[[str, dict[str, str]], Policy] | None = None,
    ) -> None:
        self.policy = policy
        self.beliefs = beliefs
        self.migration_level = policy.migration_level if policy.migration_level is not None else migration_level
        self.lease_s = lease_s
        self.best_level = migration_level
        self.build_policy = build_policy
        self.view = ClusterView()
        self.requests: dict[int, RequestRecord] = {}
        self._prefill_times = PrefillTimes(beliefs)
        self._next_tick_part_s: list[float] = [0.0, 0.0]
        # Requests that a placement told to wait, by (before or after the prefill, SLO class), in order of arrival.
        self._pending: dict[tuple[bool, int], deque[int]] = {}
        self._in_room: set[int] = set()
        self._gone: list[int] = []

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event at ``now`` seconds; return what to do, in order.

        Raises
        ------
        IllegalTransition
            The event does not fit the request's stage: the world broke the protocol.
        """
        actions: list[Action] = []
        if isinstance(event, RequestArrived):
            self._arrived(event, now, actions)
        elif isinstance(event, PrefillDone):
            self._prefill_done(event, now, actions)
        elif isinstance(event, DecodeStarted):
            self._decode_started(event, now)
        elif isinstance(event, Finished):
            self._finished(event, now)
        elif isinstance(event, Tick):
            self._tick(event, now, actions)
        elif isinstance(event, Preempted):
            self._preempted(event, now)
        elif isinstance(event, MigrationDone):
            self._migration_done(event, now)
        elif isinstance(event, MigrationFailed):
            self._migration_failed(event)
        elif isinstance(event, MoveOrdered):
            self._move_ordered(event, now, actions)
        elif isinstance(event, Interrupted):
            self._lost(event.request, event.generated, now, actions)
        elif isinstance(event, Aborted):
            self._drop(self._record(event.request), Stage.ABORTED)
        elif isinstance(event, InstanceUp):
            self.view.add(event, now)
        elif isinstance(event, InstanceDown):
            self._instance_down(event, now, actions)
        elif isinstance(event, InstanceSlow):
            self.view.slow[event.instance] = event.factor
        elif isinstance(event, InstanceHeld):
            self.view.hold(event.instance, event.held)
        elif isinstance(event, FlipOrdered):
            self._flip(RoleChange(event.instance, event.role, "ordered"), actions)
        elif isinstance(event, PolicyChosen):
            self._policy_chosen(event, now)
        if self.policy.observers:
            self._observers(event, now, actions)
            self._forget_gone(now)
        if self._pending and not isinstance(event, RequestArrived):
            self._ask_again(now, actions)
        if self._in_room:
            self._ask_the_room(now, actions)
        if self._gone:
            self._forget_gone(now)
        return actions

    # -- requests that wait ---------------------------------------------------------------------------------------

    def pending(self) -> int:
        """Requests that wait with the controller because their placement said so."""
        return sum([len(queue) for queue in self._pending.values()]) + len(self._in_room)

    def _hold(self, record: RequestRecord) -> None:
        room = self.policy.room
        if room is not None and record.stage == Stage.ARRIVED:
            self._in_room.add(record.request)
            room.enter(record)
            return
        key = (record.stage == Stage.PREFILLED, record.slo_class)
        queue = self._pending.get(key)
        if queue is None:
            queue = deque()
            self._pending[key] = queue
        queue.append(record.request)

    def _behind_others(self, record: RequestRecord) -> bool:
        """Does somebody of its class wait already? Then it waits behind them."""
        return (record.stage == Stage.PREFILLED, record.slo_class) in self._pending

    def _ask_the_room(self, now: float, actions: list[Action]) -> None:
        room = self.policy.room
        if room is None:  # another policy was chosen: those who wait are asked first come first served
            for request in sorted(self._in_room):
                self._hold(self.requests[request])
            self._in_room.clear()
            return
        for record in room.hopeless(self.view, now):
            self._reject(record, Refusal.SLO_UNREACHABLE, actions)
        for record in room.order(self.view, now):
            if record.request not in self._in_room:
                continue
            if not self._place_prefill(record, now, actions, True):
                break
            if record.request in self._in_room:  # not refused
                self._leave_room(record)

    def _leave_room(self, record: RequestRecord) -> None:
        self._in_room.discard(record.request)
        if self.policy.room is not None:
            self.policy.room.leave(record)

    def _ask_again(self, now: float, actions: list[Action]) -> None:
        """Room may have come: place those that wait, each class until its first one must go on waiting."""
        for key in sorted(self._pending):
            queue = self._pending[key]
            while queue:
                record = self.requests.get(queue[0])
                stage = Stage.PREFILLED if key[0] else Stage.ARRIVED
                if record is None or record.stage != stage:  # gone, or computed again elsewhere
                    queue.popleft()
                    continue
                if not key[0]:
                    placed = self._place_prefill(record, now, actions, True)
                elif record.custody is not None and record.custody.refusal(now) is not None:
                    queue.popleft()  # its KV's lease has run out: from the start
                    self._lost(record.request, record.generated, now, actions)
                    continue
                else:
                    placed = self._place_decode(record, now, actions, True)
                if not placed:
                    break
                queue.popleft()
            if not queue:
                del self._pending[key]

    # -- one method an event ----------------------------------------------------------------------------------------

    def _arrived(self, event: RequestArrived, now: float, actions: list[Action]) -> None:
        record = RequestRecord(event.request, event.prompt_tokens, event.slo, event.slo_class, event.prefix, now)
        if event.request in self.requests:
            raise IllegalTransition(f"request {event.request} arrived twice")
        record.movable = event.movable
        record.in_place = event.in_place
        self.requests[event.request] = record
        admission = self.policy.admission
        if admission is not None:
            reason = admission.refuse(record, self.view, now)
            if reason is not None:
                self._reject(record, reason, actions)
                return
        self._place_prefill(record, now, actions)

    def _place_prefill(self, record: RequestRecord, now: float, actions: list[Action], again: bool = False) -> bool:
        """Place or refuse; False if the request must (still) wait. ``again``: it is the first of those that wait."""
        if not again and (self._in_room or (self._pending and self._behind_others(record))):
            self._hold(record)
            return False
        decode = self.policy.decode
        in_place = record.in_place or decode is None
        if record.in_place and decode is not None:
            role = Role.DECODE
            choice = decode.place(record, self.view, now)
        else:
            role = Role.PREFILL if decode is not None else Role.MIXED
            choice = self.policy.prefill.place(record, self.view, now)
        if choice.waits:
            if not again:
                self._hold(record)
            return False
        instance = self._relieved(role, choice, record, now, actions)
        if instance < 0:
            self._reject(record, Refusal.NO_INSTANCE, actions)
            return True
        view = self.view
        tokens = record.context_tokens()
        if tokens > view.capacity_tokens[instance]:
            self._reject(record, Refusal.TOO_LONG, actions)
            return True
        advance(record, Stage.PREFILLING)
        record.prefill_instance = instance
        record.promised_tokens = tokens
        view.prefill_requests[instance] += 1
        view.prefill_tokens[instance] += tokens
        if self.policy.estimates:
            record.prefill_estimate_s = self._prefill_times.seconds(tokens)
            view.prefill_estimate_s[instance] += record.prefill_estimate_s
        record.served = in_place
        if in_place:
            actions.append(Serve(record.request, instance))
        else:
            actions.append(Prefill(record.request, instance))
        return True

    def _prefill_done(self, event: PrefillDone, now: float, actions: list[Action]) -> None:
        record = self._record(event.request)
        self._end_prefill(record)
        self.view.sync(event.instance, event.load, now)
        record.generated += 1
        if event.prompt_tokens > 0:
            record.prompt_tokens = event.prompt_tokens
        if record.first_token_s < 0.0:
            record.first_token_s = now
        record.predicted_remaining = event.predicted_remaining
        if record.served:
            advance(record, Stage.DECODING)
            record.decode_instance = event.instance
            return
        advance(record, Stage.PREFILLED)
        # The pinned KV is that of prompt and earlier output; the token just sampled has none yet.
        record.custody = Custody(event.instance, record.context_tokens() - 1, now, self.lease_s)
        self._place_decode(record, now, actions)

    def _place_decode(self, record: RequestRecord, now: float, actions: list[Action], again: bool = False) -> bool:
        """As :meth:`_place_prefill`, after the prefill."""
        if not again and self._pending and self._behind_others(record):
            self._hold(record)
            return False
        decode = self.policy.decode
        if decode is not None:
            role, choice = Role.DECODE, decode.place(record, self.view, now)
        else:  # a policy that does not disaggregate was chosen during the prefill
            role, choice = Role.MIXED, self.policy.prefill.place(record, self.view, now)
        if choice.waits:
            if not again:
                self._hold(record)
            return False
        instance = self._relieved(role, choice, record, now, actions)
        if instance < 0:
            self._reject(record, Refusal.NO_INSTANCE, actions)
            return True
        advance(record, Stage.TRANSFERRING)
        self._spend(record, now)
        record.decode_instance = instance
        self._promise(record, instance)
        actions.append(Decode(record.request, instance))
        return True

    def _decode_started(self, event: DecodeStarted, now: float) -> None:
        record = self._record(event.request)
        self._redeem(record, event.instance)
        record.custody = None
        record.decode_instance = event.instance
        advance(record, Stage.DECODING)
        self.view.sync(event.instance, event.load, now)

    def _finished(self, event: Finished, now: float) -> None:
        record = self._record(event.request)
        if record.stage == Stage.PREFILLING:
            self._end_prefill(record)
        record.generated = event.generated
        self.view.sync(event.instance, event.load, now)
        self._drop(record, Stage.FINISHED)

    def _preempted(self, event: Preempted, now: float) -> None:
        record = self._record(event.request)
        self.view.sync(event.instance, event.load, now)
        self.view.preemptions[event.instance] += 1
        if record.stage == Stage.DECODING:  # one still in its first prefill on a mixed instance stays PREFILLING
            advance(record, Stage.RECOMPUTING)
            self._promise(record, event.instance)

    def _migration_done(self, event: MigrationDone, now: float) -> None:
        record = self._record(event.request)
        self._end_move(record)
        record.decode_instance = event.target
        advance(record, Stage.DECODING)
        self.view.sync(event.source, event.source_load, now)
        self.view.sync(event.target, event.target_load, now)

    def _migration_failed(self, event: MigrationFailed) -> None:
        record = self._record(event.request)
        self._end_move(record)
        advance(record, Stage.DECODING)

    def _move_ordered(self, event: MoveOrdered, now: float, actions: list[Action]) -> None:
        record = self.requests.get(event.request)
        if record is None or record.stage != Stage.DECODING or not record.movable:
            return
        target = event.target
        if target < 0:
            part = self.policy.decode if self.policy.decode is not None else self.policy.prefill
            source = record.decode_instance
            held = bool(self.view.held[source])
            self.view.hold(source, True)  # anywhere but there
            target = part.place(record, self.view, now).instance
            self.view.hold(source, held)
        if target != record.decode_instance and 0 <= target < self.view.size and self.view.up[target]:
            actions.append(self._start_move(record, target, event.reason))

    def _policy_chosen(self, event: PolicyChosen, now: float) -> None:
        """Go on under another policy: what is placed stays placed, what comes is placed by the new one."""
        if self.build_policy is None:
            raise IllegalTransition("this controller was not told how to build another policy")
        policy: Policy = self.build_policy(event.policy, event.options)
        self.policy = policy
        if policy.room is not None:
            for request in sorted(self._in_room):
                policy.room.enter(self.requests[request])
        for record in self.requests.values():
            instance = record.prefill_instance if record.stage == Stage.PREFILLING else record.decode_instance
            if instance >= 0 and record.stage != Stage.ARRIVED:
                for part in policy.observers:
                    part.adopt(record, instance, now)
        level = policy.migration_level
        if level is not None:
            self.migration_level = min(level, self.best_level)
        self._next_tick_part_s = [now, now]
        # The book of estimates starts afresh for the prefills in flight: the old policy may not have kept it.
        self.view.prefill_estimate_s[:] = 0.0
        for record in self.requests.values():
            record.prefill_estimate_s = 0.0
            if policy.estimates and record.stage == Stage.PREFILLING and record.prefill_instance >= 0:
                record.prefill_estimate_s = self._prefill_times.seconds(record.promised_tokens)
                self.view.prefill_estimate_s[record.prefill_instance] += record.prefill_estimate_s

    def _instance_down(self, event: InstanceDown, now: float, actions: list[Action]) -> None:
        self.view.remove(event.instance)
        self._forget_instance(event.instance)
        for request, generated in zip(event.lost, event.generated, strict=True):
            self._lost(request, generated, now, actions)

    def _lost(self, request: int, generated: int, now: float, actions: list[Action]) -> None:
        """A request has lost its KV, or the engine that worked on it: it starts again from what the client has."""
        record = self._record(request)
        record.generated = generated
        if record.stage == Stage.PREFILLING:
            self._end_prefill(record)
        elif record.stage in (Stage.TRANSFERRING, Stage.RECOMPUTING):
            self._redeem(record, record.decode_instance)
        elif record.stage == Stage.MIGRATING:
            self._end_move(record)
        # Where the KV is still pinned elsewhere, the dead instance may have pulled it already: the claim is spent.
        record.custody = None
        advance(record, Stage.ARRIVED)
        for part in self.policy.observers:
            part.forget(request, now)
        self._place_prefill(record, now, actions)

    def _tick(self, event: Tick, now: float, actions: list[Action]) -> None:
        view = self.view
        for i in range(len(event.instances)):
            view.sync(event.instances[i], event.loads[i], now)
        policy = self.policy
        if policy.roles is not None and self._due(0, policy.roles.interval_s, now):
            for change in policy.roles.review(event, view, now):
                self._flip(change, actions)
        if policy.rescheduler is not None and self._due(1, policy.rescheduler.interval_s, now):
            running = self._running(event)
            for move in policy.rescheduler.moves(running, view, now):
                record = self.requests.get(move.request)
                if record is None or record.stage != Stage.DECODING or record.decode_instance != move.source:
                    continue
                if move.target == move.source or not view.up[move.target]:
                    continue
                actions.append(self._start_move(record, move.target, move.reason))
            view.preemptions[:] = 0.0

    def _due(self, part: int, interval_s: float, now: float) -> bool:
        """Ticks come at the fastest part's pace; the slower part skips some. Half a microsecond absorbs rounding."""
        if now + 5e-7 < self._next_tick_part_s[part]:
            return False
        self._next_tick_part_s[part] = now + interval_s
        return True

    def _running(self, event: Tick) -> Running:
        """Fold the tick's columns into the records and return those that a rescheduler may move."""
        where: list[int] = []
        prompt: list[int] = []
        requests = self.requests
        decoding = Stage.DECODING
        for request, tokens, left in zip(event.requests, event.generated, event.predicted_remaining, strict=True):
            record = requests.get(request)
            if record is None:
                raise IllegalTransition(f"request {request} ticks but is not in flight")
            record.generated = tokens
            record.predicted_remaining = left
            where.append(record.decode_instance if record.stage is decoding and record.movable else -1)
            prompt.append(record.prompt_tokens)
        columns = (
            np.array(event.requests, np.int64),
            np.array(where, np.int64),
            np.array(prompt, np.int64),
            np.array(event.generated, np.int64),
            np.array(event.predicted_remaining, np.float64),
        )
        movable = columns[1] >= 0
        if movable.all():
            return Running(*columns)
        return Running(*[column[movable] for column in columns])

    def _observers(self, event: Event, now: float, actions: list[Action]) -> None:
        for part in self.policy.observers:
            part.observe(event, self.view, now)
        roles = self.policy.roles
        if roles is not None and roles.observes:
            for change in roles.after(event, self.view, now):
                self._flip(change, actions)

    # -- book-keeping -----------------------------------------------------------------------------------------------

    def _forget_instance(self, instance: int) -> None:
        """Void what the books still promise to a dead instance, lest it be undone on the one that takes its number."""
        for record in self.requests.values():
            if record.custody is not None and record.custody.owner == instance:
                record.custody = None
            if record.stage == Stage.MIGRATING:
                if record.decode_instance == instance:
                    record.decode_instance = -1
                if record.migrating_to == instance:
                    record.migrating_to = -1

    def _record(self, request: int) -> RequestRecord:
        record = self.requests.get(request)
        if record is None:
            raise IllegalTransition(f"request {request} is not in flight")
        return record

    def _relieved(self, phase: Role, choice: Choice, record: RequestRecord, now: float, actions: list[Action]) -> int:
        """The chosen instance, or one flipped to this phase because none met the placement's own test."""
        roles = self.policy.roles
        if not choice.fits and roles is not None:
            change = roles.relieve(phase, record, self.view, now)
            if change is not None:
                self._flip(change, actions)
                return change.instance
        return choice.instance

    def _flip(self, change: RoleChange, actions: list[Action]) -> None:
        self.view.relabel(change.instance, change.role)
        actions.append(Flip(change.instance, change.role, change.reason))

    def _end_prefill(self, record: RequestRecord) -> None:
        i = record.prefill_instance
        if not self.view.up[i]:
            return
        self.view.prefill_requests[i] -= 1
        self.view.prefill_tokens[i] -= record.promised_tokens
        if self.policy.estimates:
            self.view.prefill_estimate_s[i] -= record.prefill_estimate_s

    def _promise(self, record: RequestRecord, instance: int) -> None:
        record.promised_tokens = record.context_tokens()
        self.view.pending_requests[instance] += 1
        self.view.pending_tokens[instance] += record.promised_tokens

    def _spend(self, record: RequestRecord, now: float) -> None:
        """Use the claim on the pinned KV, which is good for one pull (the engine would read whatever is there now)."""
        custody = record.custody
        refusal = "there is none" if custody is None else custody.refusal(now)
        if custody is None or refusal is not None:
            raise IllegalTransition(f"request {record.request}: its claim on pinned KV cannot be used: {refusal}")
        record.custody = custody.spent()

    def _redeem(self, record: RequestRecord, instance: int) -> None:
        if instance >= 0 and self.view.up[instance]:
            self.view.pending_requests[instance] -= 1
            self.view.pending_tokens[instance] -= record.promised_tokens

    def _start_move(self, record: RequestRecord, target: int, reason: str) -> Migrate:
        source = record.decode_instance
        advance(record, Stage.MIGRATING)
        record.migrating_to = target
        self._promise(record, target)
        self.view.moving[source] += 1
        self.view.moving[target] += 1
        return Migrate(record.request, source, target, self.migration_level, reason)

    def _end_move(self, record: RequestRecord) -> None:
        self._redeem(record, record.migrating_to)
        for i in (record.decode_instance, record.migrating_to):
            if i >= 0 and self.view.up[i]:
                self.view.moving[i] -= 1
        record.migrating_to = -1

    def _reject(self, record: RequestRecord, reason: Refusal, actions: list[Action]) -> None:
        self._drop(record, Stage.REJECTED)
        actions.append(Reject(record.request, reason.value))

    def _drop(self, record: RequestRecord, stage: Stage) -> None:
        """Forget a request, undoing what it still holds in the books."""
        if record.request in self._in_room:
            self._leave_room(record)
        if record.stage == Stage.PREFILLING and stage != Stage.FINISHED:
            self._end_prefill(record)
        elif record.stage in (Stage.TRANSFERRING, Stage.RECOMPUTING):
            self._redeem(record, record.decode_instance)
        elif record.stage == Stage.MIGRATING:
            self._end_move(record)
        advance(record, stage)
        del self.requests[record.request]
        self._gone.append(record.request)

    def _forget_gone(self, now: float) -> None:
        for request in self._gone:
            for part in self.policy.observers:
                part.forget(request, now)
        self._gone.clear()
