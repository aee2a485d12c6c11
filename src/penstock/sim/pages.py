"""One allocator of device pages for KV and fine-tuning: KV comes first, what it does not use is lent.

Ours, after the idea of Harli (arXiv 2511.11729), whose abstract says no more than that fine-tuning tensors and KV come
from one pool. A page is one KV block. Fine-tuning holds two kinds: *state* (adapter, its gradients, the optimiser),
which it keeps, and *activations* of the micro-batch in progress, which it gives back when KV asks. It can do so only
at a boundary (the end of a layer), so KV that finds too few free pages waits for one boundary and not longer: between
the asking and the taking nothing is lent.
"""

from __future__ import annotations

from penstock.core.errors import PenstockError


class PagePool:
    """``pages`` pages with the numbers 0, 1, …; each is free, or KV's, or state, or lent for activations."""

    def __init__(self, pages: int) -> None:
        if pages < 1:
            raise PenstockError(f"a pool of {pages} pages", "give 1 or more")
        self.pages = pages
        self.free: list[int] = list(range(pages - 1, -1, -1))
        self.state: list[int] = []
        self.lent: list[int] = []
        self.wanted = 0

    def reserve_state(self, pages: int) -> bool:
        """Take ``pages`` pages for what fine-tuning keeps; False, and nothing taken, where they are not free."""
        if pages > len(self.free) - self.wanted:
            return False
        self.state.extend(self._pop(pages))
        return True

    def take(self, pages: int) -> list[int] | None:
        """Pages for KV: their numbers, or None where they are not free.

        If activations hold what is missing, they are asked to leave: after the next :meth:`boundary` the same call
        succeeds. Otherwise KV itself must give way, and nothing is asked.
        """
        if pages <= len(self.free):
            if pages >= self.wanted:
                self.wanted = 0
            return self._pop(pages)
        if pages <= len(self.free) + len(self.lent):
            self.wanted = max(self.wanted, pages)
        return None

    def give(self, pages: list[int]) -> None:
        """KV returns pages that it took."""
        self.free.extend(pages)

    def withdraw(self) -> None:
        """KV wants no more what it asked for (its request has gone)."""
        self.wanted = 0

    def lend(self, pages: int) -> bool:
        """Lend pages for the activations of a micro-batch; False while KV waits, or where they are not free."""
        if self.wanted or pages > len(self.free):
            return False
        self.lent.extend(self._pop(pages))
        return True

    def boundary(self) -> bool:
        """Fine-tuning is between two layers: if KV waits, the activations go. True if they went."""
        if not self.wanted or not self.lent:
            return False
        self.end_micro_batch()
        return True

    def end_micro_batch(self) -> None:
        """The micro-batch is done, or is dropped: its activations are free."""
        self.free.extend(self.lent)
        self.lent.clear()

    def _pop(self, pages: int) -> list[int]:
        if pages == 0:
            return []
        found = self.free[-pages:]
        del self.free[-pages:]
        return found
