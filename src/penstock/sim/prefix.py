"""Prefix cache of one engine: leading prompt blocks that stay after their request has gone."""

from __future__ import annotations


class PrefixCache:
    """Hash blocks with reference counts; unreferenced ones wait in order of last use until the space is needed.

    An unreferenced block counts as free, as in vLLM: it is given up only when the allocator runs into it.
    ``width`` is the number of engine blocks one hash stands for.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.references: dict[int, int] = {}
        self.idle: dict[int, None] = {}  # insertion order = order of last use

    def match(self, hashes: tuple[int, ...]) -> int:
        """How many leading hashes are here."""
        count = 0
        for h in hashes:
            if h not in self.references:
                break
            count += 1
        return count

    def acquire(self, h: int) -> int:
        """Take a reference; return how many engine blocks leave the free pool."""
        held = self.references[h]
        self.references[h] = held + 1
        if held == 0:
            del self.idle[h]
            return self.width
        return 0

    def insert(self, h: int) -> bool:
        """Make a sequence's own block a shared one, referenced once; False if the hash is here already."""
        if h in self.references:
            return False
        self.references[h] = 1
        return True

    def release(self, h: int) -> int:
        """Give a reference back; return how many engine blocks become free."""
        held = self.references[h] - 1
        self.references[h] = held
        if held == 0:
            self.idle[h] = None
            return self.width
        return 0

    def shrink(self, free_blocks: int) -> None:
        """Forget the longest unused blocks until the idle ones fit into what is free."""
        while self.idle and len(self.idle) * self.width > free_blocks:
            oldest = next(iter(self.idle))
            del self.idle[oldest]
            del self.references[oldest]
