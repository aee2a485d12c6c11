"""``auto``, the default: every instance does both phases at the pace its tenants' SLOs allow, fed from one queue.

Ours, from parts whose ideas are others':

* **One queue, late binding** (``doors.py``). Requests wait with the controller. Who can still be on time is served
  first, as many of them as possible (Moore and Hodgson); who cannot is served when nobody else waits, and refused after
  a while. So overload costs the requests that would have missed their SLO anyway, and the dearest of the others.
* **Chunks at the pace of the tightest TPOT** (``pace.py``; Sarathi, PolyServe). With that a decode does not notice the
  prompts beside it, and a step reads the weights once for both phases; no role has to follow the load, because every
  instance has both. How much of a TPOT can be used is learnt from the requests that end (``margin.py``).
* **Admission by outlook** (``outlook.py``; ARES's horizon, LightLLM's survival curve). A request goes only where the
  expected KV, now and over the horizon, keeps a pure decode step within the tightest TPOT and fits in memory: who is
  being served stays within its SLO.
* **Class-aware placement** (``tenants.py``; PolyServe's tiers, without fixed borders). Of the instances that would do,
  those with tenants of the same TPOT come first, so that one tight tenant does not slow the prompts of many loose ones.
* **Rescheduling by predicted length** (``ares.py``): running decodes move where that evens the loads, now and later.
"""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np

from penstock.core.types import Slo
from penstock.policy.ares import AresRescheduler, Horizon
from penstock.policy.backlog import Backlog
from penstock.policy.doors import Doors, Lag
from penstock.policy.latency import BatchFit, PrefillTimes
from penstock.policy.margin import Margin
from penstock.policy.options import Option, OptionValue, number
from penstock.policy.outlook import Outlook
from penstock.policy.pace import Pace, PacedEngines
from penstock.policy.parts import Beliefs, Choice, Move, Policy, PrefillPlacement, Running
from penstock.policy.placement import first_of, that_hold
from penstock.policy.tenants import Tenants
from penstock.policy.view import ClusterView, RequestRecord, Stage
from penstock.predict.remaining import History, Observed

AUTO_OPTIONS = (
    Option(
        "pace", 0.95, "share of the tightest TPOT that a step with prompts may take; 0 = chunks of any size", low=0.0
    ),
    Option(
        "misses",
        0.01,
        "share of requests that may miss TPOT; the margin is learnt, 0 = none is kept",
        low=0.0,
        high=0.5,
    ),
    Option("room", 1.0, "share of the tightest TPOT that a pure decode step may come to take", low=0.1),
    Option("late_room", 0.7, "share of that room that requests may use which are late already", low=0.0, high=1.0),
    Option("ahead", 2.0, "chunks waiting on an instance beyond which it is sent no more", low=0.0),
    Option("horizon", 2048.0, "decode steps looked ahead for room and balance; 0 = now only", low=0.0),
    Option("points", 8.0, "samples of the horizon after now", low=1.0, high=64.0),
    Option("decay", 0.5, "weight of each sample over the one before, for balance", low=0.0, high=1.0),
    Option("reserve", 0.03, "share of the KV cache that dispatch leaves free", low=0.0, high=1.0),
    Option("tiers", 0.5, "how much placement prefers tenants of the same TPOT (per factor e between them)", low=0.0),
    Option("sort", 1.0, "1 = serve as many as possible on time, 0 = first come first served", low=0.0, high=1.0),
    Option("caution", 0.5, "share of the believed rate on which the plan of who is on time counts", low=0.01, high=1.0),
    Option("deviations", 3.0, "mean deviations of the learnt lag that a request must have left to be on time", low=0.0),
    Option("patience", 30.0, "seconds after its TTFT target when a request that is late is refused", low=0.0),
    Option("rescheduling", 1.0, "1 = running decodes move, 0 = they stay", low=0.0, high=1.0),
    Option("pressure", 0.8, "share of an instance's room that it must come to use before decodes leave it", low=0.0),
    Option("interval", 0.5, "seconds between ticks", low=0.001),
)


