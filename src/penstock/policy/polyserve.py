"""PolyServe (arXiv 2507.17769): TPOT tiers with servers of their own, each filled before the next one opens.

A request goes to the *highest*-loaded server of its tier that still passes the admission tests (``feasible.py``), so
that load falls off steeply and the last servers run empty. If its tier refuses, the ladder is: a server of a tighter
tier, as a guest that must meet the host's budget (lazy promotion); one more server from the idle pool; else it stays
pending with the controller. A server that runs empty goes back to the pool. Nothing is rejected.

``polyserve`` places decodes after their prefill, whose own placement is that of the other presets. ``polyserve-mixed``
places on arrival: an engine fills what its decodes leave of the iteration budget with prompt tokens (dynamic chunking),
and a request is admitted only where the chunk that can be kept through its whole prefill brings it in on time.

Ours, where we had no text: an idle server refuses nobody whose KV fits (or nothing would ever serve a target below its
floor); a request whose deadline not even an idle server could meet skips the tests of its own deadline, never those
that protect others; what a tier does that has no server while all are taken (``reclaim``); the numbers below.
"""

from __future__ import annotations

from math import ceil, inf
from typing import Any, Final

import numpy as np

from penstock.core.events import (
    Aborted,
    DecodeStarted,
    Event,
    Finished,
    InstanceDown,
    Interrupted,
    MigrationDone,
    MigrationFailed,
    PrefillDone,
    RequestArrived,
)
from penstock.core.types import Slo
from penstock.policy.chunking import Credit, TierKit
from penstock.policy.feasible import Admissibility, AverageLength, Prospect, Residents, due_s
from penstock.policy.latency import PrefillFit
from penstock.policy.options import Option, OptionValue, number, word
from penstock.policy.parts import Beliefs, Choice, DecodePlacement, Part, Policy, PrefillPlacement
from penstock.policy.placement import LeastPrefillWork, first_of
from penstock.policy.profile_table import ProfileTable
from penstock.policy.tiers import Demand, Tiers
from penstock.policy.view import ClusterView, RequestRecord

ON_OFF: Final = ("on", "off")
ASK_AGAIN_S: Final = 0.5
"""A server that refused, and that nobody has left since, is not worked out again for this long."""

GUESTS_FROM: Final = 0.5
"""A host tier keeps so many servers beyond its own need to itself."""
SAME_BATCH: Final = 0.95
"""Tiers whose batches differ by less are worth the same."""
PROMISE_FROM: Final = 1.0
"""A server drains for a tier that lacks so many servers more than its own."""

POLYSERVE_OPTIONS = (
    Option("ttft-test", "on", "test that the prefill ends within TTFT", "paper", words=ON_OFF),
    Option("second-test", "on", "test that the second token comes within TTFT + TPOT", "paper", words=ON_OFF),
    Option("steady-test", "on", "test that the longest iteration to come stays within TPOT", "paper", words=ON_OFF),
    Option("promotion", "on", "may a tier's requests be guests of a tighter one?", "paper", words=ON_OFF),
    Option(
        "routing",
        "highest",
        "which feasible server: the highest or the least loaded",
        "paper",
        words=("highest", "least"),
    ),
    Option(
        "reclaim",
        "on",
        "with the pool empty, a tier takes over a looser one's server, drained if need be",
        words=ON_OFF,
    ),
    Option("merge", 1.0, "TPOT targets within this factor share a tier", low=1.0),
    Option("margin", 0.03, "share of the TPOT budget that is left unused", low=0.0, high=0.9),
    Option("memory", 0.97, "share of the KV cache that may be planned full", low=0.1, high=1.0),
    Option("prior", 256.0, "average output tokens before anything has finished", low=1.0),
)
MIXED_OPTIONS = (
    *POLYSERVE_OPTIONS,
    Option("stretch", 2.0, "an iteration may take this many budgets while slack lasts", low=1.0),
    Option("attention", 10_000.0, "prompt tokens from which the attention of its chunks counts", "paper", low=0.0),
)


