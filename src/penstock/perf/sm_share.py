"""What a step costs on a part of one GPU's SMs, alone on the chip (DuetServe, arXiv 2511.04791, section 3).

``Pi(S)``, the FLOP/s that S SMs reach, is proportional to S. ``BW(S)``, the memory bandwidth they can draw, rises in
proportion too and saturates early, since few SMs keep enough loads in flight to fill HBM. DuetServe profiles both once
for each partition size; a catalogue has no such profile, so :class:`SmCurve` is a line that bends once.
What two partitions do to each other is not in here: see ``contention``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from penstock.core.errors import PenstockError
from penstock.perf.hardware import HardwareSpec
from penstock.perf.step import StepModel

SATURATION: Final = 0.3
"""Share of the SMs that saturates HBM: ours, and that of the vectors we test against; no profile is published."""
TPC_SMS: Final = 2
"""SMs of a texture processing cluster, the smallest unit that ``libsmctrl`` masks."""


@dataclass(frozen=True)
class SmCurve:
    """Shares of the chip's FLOP/s and bandwidth that a number of its SMs reach.

    ``sms`` is the chip's count, ``unit`` the step in which it can be divided, ``saturation`` the share of the SMs from
    which on they draw all the bandwidth.

    Raises
    ------
    PenstockError
        Fewer than two units, or a saturation outside (0, 1].
    """

    sms: int
    saturation: float = SATURATION
    unit: int = TPC_SMS

    def __post_init__(self) -> None:
        if self.unit < 1 or self.sms < 2 * self.unit:
            raise PenstockError(f"{self.sms} SMs cannot be divided", "give the number of SMs of the GPU, as 132 (H100)")
        if not 0.0 < self.saturation <= 1.0:
            raise PenstockError(f"saturation {self.saturation:g} is no share", "use a number above 0, at most 1")

    def compute(self, sms: int) -> float:
        """``Pi(S) / Pi``."""
        return sms / self.sms

    def bandwidth(self, sms: int) -> float:
        """``BW(S) / BW``."""
        return min(1.0, sms / (self.saturation * self.sms))

    def parts(self) -> range:
        """Sizes that leave room for another part, in SMs, ascending."""
        return range(self.unit, self.sms - self.unit + 1, self.unit)


def sm_count(hardware: HardwareSpec) -> int:
    """SMs of an accelerator. Raises PenstockError where the catalogue has no number."""
    if hardware.sms == 0:
        raise PenstockError(f"the number of SMs of {hardware.name} is not known", "use one that has it, as h100")
    return hardware.sms


def bandwidth_share(hardware: HardwareSpec, sms: int, saturation: float = SATURATION) -> float:
    """``BW(S) / BW`` of ``sms`` SMs of an accelerator. Raises PenstockError as :func:`sm_count` does."""
    return SmCurve(sm_count(hardware), saturation).bandwidth(sms)


class SharedGpu:
    """One GPU's step model for every number of its SMs; ``whole`` is the model on all of them."""

    def __init__(self, whole: StepModel, curve: SmCurve) -> None:
        self.whole = whole
        self.curve = curve
        self._parts: dict[int, StepModel] = {curve.sms: whole}

    def on(self, sms: int) -> StepModel:
        """The step model of ``sms`` SMs. Raises PenstockError where the whole one cannot be divided."""
        known = self._parts.get(sms)
        if known is None:
            known = self.whole.part(self.curve.compute(sms), self.curve.bandwidth(sms))
            self._parts[sms] = known
        return known


def shared_gpu(whole: StepModel, saturation: float = SATURATION) -> SharedGpu:
    """The GPU that ``whole`` runs on. Raises PenstockError if its step model does not know the SMs."""
    count = whole.sms()
    if count == 0:
        raise PenstockError(
            f"a {type(whole).__name__} does not know the SMs of its GPU",
            "use the roofline (drop --profile) of hardware with known SMs, as h100",
        )
    return SharedGpu(whole, SmCurve(count, saturation))
