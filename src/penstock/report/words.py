"""The conclusion of a run in words: how many requests met the SLO, and what the misses were."""

from __future__ import annotations

from penstock.report.columns import Metrics, percent
from penstock.report.metrics import InstanceMetrics, RunMetrics

BLAME_SHARE = 0.3
"""An instance is named when it has at least this share of the misses and ``BLAME_EXCESS`` times an even share."""
BLAME_EXCESS = 1.5
BLAME_LEAST = 10
"""Fewer misses than this are chance."""


def conclude(run: RunMetrics, name: str = "") -> str:
    """One sentence.

    "least-kv met the SLO for 97.1% of 19,366 requests; 512 of 561 misses are TPOT, 83% of the TPOT misses on decode
    instance 3." (Figures invented.) ``name`` replaces the policy's name.
    """
    noun = "request" if run.requests == 1 else "requests"
    head = f"{name or run.policy} met the SLO for {percent(run.attainment)} of {run.requests:,} {noun}"
    kinds = kinds_of_miss(run)
    total = sum(kinds.values())
    if not total:
        return f"{head}."
    kind, count = max(kinds.items(), key=lambda item: item[1])
    if count == total:
        tail = f"all {count:,} misses are {kind}" if count > 1 else f"the one miss is {kind}"
    elif count > total / 2:
        tail = f"{count:,} of {total:,} misses are {kind}"
    else:
        shares = sorted(kinds.items(), key=lambda item: -item[1])[:2]
        tail = f"misses are mixed, first {shares[0][0]} ({shares[0][1]:,}), then {shares[1][0]} ({shares[1][1]:,})"
    where = blamed(run, kind)
    return f"{head}; {tail}{f', {where}' if where else ''}."


def compare(runs: dict[str, RunMetrics]) -> str:
    """One sentence a run, the best first; for several runs a sentence on the winner leads.

    Where the rates differ, one sentence a rate, on its best run: attainments at different rates do not compare.
    """
    by_rate: dict[float, list[str]] = {}
    for name, run in runs.items():
        by_rate.setdefault(run.offered_rps, []).append(name)
    if len(by_rate) > 1:
        leaders = [max(by_rate[rate], key=lambda name: runs[name].attainment) for rate in sorted(by_rate)]
        return " ".join(conclude(runs[name], name) for name in leaders)
    order = sorted(runs, key=lambda name: -runs[name].attainment)
    sentences = [conclude(runs[name], name) for name in order]
    if len(order) > 1:
        first, second = runs[order[0]], runs[order[1]]
        gap = 100 * (first.attainment - second.attainment)
        lead = (
            f"{order[0]} and {order[1]} meet the SLO equally often."
            if gap < 0.05
            else f"{order[0]} meets the SLO most often, {gap:.1f} points ahead of {order[1]}."
        )
        sentences.insert(0, lead)
    return " ".join(sentences)


def kinds_of_miss(run: RunMetrics) -> dict[str, int]:
    """Misses by kind, in words; kinds without a miss are left out."""
    m = run.misses
    kinds = {
        "TTFT": m.ttft,
        "TPOT": m.tpot,
        "TTFT and TPOT": m.both,
        "rejections": m.rejected,
        "unfinished requests": m.unfinished,
    }
    return {kind: count for kind, count in kinds.items() if count}


def blamed(run: RunMetrics, kind: str) -> str:
    """Say "83% of the TPOT misses on decode instance 3" if one of several instances stands out, else nothing."""
    if kind not in ("TTFT", "TPOT"):
        return ""
    taking = [(n, i) for i in run.instances for n, tokens in [_misses_and_tokens(i, kind)] if tokens]
    total = sum(n for n, _ in taking)
    if len(taking) < 2 or total < BLAME_LEAST:
        return ""
    n, worst = max(taking, key=lambda pair: pair[0])
    if n < total * max(BLAME_SHARE, BLAME_EXCESS / len(taking)):
        return ""
    return f"{n / total:.0%} of the {kind} misses on {worst.role} instance {worst.instance}"


def missed_target(metrics: Metrics) -> str:
    """The kind of miss that happened most often: ``TTFT``, ``TPOT``, ...; empty without a miss."""
    if isinstance(metrics, RunMetrics):
        kinds = kinds_of_miss(metrics)
    else:
        names = {"TTFT": "ttft", "TPOT": "tpot", "TTFT and TPOT": "both", "rejections": "rejected"}
        names["unfinished requests"] = "unfinished"
        means = {kind: metrics.figures.get(f"misses.{name}") for kind, name in names.items()}
        kinds = {kind: round(1000 * mean.mean) for kind, mean in means.items() if mean is not None and mean.mean > 0}
    return max(kinds, key=lambda kind: kinds[kind]) if kinds else ""


def _misses_and_tokens(instance: InstanceMetrics, kind: str) -> tuple[int, int]:
    """Misses of this kind here, and tokens of that phase computed here (0: took no part)."""
    if kind == "TTFT":
        return instance.ttft_misses, instance.prefill_tokens
    return instance.tpot_misses, instance.decode_tokens
