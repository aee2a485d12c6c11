"""``penstock serve``: the gateway over engines that run already, that it starts, or that are emulated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from penstock.cli.options import _option

if TYPE_CHECKING:
    from penstock.live.settings import ServeSettings

ENGINES = "Engines"
GATE = "Gateway"
CONTROL = "Control"


def serve(
    attach: Annotated[
        list[str] | None,
        _option(
            ENGINES,
            "--attach",
            help="A server that runs: http://HOST:PORT,role=ROLE[,plugin=tcp://HOST:PORT]; repeat it.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        _option(ENGINES, "--model", help="Start vLLM servers of this model: a path, a hub id, or tiny (bundled)."),
    ] = None,
    prefill: Annotated[int, _option(ENGINES, "--prefill", "-p", help="Servers to start as prefill.")] = 1,
    decode: Annotated[int, _option(ENGINES, "--decode", "-d", help="Servers to start as decode.")] = 2,
    mixed: Annotated[int, _option(ENGINES, "--mixed", help="Servers to start as mixed.")] = 0,
    engine: Annotated[
        str, _option(ENGINES, "--engine", help="vllm, or emulated: timing of the simulator, no model.")
    ] = "vllm",
    engine_python: Annotated[
        str | None, _option(ENGINES, "--engine-python", help="Python that has vLLM; .venv-engine's by default.")
    ] = None,
    engine_arg: Annotated[
        list[str] | None, _option(ENGINES, "--engine-arg", help="Passed to vLLM as it is; repeat it.")
    ] = None,
    engine_key: Annotated[
        str | None, _option(ENGINES, "--engine-api-key", help="API key of attached servers.", envvar="ENGINE_API_KEY")
    ] = None,
    predictor: Annotated[
        str | None,
        _option(
            ENGINES,
            "--predictor",
            help="Remaining-length predictor for --model (penstock predictor train), or none; tiny has its own.",
            metavar="DIR",
        ),
    ] = None,
    max_num_seqs: Annotated[int, _option(ENGINES, "--max-num-seqs", help="What the servers were given.")] = 256,
    hardware: Annotated[
        str, _option(CONTROL, "--hardware", help="What the policy (and emulated engines) take the cards to be.")
    ] = "a100-80g",
    believe_model: Annotated[
        str | None, _option(CONTROL, "--believe-model", help="Model for the policy's estimates, where it is no folder.")
    ] = None,
    profile: Annotated[
        str | None, _option(CONTROL, "--profile", help="Measured step times for the policy (penstock profile).")
    ] = None,
    migration_level: Annotated[
        str, _option(CONTROL, "--migration-level", help="auto, replay, reprompt, handoff or precopy, if engines can.")
    ] = "auto",
    policy: Annotated[str, _option(CONTROL, "--policy", help="See penstock policies.")] = "ares",
    set: Annotated[list[str] | None, _option(CONTROL, "--set", help="Option of the policy, as horizon=4096.")] = None,
    ttft: Annotated[str, _option(CONTROL, "--ttft", help="TTFT target of requests that name none.")] = "1s",
    tpot: Annotated[str, _option(CONTROL, "--tpot", help="TPOT target.")] = "50ms",
    slo: Annotated[
        list[str] | None, _option(CONTROL, "--slo", help="Targets of an SLO class, as chat=500ms/40ms; repeat it.")
    ] = None,
    hang: Annotated[
        str, _option(CONTROL, "--hang", help="An engine whose streams are silent this long is probed.", metavar="TIME")
    ] = "2s",
    host: Annotated[str, _option(GATE, "--host", help="Address to listen on; anything else opens it to others.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, _option(GATE, "--port", help="0 takes a free one.")] = 8000,
    admin_port: Annotated[int, _option(GATE, "--admin-port", help="For penstock ctl, loopback only.")] = 8001,
    admin_key: Annotated[
        str | None, _option(GATE, "--admin-key", help="Made up where not given.", envvar="PENSTOCK_ADMIN_KEY")
    ] = None,
    api_key: Annotated[
        list[str] | None, _option(GATE, "--api-key", help="Clients must send one of these.", envvar="PENSTOCK_API_KEY")
    ] = None,
    max_inflight: Annotated[int, _option(GATE, "--max-inflight", help="Requests with engines at a time.")] = 16384,
    max_queue: Annotated[int, _option(GATE, "--max-queue", help="Requests that wait at the door; then 429.")] = 2048,
    record: Annotated[
        str | None, _option(GATE, "--record", help="Write the event log, for penstock replay.", metavar="FILE")
    ] = None,
    log_json: Annotated[bool, _option(GATE, "--log-json", help="Logs as JSON lines.")] = False,
    log_level: Annotated[str, _option(GATE, "--log-level", help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve an OpenAI-compatible API over vLLM servers; place, move and re-role requests under a policy.

    penstock serve --attach http://127.0.0.1:8100,role=prefill --attach http://127.0.0.1:8200,role=decode

    penstock serve --model tiny --prefill 1 --decode 2 --policy ares --record night.jsonl.gz

    penstock serve --engine emulated --model llama-3.1-8b --hardware h100 --prefill 2 --decode 6
    """
    from penstock.cli.show import Show
    from penstock.core.errors import PenstockError
    from penstock.experiment import parse
    from penstock.live.run import run
    from penstock.live.settings import ServeSettings, attached

    if engine not in ("vllm", "emulated"):
        raise PenstockError(f"engine {engine!r} is not known", "use --engine vllm or --engine emulated")
    if attach and model is not None:
        raise PenstockError("--attach and --model exclude each other", "attach servers, or start some")
    settings: ServeSettings = ServeSettings(
        attach=tuple(attached(text) for text in attach or []),
        model=model,
        prefill=prefill,
        decode=decode,
        mixed=mixed,
        engine=engine,
        engine_python=engine_python,
        engine_args=tuple(engine_arg or ()),
        engine_key=engine_key,
        predictor=predictor,
        max_num_seqs=max_num_seqs,
        hardware=hardware,
        believe_model=believe_model,
        profile=profile,
        migration_level=migration_level,
        policy=policy,
        options=parse_options(policy, set or []),
        ttft_s=parse.target(ttft, "--ttft"),
        tpot_s=parse.target(tpot, "--tpot"),
        slos=parse.slo_classes(slo or []),
        hang_s=parse.duration(hang, "--hang"),
        host=host,
        port=port,
        admin_port=admin_port,
        admin_key=admin_key,
        api_keys=tuple(api_key or ()),
        max_inflight=max_inflight,
        max_queue=max_queue,
        record=record,
        log_json=log_json,
        log_level=log_level,
    )
    run(settings, Show())


def parse_options(policy: str, settings: list[str]) -> dict[str, float | str]:
    """``["horizon=4096"]`` or ``["ares.horizon=4096"]`` for one policy, checked."""
    from penstock.policy.registry import parse_settings

    full = [text if "." in text.partition("=")[0] else f"{policy}.{text}" for text in settings]
    return dict(parse_settings(full).get(policy, {}))
