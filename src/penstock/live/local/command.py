"""The command line and environment of one engine: flags that this project has verified, and why each is there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from penstock.live import plugin

PLUGIN_FOLDER = Path(plugin.__file__).parent
"""What goes on an engine's PYTHONPATH: the package ``penstock_engine`` and its entry point, nothing else."""


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How engines are run. Sizes in tokens or bytes; ``None`` leaves a choice to vLLM.

    ``threads`` is the number of OpenMP threads of a CPU engine (0: the cores shared out evenly). ``kv_bytes`` is the
    memory for KV of a CPU engine, ``kv_blocks`` overrides the number of KV blocks on any. ``plugin`` is whether the
    engine streams its steps and takes commands (docs/plugin.md), ``head`` the folder of a predictor for its model
    (empty: none; ``None``: the bundled model's own, none for others).
    ``arguments`` go to vLLM's command line last, ``environment`` on top of the environment.
    """

    served_name: str | None = None
    dtype: str | None = None
    max_model_len: int | None = None
    block_size: int | None = None
    kv_bytes: int = 2**30
    kv_blocks: int | None = None
    threads: int = 0
    plugin: bool = True
    head: str | None = None
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = {}


class Place(msgspec.Struct, frozen=True):
    """Where one engine runs: ``gpu`` is the value of CUDA_VISIBLE_DEVICES, ``None`` for the CPU.

    ``plugin_port`` is that of the plugin's stream, which takes commands on the next; 0 for neither. ``share`` is how
    many engines share that GPU, or all cores.
    """

    host: str
    port: int
    side_channel_port: int
    plugin_port: int = 0
    gpu: str | None = None
    share: int = 1


def engine_command(python: str, model: str, settings: EngineSettings, place: Place) -> list[str]:
    """Arguments that start a stock vLLM API server with KV transfer in both directions."""
    on_cpu = place.gpu is None
    # The module form works where the `vllm` script does not: it looks up a distribution called "vllm".
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", place.host, "--port", str(place.port)]
    options: dict[str, object] = {
        "--served-model-name": settings.served_name,
        "--dtype": settings.dtype,
        "--max-model-len": settings.max_model_len,
        "--block-size": settings.block_size
        or (32 if on_cpu else None),  # CPU: multiples of 32, and not its default 128
        "--num-gpu-blocks-override": settings.kv_blocks,
    }
    if on_cpu:
        options["--kv-cache-memory-bytes"] = settings.kv_bytes
    elif place.share > 1:
        options["--gpu-memory-utilization"] = round(0.9 / place.share, 3)
    for name, value in options.items():
        if value is not None:
            command += [name, str(value)]
    if on_cpu:
        command.append("--enforce-eager")  # compiling takes longer than most CPU engines live
        # vLLM changes its own "uni" to "mp" on the CPU because it could not set OMP's environment; ours is set below.
        # One process less for each engine: a third less memory and start-up.
        command += ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
    command += ["--kv-transfer-config", json.dumps(_kv_transfer(settings.plugin, on_cpu))]
    return [*command, *settings.arguments]


def _kv_transfer(streaming: bool, on_cpu: bool) -> dict[str, object]:
    # One role for all: which engine prefills is decided for each request. If a source dies, the target recomputes.
    shared: dict[str, object] = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    if on_cpu:
        shared["kv_buffer_device"] = "cpu"
    if streaming or on_cpu:  # on the CPU vLLM's own connector needs what the plugin mends
        return {"kv_connector": "PenstockConnector", "kv_connector_module_path": "penstock_engine.connector", **shared}
    return {"kv_connector": "NixlConnector", **shared}


def engine_environment(settings: EngineSettings, place: Place, scratch: str, base: Mapping[str, str]) -> dict[str, str]:
    """Environment of one engine; ``scratch`` is its folder for temporary files and sockets."""
    environment = {name: value for name, value in base.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": place.host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(place.side_channel_port),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TMPDIR": scratch,
    }
    if settings.plugin or place.gpu is None:
        environment["PYTHONPATH"] = str(PLUGIN_FOLDER)
    if settings.plugin:
        environment["PENSTOCK_PLUGIN_PORT"] = str(place.plugin_port or "")
        environment["PENSTOCK_HEAD"] = settings.head or ""
    if place.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = place.gpu
    else:
        environment |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines share the cores
            "OMP_NUM_THREADS": str(settings.threads or max(1, _cores() // place.share)),
            "UCX_TLS": "shm,self,cma,tcp",  # without shm one transfers at a hundredth of the speed
        }
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over --kv-cache-memory-bytes
    return environment | settings.environment


def _cores() -> int:
    return len(os.sched_getaffinity(0))
