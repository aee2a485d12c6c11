"""The command lines of an arrangement say what was simulated, and the gateway understands its own."""

from __future__ import annotations

import shlex
from itertools import pairwise

from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.experiment.setup import ClusterSetup, Setup, Target
from penstock.rank.arrangement import Arrangement, title
from penstock.rank.commands import commands
from penstock.rank.space import Space, arrangements

BASE = Setup(policy="ares", options={"horizon": 512.0}, slo=Target(0.8, 0.04), slo_classes={"batch": Target(None, 0.2)})


def arrangement(name: str, space: Space) -> Arrangement:
    return next(a for a in arrangements(space) if title(a, len(space.gpus) > 1) == name)


def flags(line: str) -> dict[str, str]:
    """The values of a command line's options (the last of each), and its environment."""
    words = shlex.split(line)
    found = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("-"))
    return found | {a: b for a, b in pairwise(words) if a.startswith("--")}


def test_a_split_with_tensor_parallelism() -> None:
    how = commands(BASE, arrangement("2P(tp2)+1D(tp4)", Space({"a100-80g": 8})), 5000)
    servers = [flags(line) for line in how.vllm]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in servers] == ["0,1", "2,3", "4,5,6,7"]
    assert [s["--tensor-parallel-size"] for s in servers] == ["2", "2", "4"]
    assert len({s["--port"] for s in servers}) == len({s["VLLM_NIXL_SIDE_CHANNEL_PORT"] for s in servers}) == 3
    assert {s["--model"] for s in servers} == {"meta-llama/Llama-3.1-8B"}
    assert {s["--max-num-batched-tokens"] for s in servers} == {"8192"} and {s["--block-size"] for s in servers} == {
        "16"
    }
    assert "NixlConnector" in how.vllm[0] and "--no-enable-chunked-prefill" not in how.vllm[0]
    roles = [word.rpartition("role=")[2] for word in shlex.split(how.serve) if "role=" in word]
    assert roles == ["prefill", "prefill", "decode"]
    assert flags(how.serve) | {"--ttft": "800ms", "--tpot": "40ms", "--slo": "batch=none/200ms"} == flags(how.serve)
    assert flags(how.serve)["--set"] == "horizon=512.0" and flags(how.serve)["--policy"] == "ares"
    assert how.all_in_one is None and how.notes == []


def test_whole_prompts_in_fp8() -> None:
    space = Space({"a100-80g": 2}, weight_dtypes=("fp8",), kv_dtypes=("fp8",))
    how = commands(BASE, arrangement("2M whole prompts w-fp8 kv-fp8", space), 9000)
    words = flags(how.vllm[1])
    assert words["CUDA_VISIBLE_DEVICES"] == "1" and words["--quantization"] == "fp8"
    assert words["--kv-cache-dtype"] == "fp8_e5m2", "an A100 has no fp8 arithmetic"
    assert words["--max-model-len"] == words["--max-num-batched-tokens"] == "9216"
    assert "--no-enable-chunked-prefill" in how.vllm[1]
    assert how.all_in_one is not None and flags(how.all_in_one)["--mixed"] == "2"
    assert "--engine-arg=--no-enable-chunked-prefill" in shlex.split(how.all_in_one)
    assert flags(how.serve)["--policy"] == "mixed" and "--set" not in flags(how.serve)


def test_two_machines_and_a_checkpoint_to_make() -> None:
    space = Space({"a100-80g": 1, "h100": 1}, tps=(1,), weight_dtypes=("int4",))
    how = commands(BASE, arrangement("1P(h100)+1D(a100-80g) w-int4", space), 5000)
    assert [flags(line)["--host"] for line in how.vllm] == ["H100_HOST", "A100-80G_HOST"]
    assert how.all_in_one is None
    assert len(how.notes) == 3 and "checkpoint quantised to int4" in how.notes[2]


def test_the_gateway_understands_its_command_line() -> None:
    """Every option that is printed exists; the run itself ends at a server that is not there."""
    base = Setup(cluster=ClusterSetup(max_num_seqs=64), slo=Target(1.0, 0.05))
    how = commands(base, arrangement("1P+1D", Space({"a100-80g": 2})), 100)
    known = CliRunner().invoke(app, ["serve", "--help"]).output
    assert how.all_in_one is not None
    for line in (how.serve, how.all_in_one):
        for word in shlex.split(line):
            if word.startswith("--"):
                assert word.split("=")[0] in known
