"""The requests of an experiment: a trace file cut and rescaled, or synthetic traffic."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import msgspec
import numpy as np

from penstock.core.types import Slo
from penstock.experiment.setup import Setup, WorkloadSetup
from penstock.perf.lookup import unknown_name
from penstock.workload.arrivals import gamma_arrivals
from penstock.workload.read import read_trace
from penstock.workload.synthetic import synthesize, with_classes
from penstock.workload.trace import Trace

DEFAULT_RATE_RPS = 8.0
DEFAULT_REQUESTS = 1000


def build_trace(setup: Setup, seed: int | None = None) -> Trace:
    """The requests of the experiment; ``seed`` replaces the setup's. Equal arguments give equal traces.

    Raises
    ------
    PenstockError
        For whatever is wrong with the trace or the figures.
    """
    return _trace(msgspec.json.encode(setup.workload), setup.seed if seed is None else seed)


@lru_cache(maxsize=4)
def _trace(workload: bytes, seed: int) -> Trace:
    w = msgspec.json.decode(workload, type=WorkloadSetup)
    if w.trace is None:
        return synthesize(
            w.synthetic,
            w.requests if w.requests is not None or w.duration_s is not None else DEFAULT_REQUESTS,
            DEFAULT_RATE_RPS if w.rate_rps is None else w.rate_rps,
            seed=seed,
            cv=1.0 if w.cv is None else w.cv,
            duration_s=w.duration_s,
            classes=w.classes or None,
        )
    trace = read_trace(
        w.trace,
        format=w.format,
        start_s=w.start_s,
        duration_s=w.duration_s,
        limit=w.requests,
        rate_rps=w.rate_rps,
        seed=seed,
    )
    arrivals, classes = (np.random.default_rng([seed, stream]) for stream in (0, 2))
    if w.cv is not None and trace.rate_rps > 0:
        drawn = gamma_arrivals(len(trace), trace.rate_rps, w.cv, arrivals)
        note = f"arrivals drawn anew with cv {w.cv:g}, seed {seed}"
        trace = replace(trace, arrival_s=drawn, notes=(*trace.notes, note))
    return with_classes(trace, w.classes, classes) if w.classes else trace


def slos(setup: Setup, trace: Trace) -> dict[str, Slo]:
    """The SLO of each class of the trace: the setup's for the class, else the trace's own, else the setup's for all.

    Raises PenstockError where the setup names a class that the trace has not.
    """
    for name in setup.slo_classes:
        if name not in trace.class_names:
            raise unknown_name("SLO class", name, list(trace.class_names))
    general = setup.slo.slo()
    named = {name: target.slo() for name, target in setup.slo_classes.items()}
    return {name: named.get(name, trace.class_slos.get(name, general)) for name in trace.class_names}
