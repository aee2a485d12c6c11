"""What two partitions of a GPU do to each other: they share its HBM. Ours; DuetServe's model has no such term.

For the truth only. Alone on the chip each partition draws the bandwidth that its SMs can; together they may ask for
more than there is. A step is taken as a mixture of two phases: operators bound by memory, which ask for all that their
SMs can draw, and operators bound by compute, which ask for less. Whenever the two phases that meet ask for more than
the chip has, both partitions slow down in proportion. Which phases meet is left to chance: each is met for the share of
the time that it takes, slowed down as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from penstock.perf.sm_share import SharedGpu
from penstock.perf.step import StepModel

_FASTER: Final = 1e-4
"""A memory faster by this share tells how much of a step waits for memory."""
_CRAWLING: Final = 1e-9
"""With this share of the bandwidth, nothing but memory counts."""
_ROUNDS: Final = 100
_EXACT: Final = 1e-12


class Phases(NamedTuple):
    """A step alone on its partition: seconds bound by compute and by memory, and the share of the chip's reachable
    bandwidth that it draws meanwhile.
    """

    compute_s: float
    memory_s: float
    compute_draw: float
    memory_draw: float

    def total_s(self) -> float:
        """Seconds of the step."""
        return self.compute_s + self.memory_s


class Contention:
    """Divides steps on partitions of ``gpu`` into phases; ``together`` is the share of the bandwidth that two streams
    reach (below 1 if they spoil each other's open rows).
    """

    def __init__(self, gpu: SharedGpu, together: float = 1.0) -> None:
        self.gpu = gpu
        self.together = together
        self._probes: dict[int, tuple[StepModel, StepModel, StepModel]] = {}

    def phases(self, sms: int, seconds: Callable[[StepModel], float]) -> Phases:
        """The phases on ``sms`` SMs of the step that takes ``seconds(model)`` under a step model."""
        compute, bandwidth = self.gpu.curve.compute(sms), self.gpu.curve.bandwidth(sms)
        probes = self._probes.get(sms)
        if probes is None:
            whole = self.gpu.whole
            faster = whole.part(compute, bandwidth * (1.0 + _FASTER))
            probes = self.gpu.on(sms), faster, whole.part(compute, _CRAWLING)
            self._probes[sms] = probes
        model, faster, crawling = probes
        total_s = seconds(model)
        memory_s = min(total_s, (total_s - seconds(faster)) * (1.0 + _FASTER) / _FASTER)
        compute_s = total_s - memory_s
        moved = seconds(crawling) * _CRAWLING  # in seconds of the chip's whole bandwidth
        rest = max(0.0, moved - memory_s * bandwidth)
        draw = min(bandwidth, rest / compute_s) if compute_s > 1e-6 * total_s else bandwidth
        return Phases(compute_s, memory_s, draw, bandwidth)

    def stretch(self, one: Phases, other: Phases) -> tuple[float, float]:
        """How many times longer each takes while the other runs, both 1 or more."""
        return stretch(one, other, self.together)


def stretch(one: Phases, other: Phases, together: float = 1.0) -> tuple[float, float]:
    """How many times longer two steps take while both run, each again and again; both 1 or more.

    ``together`` is the share of the chip's reachable bandwidth that both can draw at once.
    """
    a, b = _memory_share(one.compute_s, one.memory_s), _memory_share(other.compute_s, other.memory_s)
    for _ in range(_ROUNDS):
        slow_a = _slowed(one, other, b, together)
        slow_b = _slowed(other, one, a, together)
        next_a, next_b = _memory_share(*slow_a), _memory_share(*slow_b)
        done = abs(next_a - a) + abs(next_b - b) < _EXACT
        a, b = next_a, next_b
        if done:
            break
    return _ratio(one, _slowed(one, other, b, together)), _ratio(other, _slowed(other, one, a, together))


def _slowed(mine: Phases, other: Phases, other_in_memory: float, together: float) -> tuple[float, float]:
    """Seconds of my two phases, if the other is bound by memory for that share of the time."""

    def speed(draw: float) -> float:
        in_memory = _granted(draw, other.memory_draw, together)
        in_compute = _granted(draw, other.compute_draw, together)
        return other_in_memory * in_memory + (1.0 - other_in_memory) * in_compute

    return mine.compute_s / speed(mine.compute_draw), mine.memory_s / speed(mine.memory_draw)


def _granted(draw: float, other: float, together: float) -> float:
    """The share of what it asks for that each gets."""
    asked = draw + other
    return 1.0 if asked <= together else together / asked


def _memory_share(compute_s: float, memory_s: float) -> float:
    total_s = compute_s + memory_s
    return memory_s / total_s if total_s > 0.0 else 0.0


def _ratio(alone: Phases, slowed: tuple[float, float]) -> float:
    total_s = alone.total_s()
    return max(1.0, (slowed[0] + slowed[1]) / total_s) if total_s > 0.0 else 1.0
