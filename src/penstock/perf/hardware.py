"""Hardware catalogue: peak rates, memory, links and power of accelerators, each figure with its source."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from penstock.core.errors import PenstockError
from penstock.perf.energy import PowerModel
from penstock.perf.lookup import catalogue_json, unknown_name

DRIVER_SHARE = 0.98
"""Share of the nominal memory that CUDA reports as total (RTX 4090: 25,250,627,584 B of 24 GiB = 0.980, measured in
``ground_truth/RTX4090/Llama-3.1-8B/meta.json``; the rest belongs to driver and firmware)."""


@dataclass(frozen=True)
class HardwareSpec:
    """One accelerator. Rates are peaks of the data sheet; step models multiply them by MFU and MBU.

    ``flops`` maps a number type to dense FLOP/s; ``bandwidth_Bps`` is device memory in bytes/s; ``scale_up_Bps``,
    ``pcie_Bps`` and ``nic_Bps`` are bytes/s of one GPU in ONE direction (data sheets often quote both together).
    ``memory_bytes`` is nominal; ``usable_bytes`` is what an engine sees. ``sms`` counts streaming multiprocessors
    (compute units), 0 where no source gives them. ``clocks_mhz`` are the clock levels that a policy may choose from,
    ascending, none where the card has no known ones; the rates are those of the highest. ``sources`` maps a field to
    where its figure comes from.
    """

    name: str
    full_name: str
    flops: dict[str, float]
    memory_bytes: int
    bandwidth_Bps: float
    scale_up: str
    scale_up_Bps: float
    pcie_Bps: float
    nic_Bps: float
    tdp_w: float
    power: PowerModel
    clocks_mhz: tuple[float, ...] = ()
    sms: int = 0
    sources: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def usable_bytes(self) -> int:
        """Device memory an engine can claim at 100 % utilisation, in bytes."""
        return int(self.memory_bytes * DRIVER_SHARE)

    def flops_of(self, dtype: str) -> float:
        """Peak dense FLOP/s for operands of ``dtype``.

        A type the tensor cores lack runs in bf16 after conversion (fp8 weights on an A100, int4 anywhere).
        """
        return self.flops.get(dtype, self.flops["bf16"])


def _from_row(name: str, row: dict[str, Any]) -> HardwareSpec:
    sources = {key: cell["source"] for key, cell in row.items() if isinstance(cell, dict) and "source" in cell}
    sources |= {f"flops.{dtype}": cell["source"] for dtype, cell in row["flops"].items()}
    return HardwareSpec(
        name=name,
        full_name=row["full_name"],
        flops={dtype: float(cell["value"]) for dtype, cell in row["flops"].items()},
        memory_bytes=int(row["memory_bytes"]["value"]),
        bandwidth_Bps=float(row["bandwidth_Bps"]["value"]),
        scale_up=row["scale_up"],
        scale_up_Bps=float(row["scale_up_Bps"]["value"]),
        pcie_Bps=float(row["pcie_Bps"]["value"]),
        nic_Bps=float(row["nic_Bps"]["value"]),
        tdp_w=float(row["tdp_w"]["value"]),
        power=PowerModel(*(float(row[key]["value"]) for key in ("idle_w", "memory_w", "dynamic_w"))),
        clocks_mhz=tuple(float(mhz) for mhz in row["clocks_mhz"]["value"]) if "clocks_mhz" in row else (),
        sms=int(row["sms"]["value"]) if "sms" in row else 0,
        sources=sources,
    )


@cache
def _builtins() -> dict[str, HardwareSpec]:
    return {name: _from_row(name, row) for name, row in catalogue_json("hardware.json").items()}


_ALIASES = {"a100": "a100-80g", "rtx4090": "rtx-4090", "rtxpro6000": "rtx-pro-6000"}


def hardware_names() -> list[str]:
    """Names of the accelerators in the catalogue, sorted."""
    return sorted(_builtins())


def hardware_spec(name: str) -> HardwareSpec:
    """The accelerator of that name (any case). Raises :class:`PenstockError` naming close matches."""
    key = name.lower()
    found = _builtins().get(_ALIASES.get(key, key))
    if found is None:
        raise unknown_name("hardware", name, hardware_names())
    return found


def check_tp(tp: int, heads: int) -> None:
    """Raises :class:`PenstockError` unless ``tp`` is positive and divides the attention heads (vLLM requires it)."""
    if tp < 1 or heads % tp:
        raise PenstockError(
            f"tensor parallelism {tp} does not divide {heads} attention heads", "choose a divisor of the heads"
        )
