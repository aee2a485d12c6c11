"""Who plays what: the workloads with their targets, and the policies that take part.

Targets are ours unless said otherwise: what a chat wants, and more time to the first token where prompts are long.
Request counts are the least at which a run is long beside the life of a request, so that the start with an empty
cluster counts little; the runs of a league then take minutes (docs/results/league.md has the figures).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from penstock.core.errors import PenstockError
from penstock.experiment.setup import ClusterSetup, Setup, Target, WorkloadSetup, replace
from penstock.perf.lookup import unknown_name
from penstock.policy.registry import PRESETS

GPUS: Final = 8
MODEL: Final = "llama-3.1-8b"
HARDWARE: Final = "a100-80g"


class Entry(msgspec.Struct, frozen=True):
    """A workload of the league: ``requests`` of a synthetic one, or ``duration_s`` where it has several phases."""

    name: str
    slo: Target
    requests: int | None = None
    duration_s: float | None = None
    trace: str | None = None

    def setup(self, base: Setup, quick: bool) -> Setup:
        """The experiment, on the cluster and with the seed of ``base``; a quick one has a quarter of the requests."""
        part = 4 if quick else 1
        work = WorkloadSetup(
            trace=self.trace,
            synthetic=base.workload.synthetic if self.trace is not None else self.name,
            requests=None if self.requests is None else self.requests // part,
            duration_s=self.duration_s,
        )
        return replace(base, workload=work, slo=self.slo)


ENTRIES: Final = (
    Entry("azure-conv", Target(1.0, 0.04), requests=6000),
    Entry("azure-code", Target(1.0, 0.04), requests=6000),
    Entry("sharegpt", Target(1.0, 0.04), requests=12_000),
    Entry("reasoning", Target(2.0, 0.04), requests=3000),
    Entry("three-phase", Target(5.0, 0.04), duration_s=900.0),
    Entry("multi-class", Target(1.0, 0.04), requests=8000),
)
"""The built-in workloads. The targets of ``multi-class`` are its own (``workload.mix``)."""
MOONCAKE: Final = Entry("mooncake", Target(30.0, 0.1))
"""Played when its file is given; targets after Arrow v2, whose Mooncake runs have the same."""
QUICK: Final = ("azure-conv", "azure-code", "multi-class")


def base_setup(gpus: int = GPUS, model: str = MODEL, hardware: str = HARDWARE, seed: int = 0) -> Setup:
    """The cluster of a league; the split of its instances is decided per workload.

    Raises
    ------
    PenstockError
        Fewer than 2 GPUs.
    """
    if gpus < 2:
        raise PenstockError(f"{gpus} GPUs cannot be split in two", "give --gpus of 2 or more")
    cluster = ClusterSetup(model=model, hardware=hardware, prefill=gpus // 2, decode=gpus - gpus // 2)
    return Setup(cluster=cluster, seed=seed)


def chosen_entries(names: Sequence[str] | None, mooncake: str | None, quick: bool) -> list[Entry]:
    """The workloads to play: the named ones, or all that can be (a quick league plays three).

    Raises
    ------
    PenstockError
        A name that no workload has, or Mooncake without its file.
    """
    known = {entry.name: entry for entry in ENTRIES}
    if mooncake is not None:
        known[MOONCAKE.name] = msgspec.structs.replace(MOONCAKE, trace=mooncake)
    if names is None:
        return [entry for name, entry in known.items() if not quick or name in QUICK or entry.trace is not None]
    for name in names:
        if name == MOONCAKE.name and mooncake is None:
            raise PenstockError("the Mooncake trace is not built in", "give its file: --mooncake FILE")
        if name not in known:
            raise unknown_name("workload", name, list(known))
    return [known[name] for name in names]


def chosen_policies(names: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The presets that play, and those left out with the reason. Whoever is named plays.

    Raises
    ------
    PenstockError
        A name that no preset has.
    """
    if names is not None:
        for name in names:
            if name not in PRESETS:
                raise unknown_name("policy", name, list(PRESETS))
        return list(names), {}
    out = {name: preset.left_out for name, preset in PRESETS.items() if preset.left_out}
    return [name for name in PRESETS if name not in out], out
