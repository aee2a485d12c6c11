"""ARES / STAR (arXiv 2510.13668): move running decodes so that instances' loads stay even now *and* later.

From the paper: the load of an instance joins its current tokens and those its requests are predicted to add; each is
over- or underloaded against the mean; a request moves only if it runs longer than its migration takes and the target
can hold it; among all such moves the one that lowers the variance most is made, if any lowers it. Dispatch at the end
of prefill uses prompt, predicted length and current loads.

Not given (by what we could obtain of the paper): horizon, sampled points, decay, margins, reserve, least improvement,
interval, concurrency. All defaults below are ours, chosen by the sweep in ``docs/results/ares.md``. First predictions
are off by thousands of tokens, therefore later points count less, and a prediction never reserves memory at dispatch.
A least gain and one migration in or out per instance keep the classification against the mean from chattering.

The horizon does two things: its weighted points make the objective, and at each of them the target must have room.
The second matters most where memory binds, even without a prediction (every request then grows over the whole
horizon): a request that has just moved is the last admitted on its target, hence the first that vLLM evicts there.

Loads are compared in tokens: with unlike hardware in one pool that is not fair; we found no treatment of it in the
paper.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.core.events import Event, Finished
from penstock.core.types import Slo
from penstock.policy.latency import PrefillFit, TokenFit
from penstock.policy.options import Option, OptionValue, number, word
from penstock.policy.parts import Beliefs, Choice, DecodePlacement, Move, Part, Policy, Rescheduler, Running
from penstock.policy.placement import LeastPrefillWork, least_with_room
from penstock.policy.variance import Search, project
from penstock.policy.view import ClusterView, RequestRecord
from penstock.predict.remaining import History, Nothing, Observed, Predictor

ARES_OPTIONS = (
    Option("predictor", "observed", "where remaining lengths come from", words=("observed", "history", "none")),
    Option("horizon", 2048.0, "decode steps looked ahead, for balance and for room; 0 = now only", low=0.0),
    Option("points", 8.0, "samples of the horizon after now", low=1.0, high=256.0),
    Option("decay", 0.5, "weight of each sample over the one before; 0 = balance present loads", low=0.0, high=1.0),
    Option("margin", 0.05, "share of the mean load beyond which an instance is over- or underloaded", low=0.0),
    Option("amortise", 2.0, "a request must run this many times longer than its migration takes", low=0.0),
    Option("reserve", 0.05, "share of the target's KV cache kept free of moves", low=0.0, high=1.0),
    Option("least_gain", 0.01, "smallest worthwhile move, as a share of the mean load (see docs)", low=0.0),
    Option("most_moves", 16.0, "moves started per tick", low=1.0),
    Option("interval", 0.5, "seconds between ticks", low=0.001),
    Option("window", 1000.0, "finished requests that `history` remembers", "LightLLM", low=1.0),
    Option("quantile", -1.0, "quantile of `history`; negative = its mean", low=-1.0, high=0.999),
)


class Horizon:
    """The sampled points of the future and their weights, and the loads last projected onto them.

    ``future`` (float64[instances]) is the weighted load at the points after now, without the point now. The
    rescheduler sets it at each tick; dispatch adds what it has sent since.
    """

    def __init__(self, steps: float, points: int, decay: float) -> None:
        count = points if steps > 0.0 else 0
        self.points: Any = np.linspace(0.0, steps, count + 1)
        weight = decay ** np.arange(count + 1)
        self.weight: Any = weight / weight.sum()
        self.now_weight = float(self.weight[0])
        self._steps: list[float] = [float(x) for x in self.points[1:]]
        self._weights: list[float] = [float(x) for x in self.weight[1:]]
        self.future: Any = np.zeros(0)

    def extend(self, size: int) -> None:
        """Make ``future`` cover ``size`` instances."""
        grown = np.zeros(size)
        grown[: len(self.future)] = self.future
        self.future = grown

    def later(self, context: float, remaining: float) -> float:
        """Weighted tokens of one request at the points after now."""
        total = 0.0
        for k in range(len(self._steps)):
            if self._steps[k] >= remaining:
                break
            total += self._weights[k] * (context + self._steps[k])
        return total


class LengthLearner(Part):
    """Tells the predictor the length of every finished request."""

    observes = True

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def observe(self, event: Event, view: ClusterView, now_s: float) -> None:
        """See :class:`Part`."""
        if isinstance(event, Finished):
            self.predictor.finished(event.generated)


class AresDispatch(DecodePlacement):
    """Send a prefilled request where the load is least: tokens now, and those predicted over the horizon.

    Needs an :class:`AresRescheduler` with the same :class:`Horizon` beside it, which projects the loads.
    """

    def __init__(self, horizon: Horizon, predictor: Predictor) -> None:
        self.horizon = horizon
        self.predictor = predictor

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`DecodePlacement`."""
        rows = view.decodes
        horizon = self.horizon
        if len(horizon.future) < view.size:
            horizon.extend(view.size)
        context = request.context_tokens()
        score = horizon.now_weight * view.resident_tokens(now_s, rows) + horizon.future[rows]
        choice = least_with_room(view, rows, score, context)
        if choice.instance >= 0 and horizon.now_weight < 1.0:
            remaining = self.predictor.one(request.generated, request.predicted_remaining)
            horizon.future[choice.instance] += horizon.later(context, remaining)
        return choice


