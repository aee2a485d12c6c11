"""Joules of a run: from the columns of the power model to figures per request and per token."""

from __future__ import annotations

import numpy as np

from penstock.sim.result import Outcome, SimResult


def run_energy(result: SimResult) -> dict[str, float | None]:
    """The energy figures of :class:`penstock.report.schema.RunMetrics`; all None unless every instance has a model."""
    energy = result.instances.energy
    if energy is None or not len(energy.energy_j) or bool(np.isnan(energy.energy_j).any()):
        return dict.fromkeys(("energy_j", "idle_j", "joules_per_request", "joules_per_token"))
    total = float(energy.energy_j.sum())
    finished = int(np.count_nonzero(result.requests.outcome == Outcome.FINISHED))
    tokens = int(result.requests.emitted.sum())
    return {
        "energy_j": total,
        "idle_j": float(energy.idle_j.sum()),
        "joules_per_request": total / finished if finished else None,
        "joules_per_token": total / tokens if tokens else None,
    }


def instance_energy(result: SimResult, i: int) -> tuple[float | None, float | None, dict[str, float] | None]:
    """``energy_j``, ``idle_j`` and ``clock_busy_s`` of one instance (``penstock.report.schema.InstanceMetrics``)."""
    energy = result.instances.energy
    if energy is None:
        return None, None, None
    known = not np.isnan(energy.energy_j[i])
    clocks = {
        f"{mhz:g}": float(busy)
        for mhz, busy in zip(energy.clock_mhz[i], energy.clock_busy_s[i], strict=True)
        if not np.isnan(mhz)
    }
    joules = (float(energy.energy_j[i]), float(energy.idle_j[i])) if known else (None, None)
    return *joules, clocks or None
