"""A gateway put together: client, controller, world, doctor, server. ``Deployment`` is what the CLI and tests run."""

from __future__ import annotations

import logging
import resource
from pathlib import Path

import msgspec

import penstock
from penstock.core.errors import PenstockError
from penstock.core.eventlog import EventLog, Header
from penstock.core.types import Role
from penstock.experiment.build import build_controller, digests
from penstock.experiment.setup import Setup
from penstock.live.gateway import Gateway, GatewaySettings
from penstock.live.health import Doctor, Watch, abilities
from penstock.live.http.client import HttpClient
from penstock.live.http.messages import Limits
from penstock.live.http.server import HttpServer
from penstock.live.metrics import LiveMetrics
from penstock.live.world import LiveWorld

SPARE_FILES = 1024
"""Files and sockets that are no stream's: listeners, logs, probes, prefills, connections kept for the next call."""


class EngineAddress(msgspec.Struct, frozen=True):
    """An engine to use: its URL (from configuration only), the role it starts with, the ``tcp://HOST:PORT`` of its
    plugin's stream if it has one.
    """

    url: str
    role: Role
    max_running: int = 256
    plugin: str | None = None


class Deployment:
    """A gateway over engines that run already.

    Parameters
    ----------
    setup : Setup
        Policy, its options, SLO, and what the policy believes about model and hardware.
    gateway : GatewaySettings
    record : Path, optional
        Where to write the event log.
    engine_key : str, optional
        API key of the engines.
    """

    def __init__(
        self,
        setup: Setup,
        gateway: GatewaySettings | None = None,
        record: Path | None = None,
        engine_key: str | None = None,
        watch: Watch | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.setup = setup
        self.settings = gateway if gateway is not None else GatewaySettings()
        self.record = record
        self.engine_headers = {"content-type": "application/json"}
        if engine_key:
            self.engine_headers["authorization"] = f"Bearer {engine_key}"
        self.watch = watch
        self.limits = limits if limits is not None else Limits()
        self.policy = setup.policy
        self._next = 0

    async def start(self, engines: list[EngineAddress], host: str = "127.0.0.1", port: int = 0) -> str:
        """Probe the engines, announce them, open the door; return the gateway's URL.

        Raises
        ------
        PenstockError
            An engine is not what it should be, engines serve different models, or the port is taken.
        """
        self.client = HttpClient(connect_s=5.0, idle_s=5.0)
        self.metrics = LiveMetrics()
        controller = build_controller(self.setup)
        if controller.policy.engine is not None:
            logging.getLogger("penstock.live").warning(
                "policy %s also acts inside engines (queues, batches, clocks); here vLLM's own scheduler does",
                self.policy,
            )
        log = None
        if self.record is not None:
            log = EventLog(self.record, self._header())
        self.world = LiveWorld(controller, self.client, self.metrics, log, self.engine_headers)
        for name in self.settings.slos:
            self.world.classes.setdefault(name, len(self.world.classes))
        self.doctor = Doctor(self.world, self.watch)
        try:
            for engine in engines:
                await self.attach(engine)
            self.gateway = Gateway(self.world, self._within_limits())
            self.server = HttpServer(self.gateway.handle, self.limits)
            self.port = await self.server.start(host, port)
        except BaseException:  # links left open would hang whoever collects the garbage
            await self.doctor.close()
            await self.world.close()
            await self.client.close()
            raise
        self.world.start_ticking()
        shown = f"[{host}]" if ":" in host else host
        return f"http://{shown}:{self.port}"

    def _within_limits(self) -> GatewaySettings:
        """The settings, with no more requests at a time than there are sockets for: two each, one for who waits."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        room = max(16, (files - min(SPARE_FILES, files // 4) - min(self.settings.max_queue, files // 4)) // 2)
        if room >= self.settings.max_inflight:
            return self.settings
        logging.getLogger("penstock.live").info(
            "%d open files allow %d requests at a time (asked for: %d)", files, room, self.settings.max_inflight
        )
        return msgspec.structs.replace(self.settings, max_inflight=room)

    async def attach(self, engine: EngineAddress) -> int:
        """Take an engine in; return its number. Raises PenstockError."""
        able = await abilities(self.client, engine.url, self.engine_headers, max_running=engine.max_running)
        for other in self.world.attached():
            if other.abilities.model != able.model:
                raise PenstockError(
                    f"{engine.url} serves {able.model!r}, the others {other.abilities.model!r}",
                    "one gateway serves one model",
                )
        index = self._next
        for known in self.world.instances.values():
            if known.url == engine.url:
                if known.health.value in ("up", "suspect"):
                    raise PenstockError(f"{engine.url} is attached already", "detach it first")
                index = known.index
                known.role = engine.role
        link = await self.world.link_to(engine.plugin)
        if index == self._next:
            self._next += 1
        self.world.bring_up(index, engine.url, engine.role, able, engine.plugin, link)
        return index

    def _header(self) -> Header:
        return Header(
            penstock=penstock.__version__,
            setup=self.setup.plain(),
            class_names=tuple(self.settings.slos),
            source="live",
            files=digests(self.setup),
        )

    async def stop(self, grace_s: float = 0.0) -> None:
        """Close the door, let requests end for ``grace_s``, end the rest."""
        await self.gateway.close(grace_s)
        await self.server.stop(0.0)
        await self.doctor.close()
        await self.world.close()
        await self.client.close()
