"""What Prometheus reads at ``/metrics``. Names follow vLLM's, with the prefix ``penstock:``.

Plain numbers on the hot path; text is made when somebody scrapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from penstock.core.types import MigrationLevel
from penstock.live.benefit import Benefits
from penstock.live.forecast import Forecasts
from penstock.live.histogram import Histogram
from penstock.live.instance import Health

if TYPE_CHECKING:
    from penstock.live.session import Session
    from penstock.live.world import LiveWorld

TTFT_BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
ITL_BOUNDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
E2E_BOUNDS = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)
PAUSE_STEPS_BOUNDS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0, 20.0, 50.0, 100.0)
KEPT_MOVES = 100_000


class LiveMetrics:
    """Counters and histograms of one gateway. Times in seconds."""

    def __init__(self) -> None:
        self.ttft: dict[str, Histogram] = {}
        self.tpot: dict[str, Histogram] = {}
        self.e2e: dict[str, Histogram] = {}
        self.itl = Histogram(ITL_BOUNDS)
        self.pause = {level: Histogram(ITL_BOUNDS) for level in MigrationLevel}
        self.pause_steps = {level: Histogram(PAUSE_STEPS_BOUNDS) for level in MigrationLevel}
        self.pauses: list[tuple[int, float, float]] = []
        self.last_pulls: list[tuple[int, int]] = []
        self.forecasts = Forecasts()
        self.benefits = Benefits()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.migrations: Counter[tuple[str, str, str]] = Counter()
        self.move_failures: Counter[str] = Counter()
        self.pinned: Counter[str] = Counter()
        self.slo: Counter[tuple[str, str]] = Counter()
        self.output_tokens = 0
        self.prompt_tokens = 0
        self.decoded_twice = 0
        self.flips = 0
        self.fences = 0
        self.engine_errors = 0
        self.divergences = 0
        self.protocol_errors = 0
        self.refused_at_door = 0

    # -- what happens -----------------------------------------------------------------------------------------------

    def first_token(self, session: Session, seconds: float) -> None:
        """A client got its first token ``seconds`` after its request."""
        name = session.intake.slo_class
        histogram = self.ttft.get(name)
        if histogram is None:
            histogram = self.ttft[name] = Histogram(TTFT_BOUNDS)
        histogram.add(seconds)

    def gap(self, seconds: float, tokens: int) -> None:
        """``tokens`` tokens reached a client ``seconds`` after the ones before."""
        if tokens:
            self.itl.add(seconds / tokens, tokens)

    def ended(self, session: Session, outcome: str) -> None:
        """A request is over: ``finished``, ``disconnected``, ``failed`` or ``rejected``."""
        name = session.intake.slo_class
        self.outcomes[name, outcome] += 1
        self.output_tokens += session.generated
        self.prompt_tokens += session.prompt_tokens
        if outcome != "finished":
            return
        self.e2e.setdefault(name, Histogram(E2E_BOUNDS)).add(session.world.now() - session.arrived_s)
        tpot = 0.0
        if session.generated > 1:
            tpot = (session.last_s - session.first_s) / (session.generated - 1)
            self.tpot.setdefault(name, Histogram(ITL_BOUNDS)).add(tpot)
        met = session.first_s - session.arrived_s <= session.slo.ttft_s and tpot <= session.slo.tpot_s
        self.slo[name, "met" if met else "missed"] += 1

    def moved(self, level: MigrationLevel, reason: str, twice: int) -> None:
        """A move has ended well; ``twice`` tokens were decoded by both engines."""
        self.migrations[level.name.lower(), reason, "done"] += 1
        self.decoded_twice += twice

    def paused(self, level: MigrationLevel, pause_s: float, itl_s: float) -> None:
        """The client waited ``pause_s`` for the first token after a cut, where tokens came every ``itl_s``."""
        self.pause[level].add(pause_s)
        if itl_s > 0.0:
            self.pause_steps[level].add(pause_s / itl_s)
        if len(self.pauses) < KEPT_MOVES:
            self.pauses.append((int(level), pause_s, itl_s))

    def copied_ahead(self, left: int, meanwhile: int) -> None:
        """A pre-copy left ``left`` tokens for its last pull, and ``meanwhile`` were decoded during the first one."""
        if len(self.last_pulls) < KEPT_MOVES:
            self.last_pulls.append((left, meanwhile))

    def move_failed(self, level: MigrationLevel, reason: str, why: str) -> None:
        """A move was rolled back."""
        self.migrations[level.name.lower(), reason, "rolled_back"] += 1
        self.move_failures[why] += 1

    # -- what Prometheus reads --------------------------------------------------------------------------------------

    def text(self, world: LiveWorld, model: str) -> bytes:
        """All of it in Prometheus's text format."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(self, world, model))
        return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, metrics: LiveMetrics, world: LiveWorld, model: str) -> None:
        self.metrics = metrics
        self.world = world
        self.model = model

    def collect(self) -> Iterator[Metric]:
        yield from self._latencies()
        yield from self._migrations()
        yield from self._counters()
        yield from self.metrics.forecasts.collect()
        yield from self.metrics.benefits.collect()
        yield from self._instances()
        yield from self._plugins()

    def _latencies(self) -> Iterator[Metric]:
        m = self.metrics
        for name, help_text, by_class in (
            ("time_to_first_token_seconds", "Time to first token, queueing included", m.ttft),
            ("request_time_per_output_token_seconds", "Mean time per output token after the first", m.tpot),
            ("e2e_request_latency_seconds", "Whole request", m.e2e),
        ):
            family = HistogramMetricFamily(f"penstock:{name}", help_text, labels=["model_name", "slo_class"])
            for slo_class, histogram in by_class.items():
                family.add_metric([self.model, slo_class], histogram.buckets(), histogram.total)
            yield family
        itl = HistogramMetricFamily(
            "penstock:inter_token_latency_seconds", "Gap between tokens at the client", labels=["model_name"]
        )
        itl.add_metric([self.model], m.itl.buckets(), m.itl.total)
        yield itl

    def _migrations(self) -> Iterator[Metric]:
        m = self.metrics
        moves = CounterMetricFamily(
            "penstock:migrations", "Moves of running decodes", labels=["level", "reason", "outcome"]
        )
        for key, count in m.migrations.items():
            moves.add_metric(list(key), count)
        yield moves
        failures = CounterMetricFamily("penstock:migration_failures", "Why moves were rolled back", labels=["why"])
        for why, count in m.move_failures.items():
            failures.add_metric([why], count)
        yield failures
        pause = HistogramMetricFamily(
            "penstock:migration_gap_seconds", "What the client waited at a cut", labels=["level"]
        )
        steps = HistogramMetricFamily(
            "penstock:migration_gap_steps", "The same in inter-token times of the source", labels=["level"]
        )
        for level in MigrationLevel:
            pause.add_metric([level.name.lower()], m.pause[level].buckets(), m.pause[level].total)
            steps.add_metric([level.name.lower()], m.pause_steps[level].buckets(), m.pause_steps[level].total)
        yield pause
        yield steps

    def _counters(self) -> Iterator[Metric]:
        m = self.metrics
        outcomes = CounterMetricFamily("penstock:requests", "Requests that are over", labels=["slo_class", "outcome"])
        for key, count in m.outcomes.items():
            outcomes.add_metric(list(key), count)
        yield outcomes
        slo = CounterMetricFamily("penstock:slo_requests", "Finished requests by SLO", labels=["slo_class", "verdict"])
        for key, count in m.slo.items():
            slo.add_metric(list(key), count)
        yield slo
        pinned = CounterMetricFamily("penstock:pinned_requests", "Requests that cannot move", labels=["reason"])
        for reason, count in m.pinned.items():
            pinned.add_metric([reason], count)
        yield pinned
        claims = self.world.claims
        for name, help_text, value in (
            ("prompt_tokens", "Prompt tokens of requests that are over", m.prompt_tokens),
            ("generation_tokens", "Output tokens of requests that are over", m.output_tokens),
            ("tokens_decoded_twice", "Tokens thrown away at make-before-break moves", m.decoded_twice),
            ("flips", "Role changes", m.flips),
            ("fences", "Instances taken out because they died or hung", m.fences),
            ("engine_errors", "Calls that an engine failed", m.engine_errors),
            ("greedy_divergences", "Moves across which greedy engines did not agree", m.divergences),
            ("protocol_errors", "Events the controller refused: bugs", m.protocol_errors),
            ("refused_at_door", "Requests answered 429 because the queue was full", m.refused_at_door),
            ("leases_expired", "Claims on KV that ran out unused", claims.expired),
            ("claims_issued", "Claims on KV", claims.issued),
        ):
            yield CounterMetricFamily(f"penstock:{name}", help_text, value=value)
        yield GaugeMetricFamily("penstock:custody_claims", "Claims whose KV may still be pinned", value=len(claims))
        waiting = sum(s.where < 0 for s in self.world.sessions.values()) + len(self.world.parked)
        yield GaugeMetricFamily("penstock:num_requests_waiting", "Requests without an instance", value=waiting)
        running = len(self.world.sessions)
        yield GaugeMetricFamily("penstock:num_requests_running", "Requests in flight", value=running)

    def _instances(self) -> Iterator[Metric]:
        labels = ["instance", "role"]
        families = [
            GaugeMetricFamily("penstock:instance_up", "1 if it gets work", labels=labels),
            GaugeMetricFamily("penstock:instance_decodes", "Decodes streaming", labels=labels),
            GaugeMetricFamily("penstock:instance_prefills", "Prefills outstanding", labels=labels),
            GaugeMetricFamily("penstock:instance_resident_tokens", "KV tokens of its decodes", labels=labels),
            GaugeMetricFamily("penstock:instance_inter_token_seconds", "Moving mean", labels=labels),
        ]
        for i in self.world.instances.values():
            values = (float(i.health is Health.UP and not i.held), i.streams, i.prefills, i.tokens, i.itl_s)
            for family, value in zip(families, values, strict=True):
                family.add_metric([i.name, i.role.name.lower()], value)
        yield from families

    def _plugins(self) -> Iterator[Metric]:
        """What engines say of themselves; nothing for those without a plugin."""
        labels = ["instance", "role"]
        waiting = GaugeMetricFamily("penstock:engine_waiting", "Requests in the engine's queue", labels=labels)
        free = GaugeMetricFamily("penstock:engine_free_blocks", "KV blocks not in use", labels=labels)
        step = GaugeMetricFamily("penstock:engine_step_seconds", "Moving mean of its steps", labels=labels)
        preempted = CounterMetricFamily("penstock:engine_preemptions", "Since the engine started", labels=labels)
        garbage = CounterMetricFamily("penstock:engine_garbage", "Messages not understood, or another's", labels=labels)
        families: tuple[GaugeMetricFamily | CounterMetricFamily, ...] = (waiting, free, step, preempted, garbage)
        for i in self.world.instances.values():
            if i.link is None or i.link.step is None:
                continue
            said = i.link.step
            values = (said.waiting, said.free_blocks, i.link.step_s, said.preemptions, i.link.garbage)
            for family, value in zip(families, values, strict=True):
                family.add_metric([i.name, i.role.name.lower()], value)
        yield from families
