"""A tiny random world for the controller: it does what it is told, in an order drawn from a seed."""

from __future__ import annotations

import random

from penstock.control.controller import Controller
from penstock.core.actions import Action, Decode, Flip, Migrate, Prefill, Reject, Serve
from penstock.core.events import (
    Aborted,
    DecodeStarted,
    Event,
    Finished,
    InstanceDown,
    Load,
    MigrationDone,
    MigrationFailed,
    Preempted,
    PrefillDone,
    RequestArrived,
    Tick,
)
from penstock.core.types import Role, Slo
from penstock.policy.parts import Policy
from tests.policy.cluster import BELIEFS, BLOCK, up


class World:
    """Requests are prefilled, moved and finished at random; loads are reported truthfully."""

    def __init__(self, policy: Policy, roles: list[Role], seed: int, capacity_tokens: int = 20_000) -> None:
        self.random = random.Random(seed)
        self.controller = Controller(policy, BELIEFS)
        self.capacity = capacity_tokens
        self.now = 0.0
        self.orders: list[Action] = []
        self.log: list[str] = []
        self.prompt: dict[int, int] = {}
        self.generated: dict[int, int] = {}
        self.where: dict[int, int] = {}
        self.up = set(range(len(roles)))
        self.disaggregated = policy.decode is not None
        self.next = 0
        for i, role in enumerate(roles):
            self.tell(up(i, role, capacity_tokens, max_running=64))

    def load(self, i: int) -> Load:
        """The truth about one instance."""
        mine = [r for r, where in self.where.items() if where == i]
        tokens = sum(self.prompt[r] + self.generated[r] for r in mine)
        step = 0.01 + 2e-7 * tokens if mine else 0.0
        return Load(len(mine), 0, tokens, max(self.capacity - tokens, 0) // BLOCK, step)

    def tell(self, event: Event) -> list[Action]:
        """Hand an event over and check the answer."""
        view = self.controller.view
        before = (len(view.prefills), len(view.decodes))
        actions = self.controller.handle(event, self.now)
        for action in actions:
            self.log.append(f"{self.now:.6f} {action}")
            if isinstance(action, Flip):
                assert action.instance in self.up
            elif isinstance(action, Reject):
                self.prompt.pop(action.request)
            else:
                assert isinstance(action, (Prefill, Serve, Decode, Migrate))
                target = action.target if isinstance(action, Migrate) else action.instance
                assert target in self.up, "work was sent to an instance that is down"
                self.orders.append(action)
        if any(isinstance(a, Flip) for a in actions):
            assert len(view.prefills) > 0 or before[0] == 0, "a flip emptied the prefill pool"
            assert len(view.decodes) > 0 or before[1] == 0, "a flip emptied the decode pool"
        return actions

    def step(self, failures: bool = False) -> None:
        """One random happening."""
        self.now += self.random.choice([0.001, 0.01, 0.3])
        dice = self.random.random()
        if dice < 0.25:
            self.arrive()
        elif dice < 0.60 and self.orders:
            self.obey(self.orders.pop(self.random.randrange(len(self.orders))))
        elif dice < 0.75:
            self.tick()
        elif dice < 0.90 and self.running():
            self.finish(self.random.choice(self.running()))
        elif failures:
            self.fail()

    def running(self) -> list[int]:
        """Requests that decode and are not on the move."""
        moving = {o.request for o in self.orders if isinstance(o, Migrate)}
        return sorted(r for r in self.where if r not in moving)

    def arrive(self, prompt: int | None = None) -> None:
        """A new request."""
        self.prompt[self.next] = prompt if prompt is not None else self.random.choice([50, 400, 3000])
        request, self.next = self.next, self.next + 1
        self.generated[request] = 0
        self.tell(RequestArrived(request, self.prompt[request], Slo(1.0, 0.05)))

    def obey(self, order: Action) -> None:
        """Carry one order out."""
        if isinstance(order, (Prefill, Serve)):
            self.generated[order.request] += 1
            if isinstance(order, Serve):
                self.where[order.request] = order.instance
            predicted = float(self.random.randrange(1, 2000))
            self.tell(PrefillDone(order.request, order.instance, self.load(order.instance), predicted))
        elif isinstance(order, Decode):
            self.where[order.request] = order.instance
            self.tell(DecodeStarted(order.request, order.instance, self.load(order.instance)))
        elif isinstance(order, Migrate):
            self.where[order.request] = order.target
            loads = self.load(order.source), self.load(order.target)
            self.tell(MigrationDone(order.request, order.source, order.target, *loads))

    def tick(self) -> None:
        """Everybody gets some tokens on, then the controller looks."""
        for request in self.where:
            self.generated[request] += self.random.randrange(40)
        rows = self.running()
        instances = tuple(sorted(self.up))
        predicted = tuple(float(self.random.randrange(1, 3000)) for _ in rows)
        generated = tuple(self.generated[r] for r in rows)
        self.tell(Tick(instances, tuple(self.load(i) for i in instances), tuple(rows), generated, predicted))

    def finish(self, request: int) -> None:
        """A running request ends."""
        i = self.where.pop(request)
        self.prompt.pop(request)
        self.tell(Finished(request, i, self.generated[request], self.load(i)))

    def fail(self) -> None:
        """A client leaves, a migration fails, a request is preempted and comes back, or an instance dies."""
        kind = self.random.choice(["abort", "migration", "preempt", "down"])
        migrations = [o for o in self.orders if isinstance(o, Migrate)]
        if kind == "abort" and self.prompt:
            request = self.random.choice(sorted(self.prompt))
            self.orders = [o for o in self.orders if getattr(o, "request", -1) != request]
            self.where.pop(request, None)
            self.prompt.pop(request)
            self.tell(Aborted(request))
        elif kind == "migration" and migrations:
            order = self.random.choice(migrations)
            self.orders.remove(order)
            self.tell(MigrationFailed(order.request, order.source, order.target, "test"))
        elif kind == "preempt" and self.running():
            request = self.random.choice(self.running())
            i = self.where.pop(request)
            self.tell(Preempted(request, i, self.load(i)))
            self.where[request] = i
            self.tell(DecodeStarted(request, i, self.load(i)))
        elif kind == "down" and len(self.up) > 3:
            self.down(self.random.choice(sorted(self.up)))

    def down(self, i: int) -> None:
        """An instance dies; migrations that touch it fail first."""
        for order in [o for o in self.orders if isinstance(o, Migrate) and i in (o.source, o.target)]:
            self.orders.remove(order)
            self.tell(MigrationFailed(order.request, order.source, order.target, "instance down"))
        lost = {o.request for o in self.orders if isinstance(o, (Prefill, Serve, Decode)) and o.instance == i}
        lost |= {r for r, where in self.where.items() if where == i}
        self.orders = [o for o in self.orders if getattr(o, "request", -1) not in lost]
        for request in lost:
            self.where.pop(request, None)
        self.up.discard(i)
        rows = tuple(sorted(lost))
        self.tell(InstanceDown(i, rows, tuple(self.generated[r] for r in rows)))

    def drain(self) -> None:
        """Carry out what is left and end all requests; then nothing may be on the books."""
        while self.orders or self.where:
            self.now += 0.01
            if self.orders:
                self.obey(self.orders.pop(0))
            else:
                self.finish(self.running()[0])
        assert not self.controller.requests
        view = self.controller.view
        for i in self.up:
            for column in ("prefill_requests", "prefill_tokens", "pending_requests", "pending_tokens", "moving"):
                assert getattr(view, column)[i] == 0.0, f"{column} of idle instance {i}"
            assert abs(view.prefill_estimate_s[i]) < 1e-9
