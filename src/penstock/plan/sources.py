"""Where the planner's figures come from: a ``Setup`` (profile or roofline) as a :class:`.Modelled` machine.

The fit errors given to the step models are mean relative errors against measurements; a profile brings its own.
"""

from __future__ import annotations

from penstock.core.errors import PenstockError
from penstock.core.types import Role
from penstock.experiment.build import build_cluster
from penstock.experiment.setup import Setup, replace
from penstock.perf.profile_io import load_profile
from penstock.plan.machine import Modelled

ROOFLINE_PREFILL_ERROR = 0.11
"""Mean size of the roofline's error on prefill steps of four card and model pairs (28, 7, 6 and 4 %;
``docs/results/roofline.md``)."""
ROOFLINE_DECODE_ERROR = 0.07
"""The same on decode steps (7, 5, 7 and 8 %)."""


def modelled(setup: Setup, fit_error: float | None = None) -> Modelled:
    """One prefill and one decode instance of the setup's cluster, whatever their number there.

    ``fit_error`` replaces the relative error of the step times (0.1 is 10 %). Raises PenstockError for an unknown
    model, hardware, profile or link, and for a model that does not fit in memory.
    """
    check_error(fit_error)
    one = replace(setup, policy="static", options={}, cluster=replace(setup.cluster, prefill=1, decode=1, mixed=0))
    cluster = build_cluster(one)
    by_role = {spec.role: spec for spec in cluster.instances}
    c = setup.cluster
    name = f"profile {c.profile}" if c.profile is not None else f"roofline of {c.model} on {machines(setup)}"
    prefill_error, decode_error = errors(c.profile)
    return Modelled(
        by_role[Role.PREFILL],
        by_role[Role.DECODE],
        cluster.kv_bytes_per_token,
        min(spec.link_bytes_per_s for spec in cluster.instances),
        cluster.link_latency_s,
        prefill_error if fit_error is None else fit_error,
        decode_error if fit_error is None else fit_error,
        name,
    )


def errors(profile: str | None) -> tuple[float, float]:
    """Relative errors of prefill and decode steps: a profile's own residuals (0 where it has none), or the roofline's.

    Raises PenstockError for an unknown profile.
    """
    if profile is None:
        return ROOFLINE_PREFILL_ERROR, ROOFLINE_DECODE_ERROR
    found = load_profile(profile).residuals
    both = found.get("all", {}).get("mean", 0.0)
    return found.get("prefill", {}).get("mean", both), found.get("decode", {}).get("mean", both)


def check_error(fit_error: float | None) -> None:
    """Raises PenstockError unless the error is None or in [0, 1)."""
    if fit_error is not None and not 0 <= fit_error < 1:
        raise PenstockError(f"fit error {fit_error:g} is not in [0, 1)", "give --fit-error 0.1 for 10 %")


def machines(setup: Setup) -> str:
    """``h100``, ``2 x h100``, or ``h100 (prefill) and a100-80g (decode)``."""
    kinds = [_kind(*role_hardware(setup, role)) for role in (Role.PREFILL, Role.DECODE)]
    return kinds[0] if kinds[0] == kinds[1] else f"{kinds[0]} (prefill) and {kinds[1]} (decode)"


def role_hardware(setup: Setup, role: Role) -> tuple[str, int]:
    """Hardware name and GPUs of an instance of that role."""
    c = setup.cluster
    if role is Role.PREFILL:
        return c.prefill_hardware or c.hardware, c.tp if c.prefill_tp is None else c.prefill_tp
    return c.decode_hardware or c.hardware, c.tp if c.decode_tp is None else c.decode_tp


def _kind(hardware: str, gpus: int) -> str:
    return hardware if gpus == 1 else f"{gpus} x {hardware}"
