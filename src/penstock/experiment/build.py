"""From a :class:`Setup` to the things that run: trace, cluster, beliefs, policy, and the run itself."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import penstock
from penstock.control.controller import Controller
from penstock.core.errors import PenstockError
from penstock.core.eventlog import Header
from penstock.core.types import MigrationLevel, Role
from penstock.experiment.setup import ClusterSetup, Setup, check, replace
from penstock.experiment.traffic import build_trace, slos
from penstock.perf.energy import ClockLevel
from penstock.perf.hardware import HardwareSpec, hardware_spec
from penstock.perf.kv import activation_reserve_bytes, kv_bytes_per_token, kv_capacity
from penstock.perf.lookup import dtype_bytes, unknown_name
from penstock.perf.models import ModelSpec, model_spec
from penstock.perf.profile_io import builtin_profiles, load_profile
from penstock.perf.roofline import RooflineStepModel
from penstock.perf.step import StepModel
from penstock.perf.tiles import TiledStepModel
from penstock.perf.transfer import Link, link_between
from penstock.perf.tuning import CoRun, Profiler
from penstock.policy.parts import Beliefs, Policy
from penstock.policy.registry import build_policy, preset
from penstock.predict.simulated import LengthOracle, NoisyOracle
from penstock.sim.cluster import ClusterSpec, InstanceSpec, Scenario
from penstock.sim.result import SimResult
from penstock.sim.run import simulate
from penstock.workload.trace import Trace

SAMPLES = 400
"""Samples of the timeline over the arrivals."""
PREDICTORS = ("auto", "none", "oracle", "noisy")


class Believed(StepModel):
    """What a policy believes: one model for steps with prefill, one for pure decode steps, both times a factor."""

    def __init__(self, prefill: StepModel, decode: StepModel, factor: float) -> None:
        self.prefill = prefill
        self.decode = decode
        self.factor = factor

    def step_s(self, decodes: int, context: int, chunk_new: list[int], chunk_past: list[int]) -> float:
        """See :class:`StepModel`."""
        model = self.prefill if len(chunk_new) > 0 else self.decode
        return self.factor * model.step_s(decodes, context, chunk_new, chunk_past)

    def decode_affine(self, decodes: int, context: int) -> tuple[float, float, float]:
        """See :class:`StepModel`."""
        intercept, slope, limit = self.decode.decode_affine(decodes, context)
        return self.factor * intercept, self.factor * slope, limit

    def sms(self) -> int:
        """See :class:`StepModel`."""
        return self.decode.sms()

    def part(self, compute: float, bandwidth: float) -> Believed:
        """See :class:`StepModel`."""
        prefill, decode = self.prefill.part(compute, bandwidth), self.decode.part(compute, bandwidth)
        return Believed(prefill, decode, self.factor)


def roles(setup: Setup) -> list[Role]:
    """The role of every instance under the setup's policy.

    A policy that does not disaggregate runs on ``mixed`` instances, or on as many as prefill and decode together where
    no number of mixed ones is given; the others need at least one prefill and one decode instance.

    Raises
    ------
    PenstockError
        There is no such policy, or no instance that it could use.
    """
    c = setup.cluster
    if not preset(setup.policy).disaggregated:
        return [Role.MIXED] * (c.mixed or c.prefill + c.decode)
    if c.prefill < 1 or c.decode < 1:
        raise PenstockError(
            f"policy {setup.policy!r} needs prefill and decode instances, not {c.prefill} and {c.decode}",
            "give --prefill and --decode of 1 or more, or --policy mixed",
        )
    return [Role.PREFILL] * c.prefill + [Role.DECODE] * c.decode


def notes(setup: Setup) -> list[str]:
    """What a reader should know about how the setup was read."""
    c, found = setup.cluster, []
    if not preset(setup.policy).disaggregated and not c.mixed:
        found.append(f"policy {setup.policy!r} does not disaggregate: it gets {c.prefill + c.decode} mixed instances")
    elif c.mixed and c.prefill and c.decode and preset(setup.policy).disaggregated:
        found.append(f"--mixed is ignored: policy {setup.policy!r} disaggregates")
    if setup.workload.trace is None and setup.workload.start_s:
        found.append("--start is ignored: it cuts a --trace")
    measured_on, slash, _ = (c.profile or "").lower().partition("/")
    if slash and c.profile in builtin_profiles() and hardware_spec(c.hardware).name != measured_on:
        found.append(f"steps are those of profile {c.profile}, but memory and link are those of {c.hardware}")
    return found


def build_cluster(setup: Setup) -> ClusterSpec:
    """The instances with their true costs.

    Raises
    ------
    PenstockError
        Unknown model, hardware, profile or link; a model that does not fit in memory; figures out of range.
    """
    check(setup)
    c = setup.cluster
    model = _model(c)
    hardware = _hardware(c)
    tps = _tps(c)
    wanted = roles(setup)
    p, d = Role.PREFILL, Role.DECODE
    alike = hardware[p] == hardware[d] and tps[p] == tps[d]
    if c.profile is not None and not alike:
        raise PenstockError(
            f"profile {c.profile} describes one kind of instance, but prefill and decode run on different ones",
            "drop --profile, or give both the same hardware and tensor parallelism",
        )
    levels = {p: _levels(setup, model, hardware[p], tps[p])}
    levels[d] = levels[p] if alike else _levels(setup, model, hardware[d], tps[d])
    slots = [Role.PREFILL] * c.prefill + [Role.DECODE] * c.decode
    specs = []
    for i, role in enumerate(wanted):
        # A mixed instance in place of a prefill or decode instance runs on that one's hardware.
        like = role if role is not Role.MIXED else slots[i] if not c.mixed else Role.DECODE
        specs.append(_instance(setup, role, model, hardware[like], tps[like], levels[like], _link(c, like)))
    for fault in setup.truth.faults:
        if fault.instance >= len(specs):
            raise PenstockError(f"a fault names instance {fault.instance} of {len(specs)}", "count instances from 0")
    return ClusterSpec(
        tuple(specs),
        kv_bytes_per_token=float(kv_bytes_per_token(model, c.kv_dtype)),
        link_latency_s=_link(c, Role.PREFILL).latency_s,
        handshake_s=c.handshake_s,
        migration_level=c.migration_level,
    )


def _model(c: ClusterSetup) -> ModelSpec:
    model = model_spec(c.model)
    if c.weight_dtype is None:
        return model
    dtype_bytes(c.weight_dtype)  # refuses what there is not
    return dataclasses.replace(model, weight_dtype=c.weight_dtype)


def _hardware(c: ClusterSetup) -> dict[Role, HardwareSpec]:
    prefill, decode = hardware_spec(c.prefill_hardware or c.hardware), hardware_spec(c.decode_hardware or c.hardware)
    return {Role.PREFILL: prefill, Role.DECODE: decode}


def _tps(c: ClusterSetup) -> dict[Role, int]:
    return {
        Role.PREFILL: c.tp if c.prefill_tp is None else c.prefill_tp,
        Role.DECODE: c.tp if c.decode_tp is None else c.decode_tp,
    }


def _levels(setup: Setup, model: ModelSpec, hardware: HardwareSpec, tp: int) -> list[ClockLevel]:
    """The step model at each clock, ascending; one of 0 MHz where the clock is not known. Profiles have no clocks."""
    if setup.cluster.profile is not None:
        return [ClockLevel(0.0, _tiled(setup, load_profile(setup.cluster.profile).model))]
    found = []
    clocks = hardware.clocks_mhz or (0.0,)
    for mhz in clocks:
        share = mhz / clocks[-1] if mhz else 1.0
        one = RooflineStepModel(model, hardware, tp, kv_dtype=setup.cluster.kv_dtype, clock=share)
        found.append(ClockLevel(mhz, _tiled(setup, one)))
    return found


def _tiled(setup: Setup, model: StepModel) -> StepModel:
    return TiledStepModel(model, setup.truth.batch_tile) if setup.truth.batch_tile else model


def _link(c: ClusterSetup, role: Role) -> Link:
    hardware = _hardware(c)
    link = link_between(hardware[Role.PREFILL], hardware[Role.DECODE], _tps(c)[role], kind=c.link)
    rate = link.bandwidth_Bps if c.link_bytes_per_s is None else c.link_bytes_per_s
    return Link(link.kind, rate, link.latency_s if c.link_latency_s is None else c.link_latency_s)


def _instance(
    setup: Setup, role: Role, model: ModelSpec, hardware: HardwareSpec, tp: int, levels: list[ClockLevel], link: Link
) -> InstanceSpec:
    c = setup.cluster
    capacity = kv_capacity(
        model,
        hardware,
        tp,
        memory_utilization=c.memory_utilization,
        reserve_bytes=activation_reserve_bytes(model, tp, c.max_num_batched_tokens, c.max_num_seqs),
        kv_dtype=c.kv_dtype,
        block_size=c.block_size,
    )
    return InstanceSpec(
        role,
        levels[-1].step_model,
        capacity.blocks if c.kv_blocks is None else c.kv_blocks,
        c.block_size,
        c.max_num_seqs,
        c.max_num_batched_tokens,
        link.bandwidth_Bps,
        async_scheduling=c.async_scheduling,
        prefix_caching=c.prefix_caching,
        chunked_prefill=c.chunked_prefill,
        clocks=tuple(levels) if levels[-1].mhz else (),
        power=hardware.power.times(tp) if c.profile is None else None,
    )


def build_beliefs(setup: Setup, cluster: ClusterSpec) -> Beliefs:
    """What the policy thinks things cost: the truth, unless the setup spoils it."""
    by_role = {spec.role: spec.step_model for spec in cluster.instances}
    some = cluster.instances[0].step_model
    step = Believed(by_role.get(Role.PREFILL, some), by_role.get(Role.DECODE, some), setup.belief.error)
    if setup.belief.profile is not None:
        believed = load_profile(setup.belief.profile).model
        step = Believed(believed, believed, setup.belief.error)
    plain = step.prefill is step.decode and step.factor == 1.0
    clocks = () if setup.belief.profile is not None else _believed_clocks(cluster, setup.belief.error)
    return Beliefs(
        step.prefill if plain else step,
        cluster.kv_bytes_per_token,
        min(spec.link_bytes_per_s for spec in cluster.instances),
        cluster.link_latency_s,
        setup.cluster.max_num_batched_tokens,
        clocks,
        _profiler(cluster, setup.belief.error),
    )


def _profiler(cluster: ClusterSpec, factor: float) -> Profiler | None:
    """Times decode beside fine-tuning on a decode instance; None where the step model knows no shared GPU."""
    for spec in cluster.instances:
        if spec.role is Role.DECODE and isinstance(spec.step_model, RooflineStepModel) and spec.step_model.sms():
            return Profiler(CoRun(spec.step_model, spec.block_size), error=factor)
    return None


def _believed_clocks(cluster: ClusterSpec, factor: float) -> tuple[ClockLevel, ...]:
    """The levels that all instances have, each believed as ``Believed`` has it; none if they differ."""
    by_role = {spec.role: spec.clocks for spec in cluster.instances}
    some = cluster.instances[0].clocks
    prefill, decode = by_role.get(Role.PREFILL, some), by_role.get(Role.DECODE, some)
    if [level.mhz for level in prefill] != [level.mhz for level in decode]:
        return ()
    return tuple(
        ClockLevel(p.mhz, p.step_model if p is d and factor == 1.0 else Believed(p.step_model, d.step_model, factor))
        for p, d in zip(prefill, decode, strict=True)
    )


def build(setup: Setup, cluster: ClusterSpec) -> tuple[Policy, Beliefs]:
    """A fresh policy, and what it believes. Raises PenstockError for an unknown policy or option."""
    beliefs = build_beliefs(setup, cluster)
    return build_policy(setup.policy, beliefs, setup.slo.slo(), **setup.options), beliefs


def build_controller(setup: Setup, level: MigrationLevel | None = None) -> Controller:
    """A fresh controller for this setup, as the live world and a replay need it.

    ``level`` is the best way to move a running decode, the setup's where None. Raises PenstockError as ``build`` does.
    """
    cluster = build_cluster(setup)
    policy, beliefs = build(setup, cluster)
    slo = setup.slo.slo()

    def another(name: str, options: dict[str, str]) -> Policy:
        return build_policy(name, beliefs, slo, **options)

    best = cluster.migration_level if level is None else level
    return Controller(policy, beliefs, best, cluster.lease_s, another)


def lengths(setup: Setup, seed: int) -> LengthOracle | None:
    """The world's remaining-length predictor."""
    wanted = setup.truth.predictor
    if wanted not in PREDICTORS:
        raise unknown_name("predictor", wanted, list(PREDICTORS))
    kind = preset(setup.policy).predictor if wanted == "auto" else wanted
    if kind == "oracle":
        return LengthOracle()
    if kind != "noisy":
        return None
    return NoisyOracle(seed, setup.truth.predictor_sigma, setup.truth.predictor_halving)


