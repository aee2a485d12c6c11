"""A fleet of engines on this machine."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import msgspec

from penstock.core.errors import PenstockError
from penstock.live.http.client import HttpClient
from penstock.live.local import model as bundled
from penstock.live.local.command import EngineSettings, Place, engine_command, engine_environment
from penstock.live.local.install import Installation
from penstock.live.local.process import EngineProcess

Progress = Callable[[int, str], None]
"""Told the index of an engine and what it is doing now: starting, loading the model, …, ready."""

# Below the range from which the kernel takes ports for outgoing connections, so that none of those is in the way.
_PORTS = range(20000, 32000)
_PORTS_EACH = 4  # API, side channel, the plugin's stream and commands

_DEFAULTS = EngineSettings()


class EngineAddress(msgspec.Struct, frozen=True):
    """Where an engine serves, where its peers ask it for KV, its first process, and where its plugin streams.

    ``plugin`` is "tcp://host:port", with commands one port above; ``None`` for an engine without.
    """

    url: str
    side_channel_port: int
    pid: int
    plugin: str | None = None


class LocalFleet:
    """``count`` stock vLLM servers with KV transfer between them, one GPU each in turn, or all on the CPU.

    Use it as an asynchronous context manager, or call `start` and `stop`. The engines end with this process however it
    ends.

    Parameters
    ----------
    installation : Installation
        The Python to run them with (`install.inspect`).
    model : str or None
        Folder or Hugging Face id; ``None`` for the bundled model, which serves as "penstock-tiny".
    count : int
        How many.
    settings : EngineSettings
        How to run them.
    log_folder : Path, optional
        Where ``engine-N.log`` go. By default a temporary folder that is removed when all ended well.
    timeout_s : float
        How long one may take to become ready.
    """

    def __init__(
        self,
        installation: Installation,
        model: str | None = None,
        count: int = 1,
        settings: EngineSettings = _DEFAULTS,
        log_folder: Path | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        if count < 1:
            raise PenstockError(f"{count} engines", "at least one")
        if model is None:
            model = str(bundled.bundled_model())
            settings = msgspec.structs.replace(
                settings,
                served_name=settings.served_name or bundled.NAME,
                dtype=settings.dtype or "float32",
                head=str(bundled.bundled_head()) if settings.head is None else settings.head,
            )
        elif model.startswith(("/", ".", "~")):
            model = str(Path(model).expanduser().absolute())
            if not Path(model).is_dir():
                raise PenstockError(f"no model folder {model}", "name a folder with config.json, or a Hugging Face id")
        self._temporary = log_folder is None
        self.log_folder = Path(tempfile.mkdtemp(prefix="penstock-logs-")) if log_folder is None else log_folder
        self.log_folder.mkdir(parents=True, exist_ok=True)
        self._timeout_s = timeout_s
        self._failed = False
        ports = _free_ports(count, _PORTS_EACH)
        gpus = _gpus(installation.gpus)
        self._places: list[Place] = []
        self.engines: list[EngineProcess] = []
        for index in range(count):
            place = Place(
                host="127.0.0.1",
                port=ports[index],
                side_channel_port=ports[index] + 1,
                plugin_port=ports[index] + 2 if settings.plugin else 0,
                gpu=gpus[index % len(gpus)] if gpus else None,
                share=-(-count // len(gpus)) if gpus else count,
            )
            self._places.append(place)
            self.engines.append(
                EngineProcess(
                    f"http://{place.host}:{place.port}",
                    engine_command(installation.python, model, settings, place),
                    _environment(settings, place, local=Path(model).is_dir()),
                    self.log_folder / f"engine-{index}.log",
                )
            )

    @property
    def addresses(self) -> list[EngineAddress]:
        """One for each engine, in order."""
        return [self._address(index) for index in range(len(self.engines))]

    def _address(self, index: int) -> EngineAddress:
        engine = self.engines[index]
        place = self._places[index]
        plugin = f"tcp://{place.host}:{place.plugin_port}" if place.plugin_port else None
        return EngineAddress(engine.url, place.side_channel_port, engine.pid, plugin)

    async def start(self, progress: Progress | None = None) -> list[EngineAddress]:
        """Start all at once and wait until all serve.

        Raises
        ------
        PenstockError
            One did not start; the others are stopped.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(len(self.engines)):
                    group.create_task(self._start(index, progress))
        except* PenstockError as several:
            await self.stop()
            raise several.exceptions[0] from None
        except* BaseException:
            await self.stop()
            raise
        return self.addresses

    async def _start(self, index: int, progress: Progress | None) -> None:
        def tell(phase: str) -> None:
            if progress is not None:
                progress(index, phase)

        client = HttpClient()
        try:
            self.engines[index].start()
            await self.engines[index].ready(client, self._timeout_s, tell)
        except PenstockError:
            self._failed = True  # its log stays
            raise
        finally:
            await client.close()

    async def restart(self, index: int, progress: Progress | None = None) -> EngineAddress:
        """Stop one engine if it runs and start it again at the same address.

        Raises
        ------
        PenstockError
            It did not start.
        """
        await self.engines[index].stop()
        await self._start(index, progress)
        return self._address(index)

    async def stop(self) -> None:
        """Stop all at once; returns when no process of theirs is left."""
        for engine in self.engines:
            engine.hang_up()
        for engine in self.engines:
            await engine.gone()
        if self._temporary and not self._failed:
            shutil.rmtree(self.log_folder, ignore_errors=True)

    async def __aenter__(self) -> LocalFleet:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


def _environment(settings: EngineSettings, place: Place, local: bool) -> Callable[[str], Mapping[str, str]]:
    def make(scratch: str) -> Mapping[str, str]:
        # A model in a folder needs nothing from the network, and must not wait for it.
        base = dict(os.environ) | ({"HF_HUB_OFFLINE": "1"} if local else {})
        return engine_environment(settings, place, scratch, base)

    return make


def _gpus(count: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each device that an engine may have, within what we were given ourselves."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in named.split(",")] if named else [str(index) for index in range(count)]
    return names[:count]


def _free_ports(count: int, run: int = 1) -> list[int]:
    """First port of each of ``count`` runs of ``run`` free ports."""
    runs = len(_PORTS) // run
    start = random.randrange(runs)
    found: list[int] = []
    for offset in range(runs):
        first = _PORTS[(start + offset) % runs * run]
        if all(map(_free, range(first, first + run))):
            found.append(first)
            if len(found) == count:
                return found
    raise PenstockError("no free ports between 20000 and 32000", "stop something")


def _free(port: int) -> bool:
    with socket.socket() as trial:
        try:
            trial.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
