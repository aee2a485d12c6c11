"""The options that simulate, compare and goodput share, read into a Setup.

``takes_setup`` gives a command all of them: the command's own parameters come first, and it receives one ``setup``.
``takes_traffic`` gives it those of the workload and of the SLO only, for commands that have a real cluster.
Nothing heavy is imported before a command runs, so that ``--help`` stays fast.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from penstock.core.types import MigrationLevel
    from penstock.experiment.setup import Setup

WORKLOAD = "Workload"
CLUSTER = "Cluster"
SLO = "SLO"
WORLD = "What the policy is not told"
OUTPUT = "Output"


def _option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


JsonFile = Annotated[
    str | None,
    _option(OUTPUT, "--json", help="Write everything as one JSON object; - is stdout.", metavar="FILE"),
]
ReportFile = Annotated[
    str | None, _option(OUTPUT, "--report", help="Write one self-contained HTML page.", metavar="FILE")
]
Quiet = Annotated[bool, _option(OUTPUT, "--quiet", "-q", help="No tables, notes and progress bars.")]
Repeat = Annotated[
    int, _option(OUTPUT, "--repeat", help="Runs with consecutive seeds; means get 95 % confidence intervals.")
]
Jobs = Annotated[int, _option(OUTPUT, "--jobs", "-j", help="Processes; 0 = all cores.", min=0)]


def setup_options(
    trace: Annotated[
        str | None, _option(WORKLOAD, "--trace", help="Trace file (Azure, Mooncake, BurstGPT, ...), format detected.")
    ] = None,
    format: Annotated[
        str | None, _option(WORKLOAD, "--format", help="Format of the trace, where detection errs.")
    ] = None,
    synthetic: Annotated[
        str,
        _option(
            WORKLOAD, "--synthetic", help="Without --trace: a profile, lengths as 512/128, or phases a@300x4,b@60."
        ),
    ] = "azure-conv",
    requests: Annotated[
        int | None, _option(WORKLOAD, "--requests", "-n", help="Number of requests (synthetic: 1000 by default).")
    ] = None,
    rate: Annotated[
        float | None,
        _option(WORKLOAD, "--rate", help="Mean requests/s; a trace is rescaled (synthetic: 8 by default)."),
    ] = None,
    start: Annotated[str, _option(WORKLOAD, "--start", help="Skip this much of the trace.", metavar="TIME")] = "0s",
    duration: Annotated[
        str | None,
        _option(WORKLOAD, "--duration", help="Length of the slice, or of the synthetic trace.", metavar="TIME"),
    ] = None,
    cv: Annotated[
        float | None,
        _option(WORKLOAD, "--cv", help="Burstiness of arrivals: 0 regular, 1 Poisson; redraws those of a trace."),
    ] = None,
    classes: Annotated[
        list[str] | None, _option(WORKLOAD, "--class", help="Share of an SLO class, as chat=0.8; the rest is default.")
    ] = None,
    seed: Annotated[int, _option(WORKLOAD, "--seed", help="Of trace, noise and predictor.")] = 0,
    model: Annotated[
        str, _option(CLUSTER, "--model", help="Built-in model (penstock models) or a config.json.")
    ] = "llama-3.1-8b",
    hardware: Annotated[str, _option(CLUSTER, "--hardware", help="Accelerator (penstock hardware).")] = "a100-80g",
    prefill_hardware: Annotated[
        str | None, _option(CLUSTER, "--prefill-hardware", help="Of prefill instances, if it differs.")
    ] = None,
    decode_hardware: Annotated[
        str | None, _option(CLUSTER, "--decode-hardware", help="Of decode instances, if it differs.")
    ] = None,
    tp: Annotated[int, _option(CLUSTER, "--tp", help="Tensor parallelism: GPUs per instance.")] = 1,
    prefill_tp: Annotated[int | None, _option(CLUSTER, "--prefill-tp", help="Of prefill instances.")] = None,
    decode_tp: Annotated[int | None, _option(CLUSTER, "--decode-tp", help="Of decode instances.")] = None,
    prefill: Annotated[int, _option(CLUSTER, "--prefill", "-p", help="Prefill instances.")] = 2,
    decode: Annotated[int, _option(CLUSTER, "--decode", "-d", help="Decode instances.")] = 2,
    mixed: Annotated[
        int, _option(CLUSTER, "--mixed", help="Instances of policy mixed; 0 = prefill and decode together.")
    ] = 0,
    block_size: Annotated[int, _option(CLUSTER, "--block-size", help="Tokens per KV block.")] = 16,
    max_num_seqs: Annotated[int, _option(CLUSTER, "--max-num-seqs", help="As vLLM's.")] = 256,
    max_num_batched_tokens: Annotated[int, _option(CLUSTER, "--max-num-batched-tokens", help="As vLLM's.")] = 8192,
    async_scheduling: Annotated[
        bool, _option(CLUSTER, "--async-scheduling/--no-async-scheduling", help="As vLLM's; off on CPUs.")
    ] = True,
    prefix_caching: Annotated[
        bool, _option(CLUSTER, "--prefix-caching/--no-prefix-caching", help="As vLLM's; needs hashes in the trace.")
    ] = True,
    chunked_prefill: Annotated[
        bool, _option(CLUSTER, "--chunked-prefill/--no-chunked-prefill", help="As vLLM's: prompts cut to the budget.")
    ] = True,
    memory_utilization: Annotated[
        float, _option(CLUSTER, "--memory-utilization", help="As vLLM's gpu_memory_utilization.")
    ] = 0.9,
    weight_dtype: Annotated[
        str | None, _option(CLUSTER, "--weight-dtype", help="Number type of the weights, if not the model's own: fp8.")
    ] = None,
    kv_dtype: Annotated[
        str, _option(CLUSTER, "--kv-dtype", help="Number type of the KV cache: bf16, fp8, ...")
    ] = "bf16",
    kv_blocks: Annotated[
        int | None, _option(CLUSTER, "--kv-blocks", help="KV blocks per instance, instead of computing them.")
    ] = None,
    link: Annotated[
        str | None, _option(CLUSTER, "--link", help="nvlink, pcie, rdma, tcp or shm; the hardware's own by default.")
    ] = None,
    link_bandwidth: Annotated[
        float | None, _option(CLUSTER, "--link-bandwidth", help="GB/s of each instance's link, one way.")
    ] = None,
    link_latency: Annotated[
        str | None, _option(CLUSTER, "--link-latency", help="Of a transfer, before its first byte.", metavar="TIME")
    ] = None,
    handshake: Annotated[
        str, _option(CLUSTER, "--handshake", help="First contact of two instances (NIXL: 0.1-0.4 s).", metavar="TIME")
    ] = "0s",
    migration_level: Annotated[
        str, _option(CLUSTER, "--migration-level", help="replay, reprompt, handoff or precopy.")
    ] = "precopy",
    profile: Annotated[
        str | None, _option(CLUSTER, "--profile", help="Fitted step model (file or built-in) instead of the roofline.")
    ] = None,
    ttft: Annotated[
        str, _option(SLO, "--ttft", help="TTFT target, as 1s or 500ms; none for none.", metavar="TIME")
    ] = "1s",
    tpot: Annotated[str, _option(SLO, "--tpot", help="TPOT target.", metavar="TIME")] = "50ms",
    slo: Annotated[
        list[str] | None, _option(SLO, "--slo", help="Targets of one class, as chat=500ms/40ms; repeat it.")
    ] = None,
    slo_form: Annotated[
        str, _option(SLO, "--slo-form", help="mean: TTFT and mean TPOT; deadline: token i by arrival + TTFT + i TPOT.")
    ] = "mean",
    noise: Annotated[float, _option(WORLD, "--noise", help="Noise of step times: 0.05 is 5 %.")] = 0.0,
    fault: Annotated[
        str, _option(WORLD, "--fault", help="As down:3@120s,up:3@180s,slow:2x1.5@60s (instances count from 0).")
    ] = "",
    predictor: Annotated[
        str,
        _option(
            WORLD,
            "--predictor",
            help="Remaining-length predictor of the engines: auto, none, oracle, noisy, or noisy:SIGMA,HALVING.",
        ),
    ] = "auto",
    until: Annotated[
        str | None, _option(WORLD, "--until", help="Stop then; the rest is reported as unfinished.", metavar="TIME")
    ] = None,
    belief_profile: Annotated[
        str | None, _option(WORLD, "--belief-profile", help="Step model that the policy plans with.")
    ] = None,
    belief_error: Annotated[
        float, _option(WORLD, "--belief-error", help="Factor on the step times that the policy plans with.")
    ] = 1.0,
) -> Setup:
    """Read the options into a Setup, checked as far as numbers go."""
    from penstock.experiment import parse
    from penstock.experiment import setup as s

    found = s.Setup(
        workload=s.WorkloadSetup(
            trace=trace,
            format=format,
            synthetic=synthetic,
            requests=requests,
            rate_rps=rate,
            start_s=parse.duration(start, "--start"),
            duration_s=_finite(duration, "--duration"),
            cv=cv,
            classes=parse.class_shares(classes or []),
        ),
        cluster=s.ClusterSetup(
            model=model,
            hardware=hardware,
            prefill_hardware=prefill_hardware,
            decode_hardware=decode_hardware,
            tp=tp,
            prefill_tp=prefill_tp,
            decode_tp=decode_tp,
            prefill=prefill,
            decode=decode,
            mixed=mixed,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            async_scheduling=async_scheduling,
            prefix_caching=prefix_caching,
            chunked_prefill=chunked_prefill,
            memory_utilization=memory_utilization,
            weight_dtype=weight_dtype,
            kv_dtype=kv_dtype,
            kv_blocks=kv_blocks,
            link=link,
            link_bytes_per_s=None if link_bandwidth is None else link_bandwidth * 1e9,
            link_latency_s=None if link_latency is None else parse.duration(link_latency, "--link-latency"),
            handshake_s=parse.duration(handshake, "--handshake"),
            migration_level=_level(migration_level),
            profile=profile,
        ),
        slo=s.target_of(parse.target(ttft, "--ttft"), parse.target(tpot, "--tpot")),
        slo_classes={name: s.target_of(x.ttft_s, x.tpot_s) for name, x in parse.slo_classes(slo or []).items()},
        slo_form=slo_form,
        truth=s.TruthSetup(
            noise=noise, faults=parse.faults(fault), until_s=_finite(until, "--until"), **parse.predictor(predictor)
        ),
        belief=s.BeliefSetup(profile=belief_profile, error=belief_error),
        seed=seed,
    )
    s.check(found)
    return found


def _finite(text: str | None, what: str) -> float | None:
    from penstock.experiment.parse import duration

    seconds = None if text is None else duration(text, what)
    return None if seconds == float("inf") else seconds


def _level(name: str) -> MigrationLevel:
    from penstock.core.types import MigrationLevel
    from penstock.perf.lookup import unknown_name

    known = {level.name.lower(): level for level in MigrationLevel}
    if name.lower() not in known:
        raise unknown_name("migration level", name, list(known))
    return known[name.lower()]


@functools.cache
def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    # Setup is imported late, so the annotations that name it are given a stand-in.
    return list(inspect.signature(function, locals={"Setup": object}, eval_str=True).parameters.values())


def takes_setup(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command whose first parameter is ``setup`` all the shared options instead of it."""
    return _given(command, _parameters(setup_options))


def takes_traffic(command: Callable[..., None]) -> Callable[..., None]:
    """The same with the options of the workload and of the SLO; the rest of the setup holds its defaults."""
    panels = (WORKLOAD, SLO)
    return _given(command, [p for p in _parameters(setup_options) if _panel(p) in panels])


def takes_setup_but(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same with all options but these, which keep their defaults (or are the command's own)."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        return _given(command, [p for p in _parameters(setup_options) if p.name not in names])

    return decorate


def _panel(parameter: inspect.Parameter) -> str:
    return str(parameter.annotation.__metadata__[0].rich_help_panel)


def _given(command: Callable[..., None], shared: list[inspect.Parameter]) -> Callable[..., None]:
    own = _parameters(command)[1:]
    names = {parameter.name for parameter in shared}

    @functools.wraps(command)
    def run(**given: Any) -> None:
        setup = setup_options(**{name: value for name, value in given.items() if name in names})
        command(setup, **{name: value for name, value in given.items() if name not in names})

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [parameter.replace(kind=keyword) for parameter in (*own, *shared)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
