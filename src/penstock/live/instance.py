"""One engine as the gateway knows it: address, abilities, and a running account of what it has been given."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from penstock.core.events import Load
from penstock.core.types import MigrationLevel, Role
from penstock.live.link import Link
from penstock.live.plugin.penstock_engine.messages import Answer, Step


class Health(StrEnum):
    """UP gets work; SUSPECT is being probed; DOWN has lost what it had and is probed until it is well again."""

    UP = "up"
    SUSPECT = "suspect"
    DOWN = "down"
    GONE = "gone"


class Abilities(msgspec.Struct, frozen=True):
    """What a server was found to be able to do. ``blocks`` of ``block_size`` tokens hold its KV; ``plugin`` is what its
    plugin offers (``handoff``, ``precopy``, ``predict``), empty where it has none.
    """

    model: str
    max_model_len: int
    block_size: int
    blocks: int
    prefix_caching: bool
    handover: bool
    version: str = ""
    max_running: int = 256
    plugin: tuple[str, ...] = ()

    @property
    def levels(self) -> tuple[MigrationLevel, ...]:
        """Ways in which a running decode can leave, simplest first."""
        found = [MigrationLevel.REPLAY]
        if self.handover and self.prefix_caching:
            found.append(MigrationLevel.REPROMPT)
        if self.handover and "handoff" in self.plugin:
            found.append(MigrationLevel.HANDOFF)
            if "precopy" in self.plugin:
                found.append(MigrationLevel.PRECOPY)
        return tuple(found)

    def takes(self, level: MigrationLevel) -> bool:
        """Can a running decode come here in this way? What is staged must be found again in the prefix cache."""
        if level == MigrationLevel.REPLAY:
            return True
        return self.handover and (self.prefix_caching or level == MigrationLevel.HANDOFF)


def best_level(source: Abilities, target: Abilities, wanted: MigrationLevel) -> MigrationLevel:
    """The best way from one to the other that is not above ``wanted``."""
    return max(level for level in source.levels if level <= wanted and target.takes(level))


def with_plugin(abilities: Abilities, hello: Answer | None) -> Abilities:
    """The same with what a plugin said that it can do."""
    offered = hello.abilities if hello is not None else ()
    found: Abilities = msgspec.structs.replace(abilities, plugin=offered)
    return found


class Instance:
    """An engine and its account.

    ``streams`` decodes hold ``tokens`` of KV, and ``producing`` of them have brought tokens; ``prefills`` calls have
    not brought their first token yet. ``itl_s`` is the moving mean of its inter-token time, ``takeover_s`` that of
    taking over a moved stream by level, ``heard_s`` when its latest token came (gateway clock). ``decoded`` tokens
    came in ``decoding_s`` seconds of its streams. ``plugin`` is the address of its plugin, ``link`` the connection to
    that while it is up.
    """

    def __init__(self, index: int, url: str, role: Role, abilities: Abilities, plugin: str | None = None) -> None:
        self.index = index
        self.url = url
        self.role = role
        self.abilities = abilities
        self.plugin = plugin
        self.link: Link | None = None
        self.health = Health.UP
        self.held = False
        self.streams = 0
        self.tokens = 0
        self.prefills = 0
        self.itl_s = 0.0
        self.takeover_s: dict[MigrationLevel, float] = {}
        self.heard_s = 0.0
        self.decoded = 0
        self.decoding_s = 0.0
        self.down_reason = ""
        self.producing = 0
        self._tokens_then = 0  # when the plugin last spoke
        self._preempted = 0  # streams that had begun and did not run by then

    @property
    def name(self) -> str:
        """How operators call it."""
        return str(self.index)

    def connect(self, link: Link | None) -> None:
        """Use this connection to its plugin from now on, or none; the one before is closed."""
        if self.link is not None:
            self.link.close()
        self.link = link
        if link is not None:
            link.on_step = self._stepped
            link.on_hello = self._renewed

    def _stepped(self, step: Step) -> None:
        self._tokens_then = self.tokens
        # An engine is ahead of what has come here, so decodes that it does not run have been preempted.
        self._preempted = max(self.producing - sum(r.output_tokens > 0 for r in step.running), 0)

    def _renewed(self, hello: Answer) -> None:
        self.abilities = with_plugin(self.abilities, hello)

    def load(self) -> Load:
        """What its plugin says, with what has been given to it since; its account where there is no plugin, or where
        that has been silent.
        """
        block = self.abilities.block_size
        link = self.link
        if link is not None and link.step is not None and link.fresh():
            step = link.step
            running = max(self.streams - self._preempted, 0)
            free = step.free_blocks - (self.tokens - self._tokens_then) // block
            step_s = link.step_s if running else 0.0
            return Load(running, step.waiting, self.tokens, min(max(free, 0), step.total_blocks), step_s)
        # Each decode holds a partly filled block: half of one on average.
        used = self.tokens // block + (self.streams + 1) // 2
        step_s = self.itl_s if self.streams else 0.0
        return Load(self.streams, self.prefills, self.tokens, max(self.abilities.blocks - used, 0), step_s)

    def joined(self, tokens: int, now_s: float) -> None:
        """A decode of ``tokens`` tokens begins to stream."""
        if self.streams == 0:
            self.heard_s = now_s
        self.streams += 1
        self.tokens += tokens

    def began(self, tokens: int, now_s: float) -> None:
        """A stream brought its first ``tokens`` tokens; the gap before them is queueing, transfer or prefill."""
        self.producing += 1
        self.tokens += tokens
        self.heard_s = now_s

    def left(self, tokens: int, began: bool) -> None:
        """A decode that had grown to ``tokens`` tokens is over here, if it ever ``began``."""
        self.streams -= 1
        self.producing -= began
        self.tokens -= tokens

    def heard(self, count: int, gap_s: float, now_s: float) -> None:
        """A stream brought ``count`` tokens, ``gap_s`` after its previous ones."""
        self.tokens += count
        self.heard_s = now_s
        self.decoded += count
        self.decoding_s += gap_s
        if self.itl_s == 0.0:
            self.itl_s = gap_s / count
        else:
            self.itl_s += 0.05 * (gap_s / count - self.itl_s)

    def took_over(self, level: MigrationLevel, seconds: float) -> None:
        """A stream moved here brought its first token ``seconds`` after its source's last one that counts."""
        before = self.takeover_s.get(level, seconds)
        self.takeover_s[level] = before + 0.3 * (seconds - before)

    def forget(self) -> None:
        """It went down: nothing is on it any more."""
        self.itl_s = 0.0
