"""Engine time: real time at a factor, which stands still while an instance hangs."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable


class Clock:
    """Seconds of an engine's own time since it began; ``speed`` of them pass in a second."""

    def __init__(self, speed: float) -> None:
        self.speed = speed
        self._origin_s = time.monotonic()
        self._frozen_s = math.nan

    def now(self) -> float:
        """Engine seconds."""
        if self._frozen_s == self._frozen_s:
            return self._frozen_s
        return (time.monotonic() - self._origin_s) * self.speed

    def freeze(self) -> None:
        """Stand still."""
        self._frozen_s = self.now()

    def thaw(self) -> None:
        """Go on from where it stood."""
        self._origin_s = time.monotonic() - self._frozen_s / self.speed
        self._frozen_s = math.nan

    def call_at(self, when_s: float, what: Callable[[], None]) -> asyncio.Handle:
        """Have ``what`` called at an engine time, or right after (the event loop's timers count milliseconds)."""
        loop = asyncio.get_running_loop()
        delay_s = (when_s - self.now()) / self.speed
        if delay_s <= 0.0:
            return loop.call_soon(what)
        return loop.call_later(math.ceil(delay_s * 1000.0) / 1000.0, what)
