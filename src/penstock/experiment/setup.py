"""``Setup``: everything that the command line says about an experiment, as one frozen object with a JSON form."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from penstock.core.errors import PenstockError
from penstock.core.types import MigrationLevel, Slo
from penstock.predict.simulated import HALVING_TOKENS, SIGMA_FIRST
from penstock.sim.cluster import Fault

SLO_FORMS = ("mean", "deadline")
"""How targets are read. ``mean``: TTFT, and the mean gap of the later tokens (Arrow v2, section 4.2). ``deadline``:
token i (from 0) is due at arrival + TTFT + i TPOT, and all must be on time; early tokens make room for slower ones
(PolyServe, arXiv 2507.17769)."""
DEFAULT_TTFT_S = 1.0
DEFAULT_TPOT_S = 0.05
"""The default SLO, ours: about what a reader of a chat notices, and twice the pace at which people read."""


class WorkloadSetup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where requests come from.

    ``trace`` is a file (or a ServeGen folder); where it is None, ``synthetic`` is drawn
    (:func:`penstock.workload.synthetic.workload`). ``rate_rps`` is the mean rate, None for a trace's own (8 for
    synthetic). ``cv`` is the burstiness of synthetic arrivals; for a trace, None keeps its arrivals and a number draws
    new ones at its mean rate. ``requests`` bounds the count, ``start_s`` and ``duration_s`` cut in time, ``classes``
    are shares of SLO classes to draw.
    """

    trace: str | None = None
    format: str | None = None
    synthetic: str = "azure-conv"
    requests: int | None = None
    rate_rps: float | None = None
    start_s: float = 0.0
    duration_s: float | None = None
    cv: float | None = None
    classes: dict[str, float] = {}


class ClusterSetup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What serves them. ``None`` means "as the general field" or "from the catalogue".

    ``link`` is a kind of :func:`penstock.perf.transfer.link_between`; ``link_bytes_per_s`` replaces its rate,
    ``link_latency_s`` its latency.
    ``kv_blocks`` replaces the capacity computed from memory, as vLLM's ``num_gpu_blocks_override``.
    ``weight_dtype`` replaces the number type that the model's linear layers are stored in.
    ``profile`` is a fitted step model, a file or a built-in name, instead of the roofline.
    """

    model: str = "llama-3.1-8b"
    hardware: str = "a100-80g"
    prefill_hardware: str | None = None
    decode_hardware: str | None = None
    tp: int = 1
    prefill_tp: int | None = None
    decode_tp: int | None = None
    prefill: int = 2
    decode: int = 2
    mixed: int = 0
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    async_scheduling: bool = True
    prefix_caching: bool = True
    chunked_prefill: bool = True
    memory_utilization: float = 0.9
    weight_dtype: str | None = None
    kv_dtype: str = "bf16"
    kv_blocks: int | None = None
    link: str | None = None
    link_bytes_per_s: float | None = None
    link_latency_s: float | None = None
    handshake_s: float = 0.0
    migration_level: MigrationLevel = MigrationLevel.PRECOPY
    profile: str | None = None


class TruthSetup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the world does that the policy is not told: noise of step times, faults, and how good predictions are.

    ``noise`` is the standard deviation of the log of a step's duration. ``predictor`` is the engines' remaining-length
    predictor: ``auto`` (what the policy's preset asks for), ``none``, ``oracle`` or ``noisy``. How wrong the noisy one
    is: ``predictor_sigma`` and ``predictor_halving`` (tokens) of :class:`penstock.predict.simulated.NoisyOracle`.
    ``batch_tile`` charges decode steps for batches rounded up to so many requests
    (:class:`penstock.perf.tiles.TiledStepModel`), 0 for none; the policy's belief has it too, being measured.
    """

    noise: float = 0.0
    faults: tuple[Fault, ...] = ()
    predictor: str = "auto"
    predictor_sigma: float = SIGMA_FIRST
    predictor_halving: float = HALVING_TOKENS
    batch_tile: int = 0
    until_s: float | None = None


class BeliefSetup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the policy thinks steps cost: the truth, or a profile; times ``error`` (1.2: believes 20 % slower)."""

    profile: str | None = None
    error: float = 1.0


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An SLO as JSON can hold it: seconds, None for no target."""

    ttft_s: float | None = DEFAULT_TTFT_S
    tpot_s: float | None = DEFAULT_TPOT_S

    def slo(self) -> Slo:
        """As the rest of the program holds it."""
        return Slo(math.inf if self.ttft_s is None else self.ttft_s, math.inf if self.tpot_s is None else self.tpot_s)


def target_of(ttft_s: float, tpot_s: float) -> Target:
    """A target from seconds, inf for none."""
    return Target(ttft_s if math.isfinite(ttft_s) else None, tpot_s if math.isfinite(tpot_s) else None)


