"""How much of the prompts sent to an instance is still to be computed, between the events that say so.

The view counts a prompt in full until its first token. Of one that takes many steps, most may be done by then; whoever
waits for that event leaves steps half empty. Here what has likely been computed since the last event is taken off.
Engines compute prompts in the order in which they came, so that this is never more than the first of them.
"""

from __future__ import annotations

from penstock.core.events import Event, PrefillDone
from penstock.policy.parts import Part
from penstock.policy.view import ClusterView


class Backlog(Part):
    """Prompts under way by instance, first come first served."""

    observes = True

    def __init__(self) -> None:
        self._queues: dict[int, dict[int, int]] = {}  # tokens by request, in order
        self._since_s: dict[int, float] = {}  # when the first began
        self._home: dict[int, int] = {}

    def send(self, request: int, instance: int, tokens: int, now_s: float) -> None:
        """A prompt was dispatched."""
        self._leave(request, now_s)
        queue = self._queues.setdefault(instance, {})
        if not queue:
            self._since_s[instance] = now_s
        queue[request] = tokens
        self._home[request] = instance

    def computed(self, instance: int, rate: float, now_s: float) -> float:
        """Tokens of the first prompt that are likely computed, at ``rate`` tokens/s."""
        queue = self._queues.get(instance)
        if not queue:
            return 0.0
        return min(float(next(iter(queue.values()))), rate * (now_s - self._since_s[instance]))

    def observe(self, event: Event, view: ClusterView, now_s: float) -> None:
        """See :class:`Part`."""
        if isinstance(event, PrefillDone):
            self._leave(event.request, now_s)

    def forget(self, request: int, now_s: float) -> None:
        """See :class:`Part`."""
        self._leave(request, now_s)

    def _leave(self, request: int, now_s: float) -> None:
        instance = self._home.pop(request, None)
        if instance is not None:
            queue = self._queues[instance]
            if next(iter(queue)) == request:
                self._since_s[instance] = now_s
            del queue[request]
