"""Power of an accelerator by clock and by what it does, and the joules that follow from how long it did it.

``P = idle + memory * m + dynamic * a * (f / f_max) ** 3`` while a step runs, ``idle`` otherwise: dynamic power is
capacitance x voltage squared x clock, and voltage falls with the clock (VoltanaLLM, arXiv 2509.04827, has the measured
U-shaped energy curve that such a model gives). ``a`` and ``m`` say how much of the cores and of the memory bandwidth
a kind of step uses. This is a model: its watts (``catalogue/hardware.json``) are shares of the TDP, not measurements
of steps, so energies compare policies on one machine and are no claim about joules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from penstock.perf.step import StepModel

PROMPT_ACTIVITY = 1.0
"""Share of the dynamic power that a step with prompt tokens draws: prefill computes all the time. Ours."""
PROMPT_MEMORY = 0.4
"""Share of the memory power in such a step. Ours."""
DECODE_ACTIVITY = 0.75
"""Share of the dynamic power that a pure decode step draws: its cores wait for memory, yet are clocked. Ours."""
DECODE_MEMORY = 1.0
"""Share of the memory power in such a step: it reads weights and KV all the time. Ours."""
CLOCK_POWER = 3.0
"""Exponent of the clock in the dynamic power (voltage squared x frequency, voltage proportional to frequency)."""


@dataclass(frozen=True)
class PowerModel:
    """Watts of one instance: ``idle_w`` always, ``memory_w`` at full bandwidth, ``dynamic_w`` at full use and clock."""

    idle_w: float
    memory_w: float
    dynamic_w: float
    prompt_activity: float = PROMPT_ACTIVITY
    prompt_memory: float = PROMPT_MEMORY
    decode_activity: float = DECODE_ACTIVITY
    decode_memory: float = DECODE_MEMORY

    def busy_w(self, clock: float, prompt: bool) -> float:
        """Watts during a step at ``clock`` (share of the highest); ``prompt``: one that computes prompt tokens."""
        activity = self.prompt_activity if prompt else self.decode_activity
        memory = self.prompt_memory if prompt else self.decode_memory
        dynamic: float = self.dynamic_w * activity * clock**CLOCK_POWER
        return self.idle_w + self.memory_w * memory + dynamic

    def times(self, cards: int) -> PowerModel:
        """The power of an instance of ``cards`` such cards."""
        return replace(
            self,
            idle_w=self.idle_w * cards,
            memory_w=self.memory_w * cards,
            dynamic_w=self.dynamic_w * cards,
        )


@dataclass(frozen=True)
class ClockLevel:
    """A clock that an instance can run at, in MHz, and what its steps cost there."""

    mhz: float
    step_model: StepModel


def busy_joules(
    power: PowerModel, mhz: Sequence[float], prompt_s: Iterable[float], decode_s: Iterable[float]
) -> list[float]:
    """Joules of the steps at each level.

    ``mhz`` are the levels, ascending; ``prompt_s`` and ``decode_s`` the seconds of steps with and without prompt
    tokens at each.
    """
    top = mhz[-1]
    return [
        power.busy_w(f / top, True) * p + power.busy_w(f / top, False) * d
        for f, p, d in zip(mhz, prompt_s, decode_s, strict=True)
    ]
