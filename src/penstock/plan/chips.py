"""What a chip costs to make and what power it is rated for: die, memory and TDP arithmetic of SPAD.

Source: SPAD (arXiv 2510.08544), cost and power model and chip table. Costs are of silicon and memory only, without
yield, package or host, so they compare chips; they are not prices. The A100's half cost and half power, and the H100
capped at 450 W, are that paper's baselines (after Splitwise).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from penstock.core.errors import PenstockError
from penstock.perf.hardware import HardwareSpec, hardware_spec
from penstock.perf.lookup import unknown_name

WAFER_MM = 300.0
WAFER_USD = 20_000.0
"""Diameter of a wafer, and its price (4 nm)."""
GDDR7_USD_PER_GB = 3.0
HBM3_USD_PER_GB = 9.0
"""The middle of SPAD's 6 to 12 for HBM3."""
HBM_PACKAGE_W = 30.0
GDDR7_J_PER_BIT = 4.5e-12
CHIP_SHARE_OF_TDP = 0.9
"""The rest of a board's TDP goes to what is around chip and memory."""
H100_DIE_MM2 = 814.0
H100_TDP_W = 700.0
H100_PACKAGES = 5
CHIPS_A_MACHINE = 8


def dies_per_wafer(area_mm2: float) -> float:
    """Dies of ``area_mm2`` on one wafer, edge loss included: ``π 150² / A - π 300 / sqrt(2 A)`` (SPAD)."""
    if not 0 < area_mm2 < WAFER_MM**2 / 8:
        raise PenstockError(f"a die of {area_mm2:g} mm² is out of range", "give mm² above 0 and below 11,250")
    return math.pi * (WAFER_MM / 2) ** 2 / area_mm2 - math.pi * WAFER_MM / math.sqrt(2 * area_mm2)


def die_usd(area_mm2: float) -> float:
    """US dollars of one die, without yield (SPAD)."""
    return WAFER_USD / dies_per_wafer(area_mm2)


def h100_w_per_mm2() -> float:
    """Power density of an H100's die: TDP times 0.9, less its five HBM packages, over its area (0.5897 W/mm²)."""
    return (H100_TDP_W * CHIP_SHARE_OF_TDP - H100_PACKAGES * HBM_PACKAGE_W) / H100_DIE_MM2


@dataclass(frozen=True)
class Memory:
    """Device memory of a chip: ``hbm3`` or ``gddr7``, GB (2^30 bytes), packages, bytes/s."""

    kind: str
    gb: float
    packages: int
    bandwidth_Bps: float

    @property
    def usd(self) -> float:
        """US dollars."""
        return self.gb * (HBM3_USD_PER_GB if self.kind == "hbm3" else GDDR7_USD_PER_GB)

    @property
    def watts(self) -> float:
        """Power at full bandwidth: by package for HBM, by bit for GDDR7."""
        if self.kind == "hbm3":
            return self.packages * HBM_PACKAGE_W
        return self.bandwidth_Bps * 8 * GDDR7_J_PER_BIT


@dataclass(frozen=True)
class Chip:
    """A kind of accelerator in the arithmetic of cost and power.

    ``hardware`` is its entry of the hardware catalogue (rates); ``area_mm2`` and ``memory`` make its cost and TDP;
    ``like`` with ``share`` takes a share of another chip's cost instead; ``tdp_w`` None means by area and memory.
    ``compute_share`` scales its FLOP/s (a power cap).
    """

    name: str
    hardware: str
    area_mm2: float | None = None
    memory: Memory | None = None
    like: str | None = None
    share: float = 1.0
    tdp_given_w: float | None = None
    compute_share: float = 1.0
    note: str = ""

    @cached_property
    def usd(self) -> float:
        """Die and memory, US dollars."""
        if self.area_mm2 is None or self.memory is None:
            assert self.like is not None
            return self.share * chip(self.like).usd
        return die_usd(self.area_mm2) + self.memory.usd

    @cached_property
    def tdp_w(self) -> float:
        """Thermal design power, W."""
        if self.tdp_given_w is not None:
            return self.tdp_given_w
        assert self.area_mm2 is not None and self.memory is not None
        return (h100_w_per_mm2() * self.area_mm2 + self.memory.watts) / CHIP_SHARE_OF_TDP

    @property
    def cost(self) -> float:
        """Cost relative to an H100's."""
        return self.usd / chip("h100").usd

    @property
    def power(self) -> float:
        """TDP relative to an H100's."""
        return self.tdp_w / chip("h100").tdp_w

    def spec(self) -> HardwareSpec:
        """Rates for step models; a power cap scales FLOP/s and leaves memory bandwidth (ours)."""
        found = hardware_spec(self.hardware)
        if self.compute_share == 1:
            return found
        flops = {dtype: rate * self.compute_share for dtype, rate in found.flops.items()}
        return replace(found, name=self.name, flops=flops, tdp_w=self.tdp_w)


_GB = 1e9
CHIPS: Mapping[str, Chip] = {
    one.name: one
    for one in (
        Chip("h100", "h100", H100_DIE_MM2, Memory("hbm3", 80, H100_PACKAGES, 3352 * _GB), tdp_given_w=H100_TDP_W),
        Chip("a100", "a100-80g", like="h100", share=0.5, tdp_given_w=H100_TDP_W / 2, note="half of an H100 (SPAD)"),
        Chip(
            "h100-450w",
            "h100",
            like="h100",
            tdp_given_w=450.0,
            compute_share=450 / 700,
            note="H100 capped at 450 W (SPAD); compute taken as 450/700 (ours)",
        ),
        Chip("spad-prefill", "spad-prefill", 784.0, Memory("gddr7", 64, 16, 2048 * _GB), note="simulated, no silicon"),
        Chip("spad-decode", "spad-decode", 520.0, Memory("hbm3", 80, 5, 3352 * _GB), note="simulated, no silicon"),
    )
}
"""The machine types of SPAD's comparison, by name."""


def chip(name: str) -> Chip:
    """The chip of that name. Raises PenstockError naming close matches."""
    if name not in CHIPS:
        raise unknown_name("machine type", name, list(CHIPS))
    return CHIPS[name]


Mix = dict[str, int]
"""Machines by type."""


def parse_mix(text: str) -> Mix:
    """``18xspad-prefill+7xspad-decode`` as machines by type. Raises PenstockError for what cannot be read."""
    found: Mix = {}
    for part in text.split("+"):
        count, x, name = part.strip().partition("x")
        if not (x and count.isdigit() and int(count) > 0):
            raise PenstockError(f"mix {text!r} cannot be read", "write 18xspad-prefill+7xspad-decode")
        found[chip(name.strip()).name] = found.get(name.strip(), 0) + int(count)
    return found


def mix_cost(mix: Mapping[str, int]) -> float:
    """Hardware cost of machines by type, in H100 machines."""
    return sum(n * chip(name).cost for name, n in mix.items())


def mix_power(mix: Mapping[str, int]) -> float:
    """TDP of machines by type, in H100 machines."""
    return sum(n * chip(name).power for name, n in mix.items())


def saving(mine: float, theirs: float) -> float:
    """What ``mine`` saves against ``theirs``, as a share (negative: costs more)."""
    return 1 - mine / theirs


def mix_text(mix: Mapping[str, int]) -> str:
    """``18xspad-prefill+7xspad-decode``."""
    return "+".join(f"{n}x{name}" for name, n in mix.items() if n)
