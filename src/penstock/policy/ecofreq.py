"""EcoFreq: the lowest clock whose predicted step meets the SLO, chosen step by step (VoltanaLLM, arXiv 2509.04827).

:func:`ecofreq` is the rule with every early exit of the released code; :class:`EcoFreq` asks it from within an engine.
Differing from the code: it is told of the step it decides for, where the code reads the scheduler's metrics of the one
before through a queue; a switch takes no time; and the windows of tokens/s and requests/s count prompts only (for
decode the code's own demo sets them out of reach).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Final

from penstock.core.types import Role
from penstock.policy.ecopred import EcoPred
from penstock.policy.engine import Clock, EngineKit, EngineParts, Job, Situation

IDLE_S: Final = 5.0
"""Without a reading for so long the clock goes to the lowest (code)."""


@dataclass(frozen=True)
class Reading:
    """One step as its scheduler saw it.

    ``waiting`` requests found no place in it, ``batch`` did and hold (decode) or compute (prefill) ``tokens`` tokens;
    the one that has waited longest for its first token has done so for ``waited_s``, 0 in decode steps.
    """

    waiting: int
    batch: int
    tokens: int
    waited_s: float = 0.0


@dataclass(frozen=True)
class Rates:
    """What came in over the window, and above which rates the clock goes to the highest at once; per second."""

    tokens_per_s: float = 0.0
    requests_per_s: float = 0.0
    tokens_threshold: float = inf
    requests_threshold: float = inf


def ecofreq(
    readings: Sequence[Reading],
    current: int,
    levels: Sequence[int],
    predict: Callable[[int, float, float], float],
    slo_s: float,
    margin: float = 0.0,
    rates: Rates | None = None,
    quiet_s: float = 0.0,
) -> int:
    """The clock level to run at.

    Parameters
    ----------
    readings : sequence of Reading
        Those since the rule was last asked, the latest last.
    current : int
        The level now.
    levels : sequence of int
        The levels to choose from, ascending.
    predict : callable
        Seconds of a step from level, batch and tokens.
    slo_s, margin : float
        The target is ``slo_s * (1 + margin)``: a positive margin makes it LOOSER than the SLO.
    rates : Rates, optional
    quiet_s : float
        Seconds since the latest reading, if there is none now.
    """
    highest = levels[-1]
    if rates is not None and (
        rates.tokens_per_s > rates.tokens_threshold or rates.requests_per_s > rates.requests_threshold
    ):
        return highest
    if not readings:
        return levels[0] if quiet_s > IDLE_S else current
    if readings[-1].waiting > 0:
        return highest
    batch = median(reading.batch for reading in readings)
    running = [reading.tokens for reading in readings if reading.tokens > 0]
    tokens = median(running) if running else 0.0
    target_s = slo_s * (1.0 + margin) - max(reading.waited_s for reading in readings)
    for level in levels[:-1]:
        if predict(level, batch, tokens) <= target_s:
            return level
    return highest


@dataclass(frozen=True)
class EcoFreqSettings:
    """What all engines share. ``mhz`` are the instance's clocks, ``levels`` the positions in it to choose from.

    ``ttft_s`` and ``tpot_s`` are the SLO, ``margin`` loosens both; above ``prefill_tps`` prompt tokens/s or
    ``prefill_rps`` prompts/s, over ``window_s``, an engine runs at its highest clock. A choice stands for at most
    ``steps`` decode steps.
    """

    predictor: EcoPred
    mhz: tuple[float, ...]
    levels: tuple[int, ...]
    ttft_s: float
    tpot_s: float
    margin: float = 0.0
    prefill_tps: float = inf
    prefill_rps: float = inf
    window_s: float = 3.0
    steps: int = 16


class EcoFreq(Clock):
    """The rule in one engine, starting at the lowest clock. A step with prompts must meet TTFT, with decodes TPOT."""

    def __init__(self, settings: EcoFreqSettings) -> None:
        self.settings = settings
        self.current = settings.levels[0]
        self._window: deque[tuple[float, int, int]] = deque()
        self._seen: frozenset[int] = frozenset()

    def max_steps(self) -> int:
        """See :class:`Clock`."""
        return self.settings.steps

    def choose(self, situation: Situation, prompts: list[Job], prompt_tokens: int) -> int:
        """See :class:`Clock`. Where one instance does both phases, the higher of the two levels."""
        found = self.settings.levels[0]
        if prompt_tokens > 0:
            found = max(found, self._for_prompts(situation, prompts, prompt_tokens))
        if situation.decodes > 0:
            reading = Reading(situation.waiting, situation.decodes, situation.context)
            s = self.settings
            found = max(found, ecofreq([reading], self.current, s.levels, self._decode_s, s.tpot_s, s.margin))
        self.current = found
        return found

    def _for_prompts(self, situation: Situation, prompts: list[Job], tokens: int) -> int:
        s, now = self.settings, situation.now_s
        here = frozenset(job.request for job in prompts)
        self._window.append((now, tokens, len(here - self._seen)))  # a prompt in chunks is one request
        self._seen = here
        while self._window[0][0] < now - s.window_s:
            self._window.popleft()
        rates = Rates(
            sum(n for _, n, _ in self._window) / s.window_s,
            sum(n for _, _, n in self._window) / s.window_s,
            s.prefill_tps,
            s.prefill_rps,
        )
        waited_s = max((now - job.arrival_s for job in prompts if job.first_token_s < 0.0), default=0.0)
        reading = Reading(situation.waiting, 1, tokens, waited_s)
        return ecofreq([reading], self.current, s.levels, self._prefill_s, s.ttft_s, s.margin, rates)

    def _prefill_s(self, level: int, batch: float, tokens: float) -> float:
        return self.settings.predictor.prefill_s(self.settings.mhz[level], tokens)

    def _decode_s(self, level: int, batch: float, tokens: float) -> float:
        return self.settings.predictor.decode_s(self.settings.mhz[level], batch, tokens)


class FixedClock(Clock):
    """Always the same level: the baselines."""

    def __init__(self, level: int) -> None:
        self.level = level

    def max_steps(self) -> int:
        """See :class:`Clock`."""
        return 1 << 40

    def choose(self, situation: Situation, prompts: list[Job], prompt_tokens: int) -> int:
        """See :class:`Clock`."""
        return self.level


class EcoFreqKit(EngineKit):
    """An :class:`EcoFreq` for every engine."""

    def __init__(self, settings: EcoFreqSettings) -> None:
        self.settings = settings

    def parts(self, instance: int, role: Role) -> EngineParts:
        """See :class:`EngineKit`."""
        return EngineParts(clock=EcoFreq(self.settings))


class FixedClockKit(EngineKit):
    """A :class:`FixedClock` for every engine."""

    def __init__(self, level: int) -> None:
        self.level = level

    def parts(self, instance: int, role: Role) -> EngineParts:
        """See :class:`EngineKit`."""
        return EngineParts(clock=FixedClock(self.level))