class Router(Part):
    """The ladder, over the servers of one role. Subclasses say what a placement leads to."""

    observes = True
    from_arrival = False
    """Does a request need a server of these from its arrival on, or only once it is prefilled?"""

    def __init__(self, table: ProfileTable, tests: Admissibility, tiers: Tiers, average: AverageLength) -> None:
        self.table = table
        self.tests = tests
        self.tiers = tiers
        self.average = average
        self.promotion = True
        self.reclaim = True
        self.highest = True
        self.margin = 0.0
        self.memory = 1.0
        self.residents: list[Residents] = []
        self.guests = 0
        # Where each request is, and since when.
        self._where: dict[int, tuple[int, float]] = {}
        # The latest placement that a server itself refused: (version of its residents, budget, tokens, when).
        self._full: dict[int, tuple[int, float, int, float]] = {}
        self.demand = Demand()
        # Servers that drain for a tighter tier.
        self.promises: dict[int, float] = {}

    # -- what happens -----------------------------------------------------------------------------------------------

    def observe(self, event: Event, view: ClusterView, now_s: float) -> None:
        """Keep the books of who is where, and give empty servers back."""
        self._cover(view)
        self._count(event)
        if isinstance(event, Finished):
            self._carry(event.instance, view, now_s)
            self._gone(event.request)
            running = sum([there.output_tokens(now_s) for there in self.residents])
            self.average.finished(event.generated, running)
        elif isinstance(event, (PrefillDone, DecodeStarted)):
            self._carry(event.instance, view, now_s)
            there = self.residents[event.instance]
            if isinstance(event, PrefillDone) and event.request in there:
                there.restart(event.request, 1, now_s)
        elif isinstance(event, Aborted):
            self._gone(event.request)
        elif isinstance(event, Interrupted):
            self._lost_at(event.request, now_s)
        elif isinstance(event, MigrationDone):
            self._carry(event.source, view, now_s)
            self._carry(event.target, view, now_s)
            self._moved(event.request, event.source, event.target, now_s)
        elif isinstance(event, MigrationFailed):
            self._moved(event.request, event.target, event.source, now_s)
        elif isinstance(event, InstanceDown):
            for request in event.lost:
                self._lost_at(request, now_s)
            self.residents[event.instance] = Residents()
            self._full.pop(event.instance, None)
            self.promises.pop(event.instance, None)
            self.tiers.give_back(event.instance)

    def _count(self, event: Event) -> None:
        if isinstance(event, RequestArrived):
            self.demand.expect(event.request, self.tiers.tier_of(event.slo.tpot_s))
            if self.from_arrival:
                self.demand.begin(event.request)
        elif isinstance(event, PrefillDone):
            self.demand.begin(event.request)
        elif isinstance(event, (Finished, Aborted)):
            self.demand.end(event.request)

    def _cover(self, view: ClusterView) -> None:
        self.tiers.cover(view.size)
        while len(self.residents) < view.size:
            self.residents.append(Residents())

    def _carry(self, i: int, view: ClusterView, now_s: float) -> None:
        self.residents[i].carry(now_s, float(view.step_s[i]))

    def _gone(self, request: int) -> None:
        i, _ = self._where.pop(request, (-1, 0.0))
        if i >= 0 and self.residents[i].drop(request):
            self._release(i)

    def _lost_at(self, request: int, now_s: float) -> None:
        """It was lost where it was; the controller may have placed it elsewhere already, at this very moment."""
        _, since_s = self._where.get(request, (-1, now_s))
        if since_s < now_s:
            self._gone(request)

    def _moved(self, request: int, source: int, target: int, now_s: float) -> None:
        if source >= 0 and target >= 0 and request in self.residents[source]:
            self.residents[source].hand_over(request, self.residents[target], now_s)
            self._where[request] = (target, now_s)
            self._release(source)

    def _release(self, i: int) -> None:
        if len(self.residents[i]) == 0:
            self.promises.pop(i, None)
            self.tiers.give_back(i)
        else:
            self.tiers.loosen(i, self.residents[i].tightest())

    # -- the ladder -------------------------------------------------------------------------------------------------

    def route(self, request: RequestRecord, view: ClusterView, rows: Any, now_s: float) -> Choice:
        """Own tier, a tighter one, the pool, a looser tier's server, or wait."""
        self._cover(view)
        tokens = request.context_tokens()
        holds = view.capacity_tokens[rows] >= tokens
        if not holds.any():  # nobody, or nobody large enough: the controller refuses it, without an event
            self.demand.end(request.request)
            return first_of(rows)
        rows = rows[holds]
        tiers = self.tiers
        own = tiers.tier_of(request.slo.tpot_s)
        lost = self.lost(request, now_s)
        i = self._within(own, request, view, rows, now_s, lost)
        if i < 0 and self.promotion:
            for tier in tiers.tighter(own):
                if not self._has_room_for_guests(tier, own, view, rows, now_s):
                    continue
                i = self._within(tier, request, view, rows, now_s, lost)
                if i >= 0:
                    self.guests += 1
                    break
        if i < 0:
            i = self._from_pool(own, request, view, rows, now_s, lost)
        if i < 0 and self.reclaim:
            i = self._reclaimed(own, request, view, rows, now_s, lost)
        if i < 0:
            return Choice.wait()
        if self._where.get(request.request, (i, 0.0))[0] != i:
            self._gone(request.request)
        self._where[request.request] = (i, now_s)
        self.residents[i].put(request.request, request.prompt_tokens, request.generated, now_s, own)
        return Choice(i)

    def _within(
        self, tier: float, request: RequestRecord, view: ClusterView, rows: Any, now_s: float, lost: bool
    ) -> int:
        """The first server of a tier, in order of load, that admits; -1 if none does.

        Guests do not count in that order, and they begin at its other end where they take the place of more tight
        requests than they would of their own: so a tier with too many servers keeps them free of its own requests.
        """
        own = self.tiers.tier_of(request.slo.tpot_s)
        servers = self.tiers.servers(tier, rows)
        if self.promises:
            servers = np.array([i for i in servers.tolist() if self.promises.get(i, own) == own], np.intp)
        if len(servers) == 0:
            return -1
        load = self.load_s(view, servers, now_s) * self._hosts_share(servers, tier)
        order = (-load if self.highest and own == tier else load).argsort(kind="stable")
        for i in servers[order].tolist():
            if self._admits(i, tier, request, view, now_s, lost):
                return int(i)
        return -1

    def _hosts_share(self, servers: Any, tier: float) -> Any:
        """Share of the residents of each server that are no guests: float64[k]."""
        residents = [self.residents[i] for i in servers.tolist()]
        return np.array([1.0 - there.looser_than(tier) / max(len(there), 1) for there in residents])

    def _from_pool(
        self, own: float, request: RequestRecord, view: ClusterView, rows: Any, now_s: float, lost: bool
    ) -> int:
        for i in self.tiers.pool(rows).tolist():
            if len(self.residents[i]) == 0 or self._admits(i, own, request, view, now_s, lost):
                self.tiers.take(i, own)
                return int(i)
        return -1

    def _has_room_for_guests(self, tier: float, own: float, view: ClusterView, rows: Any, now_s: float) -> bool:
        """May a tighter tier take guests of ``own``? Only into what it has beyond its own need.

        A guest costs a tighter server more than its own would, since fewer fit there: were it let in anywhere, the
        tight tier would be full of guests and ask for ever more servers. Where the cache ends the batch in both tiers,
        a place is worth the same in both.
        """
        batch = self.batch(tier, view, rows, now_s)
        if batch >= SAME_BATCH * self.batch(own, view, rows, now_s):
            return True
        guests = sum([self.residents[i].looser_than(tier) for i in self.tiers.servers(tier, rows).tolist()])
        return bool(self.spare(tier, view, rows, now_s) - guests / batch >= GUESTS_FROM)

    def batch(self, tier: float, view: ClusterView, rows: Any, now_s: float) -> float:
        """Requests of the present mean size that a server holds within a tier's budget and its cache; 1 or more."""
        running = float(view.decode_requests(rows).sum())
        context = float(view.resident_tokens(now_s, rows).sum()) / running if running > 0.0 else 0.0
        context = max(context, 1.0)
        budget_s = tier * (1.0 - self.margin)
        low, high = 1.0, max(self.memory * float(view.capacity_tokens[rows].mean()) / context, 1.0)
        if self.table.decodes.one(high, high * context) <= budget_s:
            return high
        while high - low > 0.01 * high:
            middle = 0.5 * (low + high)
            fits = self.table.decodes.one(middle, middle * context) <= budget_s
            low, high = (middle, high) if fits else (low, middle)
        return low

    def spare(self, tier: float, view: ClusterView, rows: Any, now_s: float) -> float:
        """Servers that a tier has beyond what its requests, those that wait too, need; negative if it needs more."""
        return len(self.tiers.servers(tier, rows)) - self.demand.of(tier) / self.batch(tier, view, rows, now_s)

    def _reclaimed(
        self, own: float, request: RequestRecord, view: ClusterView, rows: Any, now_s: float, lost: bool
    ) -> int:
        """A looser tier's server, if all that is there fits the tighter budget too: it changes tier. Else -1.

        A full server never fits; one of a tier that needs its servers less is *promised*, and from then on its old
        tier places nothing more there.
        """
        for i in self.promised_to(own, rows):
            if self._admits(i, own, request, view, now_s, lost):
                self._change(i, own)
                return i
        for tier in reversed(self.tiers.known):
            if tier <= own:
                break
            servers = self.tiers.servers(tier, rows)
            if len(servers) == 0:
                continue
            i = int(servers[self.load_s(view, servers, now_s).argmin()])
            if self._admits(i, own, request, view, now_s, lost):
                self._change(i, own)
                return i
        self._take_promises_back(own, view, rows, now_s)
        if not self.promised_to(own, rows):
            self._promise(own, view, rows, now_s)
        return -1

    def _promise(self, own: float, view: ClusterView, rows: Any, now_s: float) -> None:
        """Promise this tier the least loaded server of the looser tier that can spare one best, if one can."""
        donor, most = -1.0, self.spare(own, view, rows, now_s) + PROMISE_FROM
        for tier in self.tiers.known:
            if tier > own and len(self.tiers.servers(tier, rows)) > 0:
                spare = self.spare(tier, view, rows, now_s)
                if spare > most:
                    donor, most = tier, spare
        free = [i for i in self.tiers.servers(donor, rows).tolist() if i not in self.promises] if donor > 0.0 else []
        if free:
            self.promises[free[int(self.load_s(view, np.array(free), now_s).argmin())]] = own

    def _take_promises_back(self, own: float, view: ClusterView, rows: Any, now_s: float) -> None:
        """Where a tier has enough by now, the server that drains for it goes on as it was: somebody waits."""
        for server, promised in list(self.promises.items()):
            if promised != own and self.spare(promised, view, rows, now_s) >= 0.0:
                del self.promises[server]

    def promised_to(self, tier: float, rows: Any) -> list[int]:
        """Servers that drain for a tier."""
        return [i for i, promised in self.promises.items() if promised == tier and i in rows]

    def _change(self, i: int, tier: float) -> None:
        self.promises.pop(i, None)
        self.tiers.give_back(i)
        self.tiers.take(i, tier)

    def _admits(self, i: int, tier: float, request: RequestRecord, view: ClusterView, now_s: float, lost: bool) -> bool:
        """All tests, on one server, for the budget of ``tier``."""
        there = self.residents[i]
        tokens = request.context_tokens()
        known = self._full.get(i)
        if known is not None:
            version, budget_s, least, when_s = known
            if version == there.version and budget_s >= tier and least <= tokens and now_s - when_s < ASK_AGAIN_S:
                return False  # nobody has left since it refused one no larger
        budget_s = tier * (1.0 - self.margin)
        prospect = self.prospect(i, budget_s, request, view, now_s)
        capacity = self.memory * float(view.capacity_tokens[i])
        if self.tests.room(prospect, budget_s, capacity) is not None:
            self._full[i] = (there.version, tier, tokens, now_s)
        due = due_s(request.slo.ttft_s, min(request.slo.tpot_s, tier), self.next_token(request))
        return self.tests.admit(prospect, due, budget_s, capacity, lost)

    def _future(self, i: int, request: RequestRecord, view: ClusterView, now_s: float) -> tuple[float, float]:
        """Longest iteration and most KV tokens to come on a server, by its residents and by the view."""
        steady_s, peak = self.residents[i].future(
            self.table, self.average.tokens(), now_s, (request.prompt_tokens, request.generated)
        )
        return steady_s * float(view.slow[i]), peak

    # -- the subclass's part ----------------------------------------------------------------------------------------

    def load_s(self, view: ClusterView, rows: Any, now_s: float) -> Any:
        """Load of servers: seconds of an iteration over all that is there or promised; float64[k]."""
        raise NotImplementedError

    def next_token(self, request: RequestRecord) -> int:
        """Index of the token that ``first_s`` of :meth:`prospect` is about."""
        raise NotImplementedError

    def lost(self, request: RequestRecord, now_s: float) -> bool:
        """Would its first tokens be late even on an idle server?"""
        raise NotImplementedError

    def prospect(self, i: int, budget_s: float, request: RequestRecord, view: ClusterView, now_s: float) -> Prospect:
        """What placing the request on server ``i`` would lead to."""
        raise NotImplementedError


