"""Which engines live: probing suspects, watching for silence, taking the recovered back."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import msgspec

from penstock.core.errors import PenstockError
from penstock.live.claims import is_claim
from penstock.live.http.client import HttpClient
from penstock.live.http.messages import HttpFault
from penstock.live.instance import Abilities, Health, Instance
from penstock.live.intake import COMPLETION_PATH
from penstock.live.wire import HANDOVER, encode, read_chunk

if TYPE_CHECKING:
    from penstock.live.world import LiveWorld

PROBE_S = 1.0
SECOND_PROBE_S = 3.0
"""An engine that refuses connections is dead; one that is slow to answer gets a second, longer chance."""
RECOVERY_S = 1.0
OWN_LAG_S = 0.25
"""A round of the watch that comes so late says that it is this process that was held up, not the engines."""
_LABEL = re.compile(rb'(\w+)="((?:[^"\\]|\\.)*)"')


class Watch(msgspec.Struct, frozen=True):
    """When an engine counts as hanging: its streams are silent for ``silence_s`` (or for ``silence_steps`` inter-token
    times, whichever is longer) and it fails a probe; a probe that must generate a token may take ``deep_probe_s``.
    """

    silence_s: float = 2.0
    silence_steps: float = 40.0
    deep_probe_s: float = 10.0
    every_s: float = 0.25


class Doctor:
    """Watches the instances of a world until ``close``."""

    def __init__(self, world: LiveWorld, watch: Watch | None = None) -> None:
        self.world = world
        self.watch = watch if watch is not None else Watch()
        self._tasks: set[asyncio.Task[None]] = set()
        self._probed: dict[int, float] = {}
        world.on_suspect = self.examine
        self._start(self._rounds())

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def examine(self, instance: Instance) -> None:
        """Something went wrong at ``instance``: find out whether it lives."""
        self._start(self._examine(instance))

    async def close(self) -> None:
        """Stop watching."""
        for task in self._tasks:
            task.cancel()

    async def _examine(self, instance: Instance) -> None:
        world = self.world
        if not await lives(world.client, instance):
            self._fence(instance, "it does not answer")
        elif await refuses(world.client, instance, PROBE_S, world.engine_headers):
            self._fence(instance, "it answers requests with errors")
        elif instance.health is Health.SUSPECT:
            world.cleared(instance)

    def _fence(self, instance: Instance, reason: str) -> None:
        if instance.health in (Health.DOWN, Health.GONE):
            return
        self.world.fence(instance, reason)
        self._start(self._recover(instance))

    async def _rounds(self) -> None:
        last = self.world.now()
        while True:
            await asyncio.sleep(self.watch.every_s)
            now = self.world.now()
            lag, last = now - last - self.watch.every_s, now
            if lag > OWN_LAG_S:
                for instance in self.world.instances.values():
                    instance.heard_s = max(instance.heard_s, now)
                continue
            for instance in list(self.world.instances.values()):
                if instance.health is Health.UP and self._silent(instance, now):
                    self._probed[instance.index] = now
                    self._start(self._suspect_silence(instance))

    def _silent(self, instance: Instance, now: float) -> bool:
        limit = max(self.watch.silence_s, self.watch.silence_steps * instance.itl_s)
        if now - self._probed.get(instance.index, -limit) < limit:
            return False
        if instance.streams:
            return now - instance.heard_s > limit
        return instance.prefills > 0  # nothing streams: only a probe can tell a long prefill from a hang

    async def _suspect_silence(self, instance: Instance) -> None:
        """The server's front may answer while its engine hangs: ask for a token, too."""
        world = self.world
        heard = instance.heard_s
        streams = instance.streams
        if not await lives(world.client, instance):
            if instance.heard_s == heard or not streams:
                self._fence(instance, "it hangs")
            return
        if not streams or await generates(world.client, instance, self.watch.deep_probe_s, world.engine_headers):
            return
        if instance.heard_s == heard and instance.health is Health.UP:
            self._fence(instance, "it answers but does not generate")

    async def _recover(self, instance: Instance) -> None:
        """Probe a fenced instance until it is well, then take it back."""
        while _is_down(instance):
            await asyncio.sleep(RECOVERY_S)
            world = self.world
            if not await answers(world.client, instance.url, PROBE_S):
                continue
            try:
                able = await abilities(world.client, instance.url, world.engine_headers, self.watch.deep_probe_s)
            except PenstockError:
                continue
            link = await world.link_to(instance.plugin)
            if _is_down(instance):
                world.log.info("instance is back", extra={"instance": instance.index})
                world.bring_up(instance.index, instance.url, instance.role, able, instance.plugin, link)
                return
            if link is not None:
                link.close()


