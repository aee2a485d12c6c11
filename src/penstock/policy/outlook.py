"""What each instance will hold: KV tokens over the coming steps, of what runs there and of what was sent since.

ARES projects the loads of what runs at each tick (``variance.project``). Here what has been dispatched since is added
with the survival curve of finished lengths (LightLLM's Past-Future scheduler): a new request is still there after
``p`` tokens with the share of recent requests that were longer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.core.events import Event, Finished, InstanceDown
from penstock.policy.parts import Part, Running
from penstock.policy.variance import project
from penstock.policy.view import ClusterView
from penstock.predict.remaining import History, Predictor


class Outlook(Part):
    """``load`` float64[points, instances]: expected KV tokens of each instance at each point of the horizon."""

    observes = True

    def __init__(self, predictor: Predictor, history: History, horizon: float, points: int) -> None:
        self.predictor = predictor
        self.history = history
        self.points: Any = np.linspace(0.0, horizon, points + 1)
        self.load: Any = np.zeros((points + 1, 0))
        self.sent: dict[int, tuple[int, Any]] = {}

    def of(self, tokens: float) -> Any:
        """Expected KV tokens of a new request with a prompt of ``tokens`` at each point, float64[points]."""
        return (tokens + self.points) * self.history.survival(self.points)

    def of_instances(self, rows: Any, size: int) -> Any:
        """Expected KV tokens of ``rows`` (intp[k]) of ``size`` instances at each point, float64[points, k]."""
        self._fit(size)
        return self.load[:, rows]

    def _fit(self, size: int) -> None:
        if self.load.shape[1] >= size:
            return
        grown = np.zeros((len(self.points), size))
        grown[:, : self.load.shape[1]] = self.load
        self.load = grown

    def send(self, request: int, instance: int, own: Any) -> None:
        """A request was dispatched; ``own`` as :meth:`of` gives it."""
        self.load[:, instance] += own
        self.sent[request] = (instance, own)

    def look(self, running: Running, view: ClusterView) -> None:
        """Project anew from what runs; what was sent and does not run yet stays as expected."""
        self._fit(view.size)
        generated = running.generated.astype(np.float64)
        left = self.predictor.remaining(generated, running.predicted)
        context = running.prompt + generated
        counted = np.bincount(running.instances, weights=context, minlength=view.size)
        # Promised to who is computed again or on its way; and what decodes but may not be moved.
        held = view.pending_tokens + np.maximum(view.running_tokens - counted, 0.0)
        _, self.load = project(context, left, running.instances, held, self.points)
        for request in running.requests.tolist():
            self.sent.pop(request, None)
        for instance, own in self.sent.values():
            self.load[:, instance] += own

    def observe(self, event: Event, view: ClusterView, now_s: float) -> None:
        """See :class:`Part`."""
        if isinstance(event, Finished):
            self.history.finished(event.generated)
        elif isinstance(event, InstanceDown) and event.instance < self.load.shape[1]:
            self.load[:, event.instance] = 0.0

    def forget(self, request: int, now_s: float) -> None:
        """See :class:`Part`."""
        self.sent.pop(request, None)
