"""Command lines and environments of engines, and where their Python is found."""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import pytest

from penstock.core.errors import PenstockError
from penstock.live.local import install, launch
from penstock.live.local.command import PLUGIN_FOLDER, EngineSettings, Place, engine_command, engine_environment
from penstock.live.local.install import Installation, find_python
from penstock.live.local.launch import LocalFleet

CPU = Place(host="127.0.0.1", port=8001, side_channel_port=9001, plugin_port=9101, share=2)
GPU = Place(host="127.0.0.1", port=8001, side_channel_port=9001, plugin_port=9101, gpu="3", share=2)


def options(command: list[str]) -> dict[str, str]:
    """Options that have a value."""
    return {name: value for name, value in pairwise(command) if name.startswith("--")}


def test_on_the_cpu() -> None:
    command = engine_command("python", "m", EngineSettings(kv_blocks=64, arguments=("--seed", "1")), CPU)
    given = options(command)
    assert given["--block-size"] == "32"
    assert given["--num-gpu-blocks-override"] == "64"
    assert "--enforce-eager" in command
    assert "--max-model-len" not in given
    assert command[-2:] == ["--seed", "1"]
    transfer = json.loads(given["--kv-transfer-config"])
    assert transfer["kv_role"] == "kv_both"
    assert transfer["kv_load_failure_policy"] == "recompute"
    assert transfer["kv_buffer_device"] == "cpu"

    base = {"PYTHONHOME": "/ours", "VLLM_CPU_KVCACHE_SPACE": "40", "HOME": "/home"}
    environment = engine_environment(EngineSettings(threads=3, environment={"A": "b"}), CPU, "/s", base)
    assert environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "9001"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["A"] == "b"
    module = Path(environment["PYTHONPATH"], *transfer["kv_connector_module_path"].split(".")).with_suffix(".py")
    assert f"class {transfer['kv_connector']}(" in module.read_text()
    assert environment["PENSTOCK_PLUGIN_PORT"] == "9101"
    assert not environment["PENSTOCK_HEAD"]
    assert "PYTHONHOME" not in environment
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment
    assert environment["HOME"] == "/home"
    even = engine_environment(EngineSettings(), CPU, "/s", {})["OMP_NUM_THREADS"]
    assert int(even) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_on_a_gpu() -> None:
    command = engine_command("python", "m", EngineSettings(dtype="bfloat16"), GPU)
    given = options(command)
    assert given["--dtype"] == "bfloat16"
    assert given["--gpu-memory-utilization"] == "0.45"  # two share it
    assert not {"--enforce-eager", "--block-size", "--kv-cache-memory-bytes"} & set(command)
    transfer = json.loads(given["--kv-transfer-config"])
    assert transfer["kv_connector"] == "PenstockConnector"
    assert "kv_buffer_device" not in transfer
    environment = engine_environment(EngineSettings(head="/head"), GPU, "/s", {})
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert environment["PENSTOCK_HEAD"] == "/head"
    assert not {"OMP_NUM_THREADS", "UCX_TLS"} & set(environment)


def test_without_the_plugin() -> None:
    plain = EngineSettings(plugin=False)
    transfer = json.loads(options(engine_command("python", "m", plain, GPU))["--kv-transfer-config"])
    assert transfer == {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    assert not {"PYTHONPATH", "PENSTOCK_PLUGIN_PORT", "PENSTOCK_HEAD"} & set(engine_environment(plain, GPU, "/s", {}))
    # On the CPU vLLM's connector needs what the plugin mends; without a port it does nothing else.
    transfer = json.loads(options(engine_command("python", "m", plain, CPU))["--kv-transfer-config"])
    assert transfer["kv_connector"] == "PenstockConnector"
    assert "PENSTOCK_PLUGIN_PORT" not in engine_environment(plain, CPU, "/s", {})


def test_the_entry_point_is_found_on_the_path() -> None:
    (found,) = metadata.distributions(path=[engine_environment(EngineSettings(), GPU, "/s", {})["PYTHONPATH"]])
    (point,) = found.entry_points
    assert point.group == "vllm.general_plugins"
    assert PLUGIN_FOLDER.joinpath(*point.module.split(".")).with_suffix(".py").is_file()


def test_gpus_are_dealt_in_turn_within_what_we_may_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dealt(gpus: int, count: int) -> list[tuple[str | None, int]]:
        fleet = LocalFleet(Installation("python", "0.33.0", gpus), str(tmp_path), count, log_folder=tmp_path / "logs")
        return [(place.gpu, place.share) for place in fleet._places]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert dealt(2, 3) == [("0", 2), ("1", 2), ("0", 2)]
    assert dealt(4, 2) == [("0", 1), ("1", 1)]
    assert dealt(0, 3) == [(None, 3)] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert dealt(2, 3) == [("5", 2), ("7", 2), ("5", 2)]


def test_every_engine_has_ports_of_its_own(tmp_path: Path) -> None:
    fleet = LocalFleet(Installation("python", "0.32.0", 0), str(tmp_path), 8, log_folder=tmp_path / "logs")
    ports = [
        port
        for place in fleet._places
        for port in (place.port, place.side_channel_port, place.plugin_port, place.plugin_port + 1)
    ]
    assert len(set(ports)) == 32
    fleet = LocalFleet(
        Installation("python", "0.32.0", 0),
        str(tmp_path),
        settings=EngineSettings(plugin=False),
        log_folder=tmp_path / "logs",
    )
    assert fleet._places[0].plugin_port == 0
    assert all(port in launch._PORTS for port in ports)


def test_what_cannot_be_started_is_said_at_once(tmp_path: Path) -> None:
    installation = Installation("python", "0.32.0", 0)
    with pytest.raises(PenstockError, match="no model folder"):
        LocalFleet(installation, str(tmp_path / "absent"))
    with pytest.raises(PenstockError, match="0 engines"):
        LocalFleet(installation, str(tmp_path), 0)


def test_finding_a_python_with_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(install.VARIABLE, "/nowhere/python")
    with pytest.raises(PenstockError, match="/nowhere/python"):
        find_python()
    assert find_python(sys.executable) == sys.executable  # a name given wins over the environment
    monkeypatch.delenv(install.VARIABLE)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / install.FOLDER
    (folder / "bin").mkdir(parents=True)
    monkeypatch.setattr(install, "__file__", str(tmp_path / "a/b/c/d/e.py"))
    with pytest.raises(PenstockError, match="make engine-cpu"):  # an installation that was cut short is none
        find_python()
    (folder / install.READY).write_text("{}")
    assert find_python() == str(folder / "bin/python")


def test_a_python_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PenstockError, match="has no vllm"):
        install.inspect(sys.executable)
    with pytest.raises(PenstockError, match="cannot be asked"):
        install.inspect(str(tmp_path))
