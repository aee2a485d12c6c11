"""Arrow's loads, measured: prefill seconds queued and inter-token latency, each averaged over the review interval."""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.core.events import (
    DecodeStarted,
    Event,
    Finished,
    InstanceDown,
    InstanceUp,
    MigrationDone,
    Preempted,
    PrefillDone,
    Tick,
)
from penstock.core.types import Slo
from penstock.policy.view import ClusterView


class LoadMonitor:
    """Integrates, between reviews, what a look at the review alone would miss.

    Prefill load of an instance = time average of the believed prefill seconds on it / TTFT target. Decode load =
    (latency - floor) / (TPOT target - floor); latency is the time average of its step durations while it decodes, or
    the time since it last made progress if that is longer; floor is the step of an empty batch.
    """

    def __init__(self, slo: Slo, floor_s: float) -> None:
        self.slo = slo
        self.floor_s = floor_s
        self.size = 0
        self._since_s = -1.0
        self._from_s = 0.0
        self._held_s: Any = np.zeros(0)
        self._area: Any = np.zeros(0)
        self._step_s: list[float] = []
        self._step_from_s: list[float] = []
        self._step_area: list[float] = []
        self._busy_s: list[float] = []
        self._tokens: list[float] = []
        self._requests: list[int] = []
        self._progress_s: list[float] = []

    def observe(self, event: Event, view: ClusterView, now_s: float) -> None:
        """Take note of an event; the view already shows its effect."""
        if self._since_s < 0.0:
            self._since_s = self._from_s = now_s
        if view.size > self.size:
            self._grow(view.size, now_s)
        if isinstance(event, (DecodeStarted, PrefillDone, Finished, Preempted)):
            self._step(event.instance, event.load.step_s if event.load.running > 0 else 0.0, now_s)
            if not isinstance(event, PrefillDone):
                self._progress_s[event.instance] = now_s
        elif isinstance(event, MigrationDone):
            self._step(event.source, event.source_load.step_s if event.source_load.running > 0 else 0.0, now_s)
            self._step(event.target, event.target_load.step_s if event.target_load.running > 0 else 0.0, now_s)
            self._progress_s[event.source] = self._progress_s[event.target] = now_s
        elif isinstance(event, (InstanceUp, InstanceDown)):
            self._step(event.instance, 0.0, now_s)
            self._progress_s[event.instance] = now_s
        elif isinstance(event, Tick):
            for k in range(len(event.instances)):
                load = event.loads[k]
                self._step(event.instances[k], load.step_s if load.running > 0 else 0.0, now_s)
                i = event.instances[k]
                # The engine's own waiting line is no measure: on an instance just flipped it is prefills left over.
                self._progress(i, float(load.decode_tokens), load.running + int(view.pending_requests[i]), now_s)
        if isinstance(event, DecodeStarted):
            return  # the only frequent event that leaves prefill work alone
        if now_s > self._from_s:
            self._area += self._held_s * (now_s - self._from_s)
            self._from_s = now_s
        np.copyto(self._held_s, view.prefill_estimate_s)

    def pool_loads(self, view: ClusterView, now_s: float) -> tuple[float, float]:
        """Mean prefill load over the prefill pool, mean decode load over the decode pool; starts a new interval."""
        span = now_s - self._since_s
        if self._since_s < 0.0 or span <= 0.0 or self.size < view.size:
            return 0.0, 0.0
        self._area += self._held_s * (now_s - self._from_s)
        self._from_s = now_s
        prefill = decode = 0.0
        if len(view.prefills) > 0:
            prefill = float((self._area * view.slow)[view.prefills].mean()) / span / self.slo.ttft_s
        if len(view.decodes) > 0:
            loads = [self._decode_load(int(i), now_s) for i in view.decodes]
            decode = sum(loads) / len(loads)
        self._area[:] = 0.0
        for i in range(self.size):
            self._step(i, self._step_s[i], now_s)
            self._step_area[i] = self._busy_s[i] = 0.0
        self._since_s = now_s
        return prefill, decode

    def _decode_load(self, i: int, now_s: float) -> float:
        self._step(i, self._step_s[i], now_s)
        mean = self._step_area[i] / self._busy_s[i] if self._busy_s[i] > 0.0 else 0.0
        latency = max(mean, now_s - self._progress_s[i])
        if latency <= self.floor_s:
            return 0.0
        room = self.slo.tpot_s - self.floor_s
        # A target below the floor cannot be met by any batch: any work at all is overload.
        return (latency - self.floor_s) / room if room > 0.0 else 1e9

    def _step(self, i: int, step_s: float, now_s: float) -> None:
        """Close the stretch of the former step duration on ``i`` and begin one of ``step_s`` (0 = idle)."""
        former = self._step_s[i]
        if former > 0.0:
            span = now_s - self._step_from_s[i]
            self._step_area[i] += former * span
            self._busy_s[i] += span
        self._step_s[i] = step_s
        self._step_from_s[i] = now_s

    def _progress(self, i: int, tokens: float, requests: int, now_s: float) -> None:
        """An instance without decodes now or at the last look, or whose tokens changed since, is getting on."""
        if requests == 0 or self._requests[i] == 0 or tokens != self._tokens[i]:
            self._progress_s[i] = now_s
        self._tokens[i] = tokens
        self._requests[i] = requests

    def _grow(self, size: int, now_s: float) -> None:
        more = size - self.size
        self._held_s = np.concatenate((self._held_s, np.zeros(more)))
        self._area = np.concatenate((self._area, np.zeros(more)))
        for column in (self._step_s, self._step_area, self._busy_s):
            column.extend([0.0] * more)
        self._tokens.extend([-1.0] * more)
        self._requests.extend([0] * more)
        self._step_from_s.extend([now_s] * more)
        self._progress_s.extend([now_s] * more)
        self.size = size