def run(
    setup: Setup,
    seed: int | None = None,
    *,
    trace: Trace | None = None,
    sample: bool = True,
    log: Any = None,
    progress: Callable[[int], None] | None = None,
) -> SimResult:
    """Run the experiment once.

    Parameters
    ----------
    seed : int, optional
        Of trace, noise and predictor; the setup's where None. Equal seeds give equal worlds to all policies.
    trace : Trace, optional
        Instead of the setup's workload.
    sample : bool
        Sample the timeline (reports and the imbalance figure need it).
    log, progress
        See :func:`penstock.sim.run.simulate`.

    Raises
    ------
    PenstockError
        For anything that the user can mend.
    """
    seed = setup.seed if seed is None else seed
    cluster = build_cluster(setup)
    policy, beliefs = build(setup, cluster)
    trace = build_trace(setup, seed) if trace is None else trace
    truth = setup.truth
    scenario = Scenario(
        seed=seed,
        noise=truth.noise,
        sample_s=max(trace.duration_s / SAMPLES, 0.05) if sample else None,
        until_s=truth.until_s,
        stepping=setup.stepping,
        deadlines=setup.slo_form == "deadline",
        faults=truth.faults,
    )
    targets = list(slos(setup, trace).values())
    return simulate(trace, cluster, policy, beliefs, targets, scenario, lengths(setup, seed), log, progress)


def log_header(setup: Setup, trace: Trace, seed: int | None = None) -> Header:
    """The first line of an event log of this run."""
    return Header(
        penstock=penstock.__version__,
        setup=setup.plain(),
        seed=setup.seed if seed is None else seed,
        class_names=trace.class_names,
        block_tokens=None if trace.prefixes is None else trace.prefixes.block_tokens,
        source=trace.source,
        files=digests(setup),
    )


def digests(setup: Setup) -> dict[str, str]:
    """SHA-256 of each file that the cluster and the beliefs are built from (profiles, ``config.json``), by path."""
    named = (setup.cluster.model, setup.cluster.profile, setup.belief.profile)
    paths = [Path(name) for name in named if name is not None]
    files = [path / "config.json" if path.is_dir() else path for path in paths]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}


def with_policy(setup: Setup, policy: str, options: dict[str, float | str] | None = None) -> Setup:
    """The setup under another policy, checked. Raises PenstockError for a policy that there is not."""
    preset(policy)
    return replace(setup, policy=policy, options=options or {})