def _is_down(instance: Instance) -> bool:
    return instance.health is Health.DOWN


async def lives(client: HttpClient, instance: Instance) -> bool:
    """Is an engine there? A refused connection says no at once; no answer in time says no only twice."""
    try:
        return (await client.fetch(instance.url, "GET", "/health", timeout_s=PROBE_S)).status == 200
    except HttpFault as fault:
        if fault.refused or fault.local:
            return fault.local
    return await answers(client, instance.url, SECOND_PROBE_S)


async def answers(client: HttpClient, url: str, timeout_s: float) -> bool:
    """Does ``/health`` answer 200 in time?"""
    try:
        return (await client.fetch(url, "GET", "/health", timeout_s=timeout_s)).status == 200
    except HttpFault:
        return False


async def generates(client: HttpClient, instance: Instance, timeout_s: float, headers: dict[str, str]) -> bool:
    """Does it bring one token in time?"""
    return await _status_of_a_token(client, instance, timeout_s, headers) == 200


async def refuses(client: HttpClient, instance: Instance, timeout_s: float, headers: dict[str, str]) -> bool:
    """Does it answer a harmless request with an error? A slow one does not count: it may be at work."""
    return await _status_of_a_token(client, instance, timeout_s, headers) >= 500


async def _status_of_a_token(client: HttpClient, instance: Instance, timeout_s: float, headers: dict[str, str]) -> int:
    """The HTTP status with which it answers a request of one token; 0 where it does not answer in time."""
    body = encode({"model": instance.abilities.model, "prompt": [1], "max_tokens": 1})
    try:
        return (await client.fetch(instance.url, "POST", COMPLETION_PATH, body, headers, timeout_s)).status
    except HttpFault:
        return 0


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


async def abilities(
    client: HttpClient, url: str, headers: dict[str, str], timeout_s: float = 30.0, max_running: int = 256
) -> Abilities:
    """Find out what a server can do: its model, its KV cache, and whether it pins KV for others.

    Raises
    ------
    PenstockError
        It does not answer, or not as an OpenAI-compatible server does.
    """
    try:
        models = await client.fetch(url, "GET", "/v1/models", headers=headers, timeout_s=timeout_s)
        metrics = await client.fetch(url, "GET", "/metrics", headers=headers, timeout_s=timeout_s)
        if models.status != 200:
            raise PenstockError(f"{url}/v1/models answers {models.status}", "check the address and --engine-api-key")
        card = msgspec.json.decode(models.body, type=_Cards).data[0]
        body = {"model": card.id, "prompt": [1, 2], "max_tokens": 1, "temperature": 0}
        speaks_nixl = metrics.status == 200 and b"\nvllm:nixl_" in metrics.body
        if not speaks_nixl:  # the sure way, which leaves a block pinned until its lease is over
            body["kv_transfer_params"] = HANDOVER
        probe = await client.fetch(url, "POST", COMPLETION_PATH, encode(body), headers, timeout_s)
        version = await client.fetch(url, "GET", "/version", headers=headers, timeout_s=timeout_s)
    except HttpFault as fault:
        raise PenstockError(f"{url} does not answer ({fault.reason})", "start the server, or check the URL") from None
    except (msgspec.MsgspecError, IndexError):
        raise PenstockError(f"{url} is no OpenAI-compatible server", "attach vLLM servers") from None
    if probe.status != 200:
        raise PenstockError(f"{url} answers {probe.status} to a completion of one token", "check the server's log")
    labels = _labels(metrics.body, b"vllm:cache_config_info{") if metrics.status == 200 else {}
    params = read_chunk(probe.body).kv_transfer_params
    block_size = int(labels.get("block_size", "16"))
    blocks = labels.get("num_gpu_blocks", "")
    return Abilities(
        card.id,
        card.max_model_len if card.max_model_len is not None else 2**20,
        block_size,
        int(blocks) if blocks.isdigit() else 2**20 // block_size,
        labels.get("enable_prefix_caching", "True") == "True",
        speaks_nixl or is_claim(params),
        _version(version.body) if version.status == 200 else "",
        max_running,
    )


def _labels(text: bytes, start: bytes) -> dict[str, str]:
    for line in text.splitlines():
        if line.startswith(start):
            return {key.decode(): value.decode() for key, value in _LABEL.findall(line)}
    return {}


def _version(body: bytes) -> str:
    try:
        found = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        return ""
    return str(found.get("version", "")) if isinstance(found, dict) else ""
