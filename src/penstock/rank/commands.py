"""Command lines that start an arrangement: one stock vLLM server an instance, and the gateway over them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import msgspec

from penstock.experiment.setup import ClusterSetup, Setup, Target
from penstock.live.local.command import EngineSettings, Place, engine_command, engine_environment
from penstock.perf.hardware import hardware_spec
from penstock.perf.models import model_spec
from penstock.rank.arrangement import Arrangement, setup_of

FIRST_PORT, FIRST_SIDE_PORT, SIDE_PORTS_EACH = 8100, 5600, 10
SHOWN_ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT")


class Commands(msgspec.Struct, frozen=True):
    """Lines for a shell: one a vLLM server, the gateway over them, and remarks.

    ``all_in_one`` lets the gateway start the servers itself; None where it cannot (it gives each one GPU and all the
    same arguments).
    """

    vllm: list[str]
    serve: str
    all_in_one: str | None
    notes: list[str]


def commands(base: Setup, a: Arrangement, longest: int) -> Commands:
    """How to start an arrangement of ``base`` for requests of at most ``longest`` tokens."""
    setup = setup_of(base, a, longest)
    c = setup.cluster
    model = _served(c.model)
    hosts = dict.fromkeys((a.prefill_hardware, a.decode_hardware))
    host_of = {name: "127.0.0.1" if len(hosts) == 1 else f"{name.upper()}_HOST" for name in hosts}
    vllm, attach = [], []
    free = dict.fromkeys(hosts, 0)
    for i, (role, tp, card) in enumerate(_instances(a)):
        place = Place(
            host_of[card],
            FIRST_PORT + i,
            FIRST_SIDE_PORT + SIDE_PORTS_EACH * i,
            gpu=",".join(str(free[card] + k) for k in range(tp)),
        )
        free[card] += tp
        settings = EngineSettings(
            block_size=c.block_size,
            max_model_len=None if c.chunked_prefill else c.max_num_batched_tokens,
            kv_blocks=c.kv_blocks,
            plugin=False,
            arguments=(*_arguments(c, tp, card),),
        )
        environment = engine_environment(settings, place, "", {})
        given = [f"{name}={environment[name]}" for name in SHOWN_ENVIRONMENT]
        vllm.append(" ".join(given) + " " + shlex.join(engine_command("python", model, settings, place)))
        attach += ["--attach", f"http://{place.host}:{place.port},role={role}"]
    policy = ["--policy", setup.policy, *_options(setup), *_targets(setup), "--max-num-seqs", str(c.max_num_seqs)]
    believe = ["--hardware", a.decode_hardware, "--believe-model", c.model]
    if c.profile is not None:
        believe += ["--profile", c.profile]
    together = None
    if len(hosts) == 1 and a.prefill_tp == a.decode_tp == 1:
        counts = ["--mixed", str(a.mixed)] if a.mixed else ["--prefill", str(a.prefill), "--decode", str(a.decode)]
        flags = [f"--engine-arg={flag}" for flag in _arguments(c, 1, a.decode_hardware)]
        together = shlex.join(["penstock", "serve", "--model", model, *counts, *flags, *believe, *policy])
    return Commands(vllm, shlex.join(["penstock", "serve", *attach, *believe, *policy]), together, _notes(a, host_of))


def _instances(a: Arrangement) -> Iterator[tuple[str, int, str]]:
    for _ in range(a.prefill):
        yield "prefill", a.prefill_tp, a.prefill_hardware
    for _ in range(a.decode):
        yield "decode", a.decode_tp, a.decode_hardware
    for _ in range(a.mixed):
        yield "mixed", a.decode_tp, a.decode_hardware


def _served(name: str) -> str:
    """The Hugging Face id of a built-in model, else the name (a folder) as given."""
    found = re.search(r"huggingface\.co/([^/]+/[^/]+)/blob", model_spec(name).source)
    return found[1] if found else name.removesuffix("/config.json")


def _arguments(c: ClusterSetup, tp: int, card: str) -> list[str]:
    found = ["--gpu-memory-utilization", f"{c.memory_utilization:g}", "--max-num-seqs", str(c.max_num_seqs)]
    found += ["--max-num-batched-tokens", str(c.max_num_batched_tokens)]
    if tp > 1:
        found += ["--tensor-parallel-size", str(tp)]
    if not c.chunked_prefill:
        found.append("--no-enable-chunked-prefill")
    if not c.prefix_caching:
        found.append("--no-enable-prefix-caching")
    if not c.async_scheduling:
        found.append("--no-async-scheduling")
    if c.weight_dtype == "fp8":
        found += ["--quantization", "fp8"]
    if c.kv_dtype != "bf16":
        # Cards without fp8 arithmetic store KV in the other of the two fp8 formats.
        ampere = c.kv_dtype == "fp8" and "fp8" not in hardware_spec(card).flops
        found += ["--kv-cache-dtype", "fp8_e5m2" if ampere else c.kv_dtype]
    return found


def _options(setup: Setup) -> list[str]:
    return [part for name, value in setup.options.items() for part in ("--set", f"{name}={value}")]


def _targets(setup: Setup) -> list[str]:
    found = ["--ttft", _time(setup.slo.ttft_s), "--tpot", _time(setup.slo.tpot_s)]
    for name, target in setup.slo_classes.items():
        found += ["--slo", f"{name}={_pair(target)}"]
    return found


def _pair(target: Target) -> str:
    return f"{_time(target.ttft_s)}/{_time(target.tpot_s)}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "none"
    return f"{seconds:g}s" if seconds >= 1 else f"{1000 * seconds:g}ms"


def _notes(a: Arrangement, host_of: dict[str, str]) -> list[str]:
    found = [f"put the address of the {name} machine for {host}" for name, host in host_of.items() if len(host_of) > 1]
    if a.weight_dtype not in (None, "fp8"):
        found.append(f"serve a checkpoint quantised to {a.weight_dtype}; vLLM cannot make one while it loads")
    return found