class Setup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An experiment. Times in seconds, rates in requests/s, bandwidths in bytes/s.

    ``slo`` holds for every class that neither ``slo_classes`` nor the trace itself gives targets. ``options`` override
    those of the policy's preset.
    ``stepping`` takes every engine step instead of leaping (the slow oracle).
    """

    policy: str = "least-kv"
    options: dict[str, float | str] = {}
    workload: WorkloadSetup = WorkloadSetup()
    cluster: ClusterSetup = ClusterSetup()
    slo: Target = Target()
    slo_classes: dict[str, Target] = {}
    slo_form: str = "mean"
    truth: TruthSetup = TruthSetup()
    belief: BeliefSetup = BeliefSetup()
    seed: int = 0
    stepping: bool = False

    def at_rate(self, rate_rps: float) -> Setup:
        """The same at another request rate."""
        return replace(self, workload=replace(self.workload, rate_rps=rate_rps))

    def under(self, policy: str, options: dict[str, float | str] | None = None) -> Setup:
        """The same under another policy."""
        return replace(self, policy=policy, options=options or {})

    def plain(self) -> dict[str, Any]:
        """As plain JSON types."""
        found = msgspec.to_builtins(self)
        assert isinstance(found, dict)
        return found


replace = msgspec.structs.replace


def setup_from_plain(content: object) -> Setup:
    """The inverse of :meth:`Setup.plain`, checked.

    Raises
    ------
    PenstockError
        Naming the field that is unknown or of the wrong type, or a value out of range.
    """
    try:
        setup = msgspec.convert(content, Setup)
    except msgspec.ValidationError as error:
        raise PenstockError(f"the setup cannot be read ({error})", "use one written by this release") from None
    check(setup)
    return setup


def check(setup: Setup) -> None:
    """Raises PenstockError for the first number out of range, with what to change. Names are checked where used."""
    w, c, truth = setup.workload, setup.cluster, setup.truth
    if w.rate_rps is not None and not (math.isfinite(w.rate_rps) and w.rate_rps > 0):
        raise PenstockError(f"rate {w.rate_rps:g} requests/s is not positive", "give --rate above 0")
    if w.requests is not None and w.requests < 1:
        raise PenstockError(f"{w.requests} requests", "give --requests of 1 or more")
    if w.cv is not None and not (math.isfinite(w.cv) and w.cv >= 0):
        raise PenstockError(f"coefficient of variation {w.cv:g}", "give --cv 0 (regular), 1 (Poisson) or more (bursts)")
    if w.start_s < 0 or (w.duration_s is not None and w.duration_s <= 0):
        raise PenstockError("the slice of time is empty", "give --start of 0 or more and --duration above 0")
    if min(c.prefill, c.decode, c.mixed) < 0:
        raise PenstockError("a number of instances is negative", "give --prefill, --decode and --mixed of 0 or more")
    if c.prefill + c.decode + c.mixed == 0:
        raise PenstockError("the cluster has no instance", "give --prefill and --decode, or --mixed, of 1 or more")
    for flag, value in (("--max-num-seqs", c.max_num_seqs), ("--block-size", c.block_size), ("--tp", c.tp)):
        if value < 1:
            raise PenstockError(f"{flag} {value} is not positive", f"give {flag} of 1 or more")
    if c.kv_blocks is not None and c.kv_blocks < 1:
        raise PenstockError(f"{c.kv_blocks} KV blocks", "give --kv-blocks of 1 or more")
    if c.link_bytes_per_s is not None and c.link_bytes_per_s <= 0:
        raise PenstockError("the link bandwidth is not positive", "give --link-bandwidth above 0, in GB/s")
    if c.link_latency_s is not None and not 0 <= c.link_latency_s < math.inf:
        raise PenstockError("the link latency is out of range", "give --link-latency of 0 or more, as 5ms")
    if not (math.isfinite(truth.noise) and 0 <= truth.noise <= 2):
        raise PenstockError(f"noise {truth.noise:g} is out of range", "give --noise from 0 to 2 (0.05 is 5 %)")
    if truth.batch_tile < 0:
        raise PenstockError(f"batch tile {truth.batch_tile} is negative", "give 128, or 0 for none")
    if not (math.isfinite(setup.belief.error) and setup.belief.error > 0):
        raise PenstockError(f"belief error {setup.belief.error:g} is not positive", "give a factor above 0, as 1.2")
    if setup.slo_form not in SLO_FORMS:
        raise PenstockError(f"SLO form {setup.slo_form!r} is unknown", f"give --slo-form {' or '.join(SLO_FORMS)}")
    if setup.seed < 0:
        raise PenstockError(f"seed {setup.seed} is negative", "give --seed of 0 or more")
    for fault in truth.faults:
        if fault.instance >= c.prefill + c.decode + c.mixed:
            raise PenstockError(
                f"a fault names instance {fault.instance}, but there are {c.prefill + c.decode + c.mixed}",
                "count instances from 0: prefill, then decode, then mixed",
            )
