"""What an emulated engine is: model, hardware, speed, and how it behaves where stock vLLM has an option."""

from __future__ import annotations

import math

import msgspec

from penstock.core.errors import PenstockError
from penstock.experiment.build import build_cluster
from penstock.experiment.setup import ClusterSetup, Setup
from penstock.perf.models import model_spec
from penstock.perf.transfer import HANDSHAKE_S
from penstock.predict.simulated import HALVING_TOKENS, SIGMA_FIRST
from penstock.sim.cluster import InstanceSpec

NAME_PREFIX = "emulated-"


class EmulatedSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One instance.

    Attributes
    ----------
    cluster : ClusterSetup
        Model, hardware, limits and link by catalogue names; the numbers of instances and roles are not read.
    instance : InstanceSpec, optional
        Instead of what ``cluster`` describes; ``kv_bytes_per_token`` goes with it.
    model : str, optional
        The served name. It must say "emulated"; "emulated-" and the catalogue name where None.
    max_model_len : int, optional
        Tokens of prompt and output of one request; the model's, as far as the KV cache holds it, where None.
    speed : float
        The engine's seconds per second of the clock: 10 runs ten times as fast. Leases stay in real seconds.
    lease_s : float
        How long a finished request's KV stays pinned for a pull (vLLM: ``kv_lease_duration``), in real seconds.
    mean_output : int
        Mean length at which a sequence ends by itself; 0 never does (as with ``ignore_eos``).
    kv_load_failure_policy : str
        "recompute" or "fail": what becomes of a request whose KV cannot be pulled.
    handshake_s : float
        Engine seconds of the first transfer between two instances.
    handshake_timeout_s : float
        Real seconds after which a first transfer from an instance that hangs is given up.
    plugin : bool
        Speak Penstock's plugin protocol on two more ports: hand-off, pre-copy, and a stream of steps.
    stream_s : float
        Real seconds between two messages of the stream, at least; a real engine sends one a step.
    predict : bool
        Predict remaining lengths in the stream.
    seed, sigma_first, halving_tokens
        Of the predictions' error: see :class:`penstock.predict.simulated.NoisyOracle`. Instances that serve the same
        requests should have the same.
    """

    cluster: ClusterSetup = ClusterSetup(prefill=0, decode=0, mixed=1)
    instance: InstanceSpec | None = None
    kv_bytes_per_token: float = 131072.0
    link_latency_s: float = 1e-3
    model: str | None = None
    max_model_len: int | None = None
    speed: float = 1.0
    lease_s: float = 30.0
    mean_output: int = 0
    kv_load_failure_policy: str = "recompute"
    handshake_s: float = HANDSHAKE_S
    handshake_timeout_s: float = 5.0
    plugin: bool = True
    stream_s: float = 0.05
    predict: bool = True
    seed: int = 0
    sigma_first: float = SIGMA_FIRST
    halving_tokens: float = HALVING_TOKENS


class Plan(msgspec.Struct, frozen=True):
    """Settings with every name looked up. ``eos_below / 2**64`` is the chance of an end at each token."""

    settings: EmulatedSettings
    spec: InstanceSpec
    model: str
    max_model_len: int
    kv_bytes_per_token: float
    link_latency_s: float
    eos_below: int


def plan(settings: EmulatedSettings) -> Plan:
    """Look everything up.

    Raises
    ------
    PenstockError
        A name that is in no catalogue, a model name that hides what it is, or figures that do not fit together.
    """
    spec, per_token, latency_s = settings.instance, settings.kv_bytes_per_token, settings.link_latency_s
    longest = settings.max_model_len
    name = settings.model
    if spec is None:
        setup = msgspec.structs.replace(settings.cluster, prefill=0, decode=0, mixed=1)
        cluster = build_cluster(Setup(policy="mixed", cluster=setup))
        spec, per_token, latency_s = cluster.instances[0], cluster.kv_bytes_per_token, cluster.link_latency_s
        shape = model_spec(setup.model)
        name = name or NAME_PREFIX + shape.name
        longest = longest or min(shape.max_context or spec.capacity_tokens, spec.capacity_tokens)
    name = name or NAME_PREFIX + "engine"
    longest = longest or spec.capacity_tokens
    if "emulated" not in name:
        raise PenstockError(f"model name {name!r} hides that its text means nothing", "put 'emulated' into it")
    if not 2 <= longest <= spec.capacity_tokens:
        raise PenstockError(
            f"max_model_len {longest} must be between 2 and the {spec.capacity_tokens} tokens that the KV cache holds",
            "lower it, or give more kv_blocks",
        )
    if settings.kv_load_failure_policy not in ("recompute", "fail"):
        raise PenstockError(f"kv_load_failure_policy {settings.kv_load_failure_policy!r}", "give recompute or fail")
    if not (settings.speed > 0 and math.isfinite(settings.speed)) or settings.lease_s <= 0 or settings.mean_output < 0:
        raise PenstockError("speed and lease_s must be above 0, mean_output not below", "check the settings")
    if settings.stream_s <= 0.0 or settings.sigma_first < 0.0 or settings.halving_tokens <= 0.0 or settings.seed < 0:
        raise PenstockError(
            "stream_s and halving_tokens must be above 0, sigma_first and seed not below", "check the settings"
        )
    eos_below = (1 << 64) // settings.mean_output if settings.mean_output else 0
    return Plan(settings, spec, name, longest, per_token, latency_s, eos_below)