class AutoPlacement(PrefillPlacement):
    """The open instance with the most room, tenants of the same TPOT first; nobody open: wait.

    An instance is open to a request if it has less than ``ahead`` chunks of prompts waiting and, with the request, its
    expected KV stays within what memory and the tightest TPOT there allow at every point of the horizon. An empty
    instance is open to everybody.
    """

    def __init__(
        self,
        beliefs: Beliefs,
        pace: Pace,
        tenants: Tenants,
        outlook: Outlook,
        lag: Lag,
        backlog: Backlog,
        room: float,
        late_room: float,
        ahead: float,
        tiers: float,
        reserve: float,
    ) -> None:
        self.beliefs = beliefs
        self.pace = pace
        self.margin = pace.margin
        self.tenants = tenants
        self.outlook = outlook
        self.lag = lag
        self.backlog = backlog
        self.room = room
        self.late_room = late_room
        self.ahead = ahead
        self.tiers = tiers
        self.reserve = reserve
        self.step = BatchFit(beliefs)
        self.rate_each = inf
        self.alone = PrefillTimes(beliefs)

    # -- what the waiting room asks ---------------------------------------------------------------------------------

    def open_rate(self, view: ClusterView, now_s: float) -> float:
        """See :class:`penstock.policy.doors.Capacity`."""
        rate = 0.0
        anybody = False
        for i in view.mixed.tolist():
            mine = self._rate(i, view)
            rate += mine
            anybody = anybody or self._left(i, mine, view, now_s) <= self.ahead * self._chunk(i, view)
        return rate if anybody else 0.0

    def prefill_s(self, tokens: int) -> float:
        """See :class:`penstock.policy.doors.Capacity`."""
        return max(self.alone.seconds(tokens), tokens / self.rate_each)

    # -- the decision -----------------------------------------------------------------------------------------------

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`PrefillPlacement`."""
        tokens = request.context_tokens()
        rows = that_hold(view, view.mixed, tokens)
        if len(rows) == 0:
            return first_of(view.mixed)
        tpot_s = self._target_s(request.slo)
        own = self.outlook.of(tokens)
        here = [self.tenants.tightest_s(i) for i in rows.tolist()]
        batch = view.running[rows] + view.prefill_requests[rows] + 1.0
        limit = self._most_tokens(np.minimum(here, tpot_s), batch, rows, view)
        peak = (self.outlook.of_instances(rows, view.size) + own[:, None]).max(axis=0)
        rates = [self._rate(i, view) for i in rows.tolist()]
        self.rate_each = sum(rates) / len(rates)
        queued = np.array([self._left(i, rate, view, now_s) for i, rate in zip(rows.tolist(), rates, strict=True)])
        chunk = np.array([self._chunk(i, view) for i in rows.tolist()], np.float64)
        fits = (queued <= self.ahead * chunk) & (batch <= view.max_running[rows])
        late = self.lag.misses(request, self.prefill_s(tokens), now_s)
        fits &= (peak <= (self.late_room if late else 1.0) * limit) | (batch <= 1.0)
        if not fits.any():
            return Choice.wait()
        score = peak / np.maximum(limit, 1.0) + queued / np.maximum(chunk, 1.0) + self._mismatch(here, tpot_s)
        best = int(rows[np.where(fits, score, np.inf).argmin()])
        if request.stage != Stage.DECODING:  # asked for the target of a move: nothing has happened yet
            self.tenants.move_in(request.request, best, tpot_s)
            self.outlook.send(request.request, best, own)
        if request.stage == Stage.ARRIVED:
            if request.generated == 0:
                self.margin.send(request.request, tpot_s)
            self.backlog.send(request.request, best, tokens, now_s)
            self.lag.send(request.request, now_s, self.prefill_s(tokens))
        return Choice(best)

    def limits(self, rows: Any, view: ClusterView) -> Any:
        """KV tokens that ``rows`` may come to hold for those who are there, float64[k]."""
        here = np.array([self.tenants.tightest_s(i) for i in rows.tolist()])
        return self._most_tokens(here, view.running[rows] + view.prefill_requests[rows], rows, view)

    def _chunk(self, i: int, view: ClusterView) -> int:
        """The chunk that instance ``i`` may take once somebody decodes there, as the first of those sent to it will."""
        decodes = max(int(view.running[i]), 1)
        return self.pace.chunk(decodes, int(view.running_tokens[i]), 0, self.tenants.tightest_s(i))

    def _rate(self, i: int, view: ClusterView) -> float:
        """Prompt tokens/s that instance ``i`` computes in such chunks."""
        decodes = max(int(view.running[i]), 1)
        rate = self.pace.rate(decodes, int(view.running_tokens[i]), self.tenants.tightest_s(i))
        return rate / float(view.slow[i])

    def _left(self, i: int, rate: float, view: ClusterView, now_s: float) -> float:
        """Prompt tokens that instance ``i`` has likely still to compute."""
        return float(view.prefill_tokens[i]) - self.backlog.computed(i, rate, now_s)

    def _most_tokens(self, tightest_s: Any, batch: Any, rows: Any, view: ClusterView) -> Any:
        """KV tokens up to which a pure decode step of ``batch`` stays within the target and memory, float64[k]."""
        step = self.step
        by_memory = (1.0 - self.reserve) * view.capacity_tokens[rows]
        if step.c2 <= 0.0:
            return by_memory
        margin = np.array([self.margin.of(float(tpot_s)) for tpot_s in tightest_s])
        by_pace = (self.room * margin * tightest_s / view.slow[rows] - step.c0 - step.c1 * batch) / step.c2
        return np.minimum(by_pace, by_memory)

    def _target_s(self, slo: Slo) -> float:
        """The TPOT to keep; inf for one that not even a step alone could meet, which must not slow the others."""
        return slo.tpot_s if slo.tpot_s >= self.step.c0 + self.step.c1 else inf

    def _mismatch(self, here: list[float], tpot_s: float) -> Any:
        """How far the tenants' TPOT lies from the request's, float64[k]; 0 where there is none."""
        if self.tiers == 0.0 or tpot_s == inf:
            return np.zeros(len(here))
        there = np.array([tpot_s if other_s == inf else other_s for other_s in here])
        return self.tiers * np.abs(np.log(there / tpot_s))


class AutoRescheduler(AresRescheduler):
    """ARES's moves away from where room gets scarce; each tick also brings the outlook up to date.

    A move costs the request a gap, which is worth it only where staying costs more: where the expected KV comes to
    ``pressure`` of what the placement allows there. ``moving`` False: the outlook only.
    """

    def __init__(
        self,
        placement: AutoPlacement,
        moving: bool,
        pressure: float,
        horizon: Horizon,
        interval_s: float,
    ) -> None:
        super().__init__(placement.beliefs, horizon, placement.outlook.predictor, interval_s=interval_s)
        self.placement = placement
        self.moving = moving
        self.pressure = pressure

    def moves(self, running: Running, view: ClusterView, now_s: float) -> list[Move]:
        """See :class:`Rescheduler`."""
        self.placement.outlook.look(running, view)
        return super().moves(running, view, now_s) if self.moving else []

    def pressed(self, rows: Any, load: Any, view: ClusterView) -> Any:
        """See :class:`AresRescheduler`."""
        return load.max(axis=0) > self.pressure * self.placement.limits(rows, view)

    def room(self, rows: Any, view: ClusterView) -> Any:
        """See :class:`AresRescheduler`."""
        return self.placement.limits(rows, view)


def auto(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``auto``."""
    history = History()
    tenants = Tenants()
    margin = Margin(number(options, "misses"))
    pace = Pace(beliefs, number(options, "pace"), margin)
    steps, points = number(options, "horizon"), int(number(options, "points"))
    outlook = Outlook(Observed(history), history, steps, points)
    lag = Lag(number(options, "deviations"))
    backlog = Backlog()
    placement = AutoPlacement(
        beliefs,
        pace,
        tenants,
        outlook,
        lag,
        backlog,
        room=number(options, "room"),
        late_room=number(options, "late_room"),
        ahead=number(options, "ahead"),
        tiers=number(options, "tiers"),
        reserve=number(options, "reserve"),
    )
    rescheduler = AutoRescheduler(
        placement,
        number(options, "rescheduling") > 0.0,
        number(options, "pressure"),
        Horizon(steps, points, number(options, "decay")),
        number(options, "interval"),
    )
    return Policy(
        "auto",
        placement,
        rescheduler=rescheduler,
        room=Doors(
            placement, lag, number(options, "patience"), number(options, "sort") > 0.0, number(options, "caution")
        ),
        observers=(margin, tenants, outlook, lag, backlog),
        engine=PacedEngines(pace, tenants),
    )