class AresRescheduler(Rescheduler):
    """Migrate from overloaded to underloaded instances where that lowers the weighted variance of loads most."""

    def __init__(
        self,
        beliefs: Beliefs,
        horizon: Horizon,
        predictor: Predictor,
        margin: float = 0.05,
        amortise: float = 2.0,
        reserve: float = 0.05,
        least_gain: float = 0.01,
        most_moves: int = 16,
        interval_s: float = 0.5,
    ) -> None:
        self.beliefs = beliefs
        self.step = TokenFit(beliefs)
        self.horizon = horizon
        self.predictor = predictor
        self.margin = margin
        self.amortise = amortise
        self.reserve = reserve
        self.least_gain = least_gain
        self.most_moves = most_moves
        self.interval_s = interval_s

    def moves(self, running: Running, view: ClusterView, now_s: float) -> list[Move]:
        """See :class:`Rescheduler`. Best first; at most one move in or out per instance, counting those under way."""
        pool = view.decodes if len(view.decodes) > 0 else view.mixed
        place = np.full(view.size, -1, np.int64)
        place[pool] = np.arange(len(pool))
        ids, slot, context, remaining = self._columns(running, place)
        horizon = self.horizon
        tokens, load = project(context, remaining, slot, view.pending_tokens[pool], horizon.points)
        horizon.future = np.zeros(view.size)
        horizon.future[pool] = horizon.weight[1:] @ load[1:]

        overall = horizon.weight @ load
        mean = float(overall.mean()) if len(pool) > 0 else 0.0
        idle = view.moving[pool] == 0.0
        over = idle & (overall > (1.0 + self.margin) * mean) & self.pressed(pool, load, view)
        under = idle & (overall < (1.0 - self.margin) * mean)
        under &= view.decode_requests(pool) + 1.0 <= view.max_running[pool]
        if not over.any() or not under.any():
            return []

        candidates = np.flatnonzero(over[slot])
        candidates = candidates[slot[candidates].astype(np.int32).argsort(kind="stable")]
        targets = np.flatnonzero(under)
        slow = view.slow[pool[targets]]
        search = Search(
            np.ascontiguousarray(tokens[:, candidates]),
            slot[candidates],
            load,
            horizon.weight,
            targets,
            self.room(pool[targets], view),
            self._patience(context[candidates], remaining[candidates]),
            self.step.slope * slow,
            self.step.intercept * slow,
        )
        found = search.best(self.most_moves, (self.least_gain * mean) ** 2)
        return [
            Move(int(ids[candidates[c]]), int(pool[slot[candidates[c]]]), int(pool[d]), "variance") for c, d, _ in found
        ]

    def pressed(self, rows: Any, load: Any, view: ClusterView) -> Any:
        """Which of the instances ``rows`` may send decodes away, bool[m]; ``load`` is float64[points, m]."""
        return np.ones(len(rows), np.bool_)

    def room(self, rows: Any, view: ClusterView) -> Any:
        """Most KV tokens that the instances ``rows`` may come to hold by moves, float64[m]."""
        return view.capacity_tokens[rows] * (1.0 - self.reserve)

    def _columns(self, running: Running, place: Any) -> tuple[Any, Any, Any, Any]:
        """Ids, slots in the pool, context and predicted remaining tokens of what runs in the pool."""
        slot = place[running.instances]
        ids, generated = running.requests, running.generated.astype(np.float64)
        context = running.prompt + generated
        predicted = running.predicted
        inside = slot >= 0
        if not inside.all():
            ids, slot, context, generated = ids[inside], slot[inside], context[inside], generated[inside]
            predicted = predicted[inside]
        return ids, slot, context, self.predictor.remaining(generated, predicted)

    def _patience(self, context: Any, remaining: Any) -> Any:
        """Remaining steps over the seconds a migration must pay back, float64[n]; inf if it costs nothing."""
        beliefs = self.beliefs
        move_s = beliefs.link_latency_s + context * (beliefs.kv_bytes_per_token / beliefs.link_bytes_per_s)
        return remaining / np.maximum(self.amortise * move_s, 1e-12)


def predictor_part(word: str, window: int, quantile: float) -> Predictor:
    """The predictor of that name; ``observed`` falls back to ``history`` where the world predicts nothing."""
    if word == "none":
        return Nothing()
    history = History(window, quantile)
    return history if word == "history" else Observed(history)


def ares(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``ares`` or one of its variants, which differ in their default options and in the world's predictor."""
    predictor = predictor_part(word(options, "predictor"), int(number(options, "window")), number(options, "quantile"))
    horizon = Horizon(number(options, "horizon"), int(number(options, "points")), number(options, "decay"))
    rescheduler = AresRescheduler(
        beliefs,
        horizon,
        predictor,
        number(options, "margin"),
        number(options, "amortise"),
        number(options, "reserve"),
        number(options, "least_gain"),
        int(number(options, "most_moves")),
        number(options, "interval"),
    )
    observers = (LengthLearner(predictor),) if predictor.learns else ()
    return Policy(
        "ares",
        LeastPrefillWork(PrefillFit(beliefs)),
        AresDispatch(horizon, predictor),
        rescheduler=rescheduler,
        observers=observers,
    )
