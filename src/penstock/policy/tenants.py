"""Which SLOs live where: the tightest TPOT among the requests of each instance, kept from events."""

from __future__ import annotations

from math import inf

from penstock.core.events import Event, MigrationDone
from penstock.policy.parts import Part
from penstock.policy.view import ClusterView, RequestRecord


class Tenants(Part):
    """Requests by instance and TPOT target. Placements call :meth:`move_in`; the rest follows from events."""

    observes = True

    def __init__(self) -> None:
        self._home: dict[int, tuple[int, float]] = {}
        self._count: dict[int, dict[float, int]] = {}

    def tightest_s(self, instance: int) -> float:
        """The least TPOT target on an instance, inf if nobody there has one."""
        return min(self._count.get(instance, ()), default=inf)

    def move_in(self, request: int, instance: int, tpot_s: float) -> None:
        """A request has been given an instance."""
        self._leave(request)
        self._enter(request, instance, tpot_s)

    def observe(self, event: Event, view: ClusterView, now_s: float) -> None:
        """See :class:`Part`."""
        if isinstance(event, MigrationDone):
            home = self._home.get(event.request)
            if home is not None:
                self.move_in(event.request, event.target, home[1])

    def forget(self, request: int, now_s: float) -> None:
        """See :class:`Part`."""
        self._leave(request)

    def adopt(self, request: RequestRecord, instance: int, now_s: float) -> None:
        """See :class:`Part`."""
        self.move_in(request.request, instance, request.slo.tpot_s)

    def _enter(self, request: int, instance: int, tpot_s: float) -> None:
        self._home[request] = (instance, tpot_s)
        count = self._count.setdefault(instance, {})
        count[tpot_s] = count.get(tpot_s, 0) + 1

    def _leave(self, request: int) -> None:
        home = self._home.pop(request, None)
        if home is None:
            return
        count = self._count[home[0]]
        count[home[1]] -= 1
        if not count[home[1]]:
            del count[home[1]]
