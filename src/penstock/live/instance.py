"""One engine as the gateway knows it: address, abilities, and a running account of what it has been given."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from penstock.core.events import Load
from penstock.core.types import MigrationLevel, Role


class Health(StrEnum):
    """UP gets work; SUSPECT is being probed; DOWN has lost what it had and is probed until it is well again."""

    UP = "up"
    SUSPECT = "suspect"
    DOWN = "down"
    GONE = "gone"


class Abilities(msgspec.Struct, frozen=True):
    """What a server was found to be able to do. ``blocks`` of ``block_size`` tokens hold its KV."""

    model: str
    max_model_len: int
    block_size: int
    blocks: int
    prefix_caching: bool
    handover: bool
    version: str = ""
    max_running: int = 256

    @property
    def levels(self) -> tuple[MigrationLevel, ...]:
        """Ways in which a running decode can come here, simplest first."""
        if self.handover and self.prefix_caching:
            return (MigrationLevel.REPLAY, MigrationLevel.REPROMPT)
        return (MigrationLevel.REPLAY,)


class Instance:
    """An engine and its account.

    ``streams`` decodes hold ``tokens`` of KV; ``prefills`` calls have not brought their first token yet. ``itl_s`` is
    the moving mean of its inter-token time, ``takeover_s`` that of taking over a moved stream, ``heard_s`` when its
    latest token came (gateway clock).
    """

    def __init__(self, index: int, url: str, role: Role, abilities: Abilities) -> None:
        self.index = index
        self.url = url
        self.role = role
        self.abilities = abilities
        self.health = Health.UP
        self.held = False
        self.streams = 0
        self.tokens = 0
        self.prefills = 0
        self.itl_s = 0.0
        self.takeover_s = 0.0
        self.heard_s = 0.0
        self.down_reason = ""

    @property
    def name(self) -> str:
        """How operators call it."""
        return str(self.index)

    def load(self) -> Load:
        """Its account as the controller reads it."""
        block = self.abilities.block_size
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

    def left(self, tokens: int) -> None:
        """A decode that had grown to ``tokens`` tokens is over here."""
        self.streams -= 1
        self.tokens -= tokens

    def heard(self, count: int, gap_s: float, now_s: float) -> None:
        """A stream brought ``count`` tokens, ``gap_s`` after its previous ones."""
        self.tokens += count
        self.heard_s = now_s
        if self.itl_s == 0.0:
            self.itl_s = gap_s / count
        else:
            self.itl_s += 0.05 * (gap_s / count - self.itl_s)

    def took_over(self, seconds: float) -> None:
        """A stream moved here brought its first token ``seconds`` after it was asked to."""
        self.takeover_s += (0.3 if self.takeover_s else 1.0) * (seconds - self.takeover_s)

    def forget(self) -> None:
        """It went down: nothing is on it any more."""
        self.itl_s = 0.0