class PolyServeDecode(DecodePlacement, Router):
    """Decode servers in tiers. The first token is out; the second waits for the KV and for one iteration."""

    def __init__(
        self, beliefs: Beliefs, table: ProfileTable, tests: Admissibility, tiers: Tiers, average: AverageLength
    ) -> None:
        Router.__init__(self, table, tests, tiers, average)
        self.beliefs = beliefs
        self._alone_s = table.decodes.one(1.0, 0.0)

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`DecodePlacement`; waits if every server refuses."""
        return self.route(request, view, view.decodes, now_s)

    def load_s(self, view: ClusterView, rows: Any, now_s: float) -> Any:
        """See :class:`Router`."""
        return self.table.iteration_s(view.decode_requests(rows), view.resident_tokens(now_s, rows))

    def _pulled_s(self, request: RequestRecord, now_s: float) -> float:
        """From the arrival until the KV could be on another server."""
        return now_s - request.arrival_s + self.beliefs.transfer_s(request.context_tokens())

    def next_token(self, request: RequestRecord) -> int:
        """See :class:`Router`: the latest it has, since what comes next is the second of the two."""
        return max(request.generated - 1, 0)

    def lost(self, request: RequestRecord, now_s: float) -> bool:
        """See :class:`Router`."""
        first_due_s, second_due_s = due_s(request.slo.ttft_s, request.slo.tpot_s, self.next_token(request))
        late = request.generated == 1 and request.first_token_s - request.arrival_s > first_due_s
        return late or self._pulled_s(request, now_s) + self._alone_s > second_due_s

    def prospect(self, i: int, budget_s: float, request: RequestRecord, view: ClusterView, now_s: float) -> Prospect:
        """See :class:`Router`. It joins at the end of the iteration in progress."""
        tokens = request.context_tokens()
        running, resident = float(view.decode_requests(i)), float(view.resident_tokens(now_s, i))
        iteration_s = self.table.decodes.one(running + 1.0, resident + tokens) * float(view.slow[i])
        wait_s = float(view.step_s[i]) if running > 0.0 and view.step_s[i] < inf else 0.0
        steady_s, peak = self._future(i, request, view, now_s)
        first_s = request.first_token_s - request.arrival_s if request.generated == 1 else 0.0
        second_s = self._pulled_s(request, now_s) + wait_s + iteration_s
        return Prospect(first_s, second_s, max(steady_s, iteration_s), peak)


class PolyServeMixed(PrefillPlacement, Router):
    """Mixed servers in tiers, with continuous chunked-prefill prediction."""

    from_arrival = True

    def __init__(
        self, table: ProfileTable, tests: Admissibility, tiers: Tiers, average: AverageLength, max_batched_tokens: int
    ) -> None:
        Router.__init__(self, table, tests, tiers, average)
        self.max_batched_tokens = max_batched_tokens
        self.credit = Credit()
        self._due: dict[int, float] = {}

    def place(self, request: RequestRecord, view: ClusterView, now_s: float) -> Choice:
        """See :class:`PrefillPlacement`; waits if every server refuses."""
        choice = self.route(request, view, view.mixed, now_s)
        if choice.instance >= 0:
            first_due_s, _ = due_s(request.slo.ttft_s, request.slo.tpot_s, self.next_token(request))
            self._due[request.request] = request.arrival_s + first_due_s
        return choice

    def observe(self, event: Event, view: ClusterView, now_s: float) -> None:
        """See :class:`Router`. Also: who joins a batch brings the slack that it has."""
        super().observe(event, view, now_s)
        if isinstance(event, PrefillDone):
            slack_s = max(self._due.pop(event.request, now_s) - now_s, 0.0)
            self.credit.join(event.instance, slack_s, event.load.running <= 1)
        elif isinstance(event, (Aborted, Finished)):
            self._due.pop(event.request, None)

    def load_s(self, view: ClusterView, rows: Any, now_s: float) -> Any:
        """See :class:`Router`."""
        requests = view.decode_requests(rows) + view.prefill_requests[rows]
        return self.table.iteration_s(requests, view.resident_tokens(now_s, rows) + view.prefill_tokens[rows])

    def next_token(self, request: RequestRecord) -> int:
        """See :class:`Router`."""
        return request.generated

    def lost(self, request: RequestRecord, now_s: float) -> bool:
        """See :class:`Router`."""
        first_s = now_s - request.arrival_s + self._prefill_s(request.context_tokens())
        return first_s > due_s(request.slo.ttft_s, request.slo.tpot_s, self.next_token(request))[0]

    def _prefill_s(self, tokens: int) -> float:
        """Prefill of one prompt alone."""
        whole, rest = divmod(tokens, self.max_batched_tokens)
        alone = self.table.with_chunk_s
        return whole * alone(0.0, 0.0, self.max_batched_tokens) + alone(0.0, 0.0, rest)

    def prospect(self, i: int, budget_s: float, request: RequestRecord, view: ClusterView, now_s: float) -> Prospect:
        """See :class:`Router`."""
        slow = float(view.slow[i])
        decodes, resident = float(view.decode_requests(i)), float(view.resident_tokens(now_s, i))
        queued, ahead = float(view.prefill_requests[i]), float(view.prefill_tokens[i])
        tokens = request.context_tokens()
        wait_s = float(view.step_s[i]) if decodes > 0.0 and view.step_s[i] < inf else 0.0
        prefill_s = self.prefill_s(decodes, resident, queued, ahead, tokens, budget_s / slow) * slow
        steady_s, peak = self._future(i, request, view, now_s)
        first_s = now_s - request.arrival_s + wait_s + prefill_s
        iteration_s = self.table.decodes.one(decodes + 1.0, resident + tokens) * slow
        return Prospect(first_s, first_s + iteration_s, steady_s, peak)

    def prefill_s(
        self, decodes: float, resident: float, queued: float, ahead: float, tokens: float, budget_s: float
    ) -> float:
        """Seconds until a prompt is computed, by the chunk that can be kept through the whole prefill.

        Until then every decode grows by a token an iteration, the ``queued`` prompts (``ahead`` tokens) before it are
        computed and decode too. ``inf`` where nothing would be left for prompts.
        """
        work = ahead + tokens
        if decodes + queued == 0.0:
            return self._prefill_s(int(work))
        chunk, steps = self._kept(decodes + queued, resident + ahead, work, budget_s)
        if chunk <= 0:
            return inf
        chunk, steps = self._kept(decodes + queued, resident + ahead + decodes * steps, work, budget_s)
        if chunk <= 0:
            return inf
        return steps * self.table.with_chunk_s(decodes + queued, resident + ahead, chunk)

    def _kept(self, decodes: float, resident: float, work: float, budget_s: float) -> tuple[int, int]:
        """Chunk beside these decodes, and the iterations that ``work`` tokens take with it."""
        most = self.max_batched_tokens - int(decodes)
        chunk = most if budget_s == inf else min(self.table.most_chunk(decodes, resident, budget_s), most)
        return (chunk, ceil(work / chunk)) if chunk > 0 else (0, 0)


def _router_settings(router: Router, options: dict[str, OptionValue]) -> None:
    router.promotion = word(options, "promotion") == "on"
    router.reclaim = word(options, "reclaim") == "on"
    router.highest = word(options, "routing") == "highest"
    router.margin = number(options, "margin")
    router.memory = number(options, "memory")


def _tests(options: dict[str, OptionValue]) -> Admissibility:
    ttft, second, steady = (word(options, f"{name}-test") == "on" for name in ("ttft", "second", "steady"))
    return Admissibility(ttft, second, steady)


def polyserve(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``polyserve``."""
    tiers, average = Tiers(number(options, "merge")), AverageLength(number(options, "prior"))
    decode = PolyServeDecode(beliefs, ProfileTable(beliefs), _tests(options), tiers, average)
    _router_settings(decode, options)
    return Policy("polyserve", LeastPrefillWork(PrefillFit(beliefs)), decode)


def polyserve_mixed(beliefs: Beliefs, slo: Slo, options: dict[str, OptionValue]) -> Policy:
    """Build ``polyserve-mixed``."""
    tiers, average = Tiers(number(options, "merge")), AverageLength(number(options, "prior"))
    table = ProfileTable(beliefs)
    router = PolyServeMixed(table, _tests(options), tiers, average, beliefs.max_batched_tokens)
    _router_settings(router, options)
    kit = TierKit(table, tiers, router.credit, router.margin, number(options, "stretch"), number(options, "attention"))
    return Policy("polyserve-mixed", router, engine=kit)
