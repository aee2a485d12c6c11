"""What ``penstock serve`` was told, as one object, and the Setup that its policy believes in."""

from __future__ import annotations

import math
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from penstock.core.errors import PenstockError
from penstock.core.types import MigrationLevel, Role, Slo
from penstock.experiment.setup import ClusterSetup, Setup, Target, check, target_of
from penstock.perf.models import model_names
from penstock.policy.registry import preset

LEVELS = {"auto": MigrationLevel.REPROMPT} | {level.name.lower(): level for level in MigrationLevel}
"""``--migration-level``; a level that source and target do not both offer gives way to the best one that they do."""


class Attached(msgspec.Struct, frozen=True):
    """A server that somebody else runs; ``plugin`` is the address of its plugin's stream."""

    url: str
    role: Role
    plugin: str | None = None


class ServeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """See ``penstock serve --help``; times in seconds."""

    attach: tuple[Attached, ...] = ()
    model: str | None = None
    prefill: int = 1
    decode: int = 2
    mixed: int = 0
    engine: str = "vllm"
    engine_python: str | None = None
    engine_args: tuple[str, ...] = ()
    engine_key: str | None = None
    predictor: str | None = None
    max_num_seqs: int = 256
    hardware: str = "a100-80g"
    believe_model: str | None = None
    profile: str | None = None
    migration_level: str = "auto"
    policy: str = "ares"
    options: dict[str, float | str] = {}
    ttft_s: float = math.inf
    tpot_s: float = math.inf
    slos: dict[str, Slo] = {}
    hang_s: float = 2.0
    host: str = "127.0.0.1"
    port: int = 8000
    admin_port: int = 8001
    admin_key: str | None = None
    api_keys: tuple[str, ...] = ()
    max_inflight: int = 16384
    max_queue: int = 2048
    record: str | None = None
    log_json: bool = False
    log_level: str = "info"

    def roles(self) -> list[Role]:
        """The role of each instance, in order.

        Raises
        ------
        PenstockError
            There is none, or none that the policy could use.
        """
        if self.attach:
            found = [a.role for a in self.attach]
        else:
            kinds = ((Role.PREFILL, self.prefill), (Role.DECODE, self.decode), (Role.MIXED, self.mixed))
            if not preset(self.policy).disaggregated and not self.mixed:
                kinds = ((Role.MIXED, self.prefill + self.decode),)  # type: ignore[assignment]
            found = [role for role, count in kinds for _ in range(count)]
        if not preset(self.policy).disaggregated:
            if Role.MIXED not in found:
                raise PenstockError(f"policy {self.policy!r} needs mixed instances", "give role=mixed")
        elif Role.PREFILL not in found or Role.DECODE not in found:
            raise PenstockError(
                f"policy {self.policy!r} needs prefill and decode instances", "give both roles, or --policy mixed"
            )
        return found

    def setup(self) -> Setup:
        """What the policy believes, in the form that an event log can carry. Raises PenstockError."""
        if self.migration_level not in LEVELS:
            raise PenstockError(f"migration level {self.migration_level!r}", f"use one of {', '.join(LEVELS)}")
        roles = self.roles()
        wanted = self.believe_model
        if wanted is None and self.model is not None:
            known = self.model in model_names() or Path(self.model, "config.json").is_file()
            wanted = self.model if known else None
        cluster = ClusterSetup(
            model=wanted or "llama-3.1-8b",
            hardware=self.hardware,
            prefill=max(roles.count(Role.PREFILL), 0),
            decode=max(roles.count(Role.DECODE), 0),
            mixed=roles.count(Role.MIXED),
            max_num_seqs=self.max_num_seqs,
            profile=self.profile,
            migration_level=LEVELS[self.migration_level],
        )
        slos: dict[str, Target] = {name: target_of(s.ttft_s, s.tpot_s) for name, s in self.slos.items()}
        target = target_of(self.ttft_s, self.tpot_s)
        found = Setup(policy=self.policy, options=self.options, cluster=cluster, slo=target, slo_classes=slos)
        check(found)
        return found


def attached(text: str) -> Attached:
    """Read ``URL,role=ROLE,plugin=tcp://HOST:PORT``; the last two may be left out.

    Raises
    ------
    PenstockError
        It is not that.
    """
    url, *more = text.split(",")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise PenstockError(f"{url!r} is no server", "write http://HOST:PORT,role=prefill")
    role = Role.MIXED
    plugin = None
    for extra in more:
        key, _, value = extra.strip().partition("=")
        if key == "plugin":
            plugin = _plugin(value)
        elif key == "role" and value.upper() in Role.__members__:
            role = Role[value.upper()]
        else:
            raise PenstockError(f"{extra!r} is not understood", "write role=prefill, role=decode or role=mixed")
    return Attached(url.rstrip("/"), role, plugin)


def _plugin(text: str) -> str:
    parts = urlsplit(text)
    try:
        known = parts.scheme == "tcp" and parts.hostname and parts.port is not None and 0 < parts.port < 65535
    except ValueError:
        known = False
    if not known or parts.path or parts.query:
        raise PenstockError(f"{text!r} is no plugin", "write plugin=tcp://HOST:PORT")
    return text
