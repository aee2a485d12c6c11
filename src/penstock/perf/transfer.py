"""How long KV takes from one instance to another: a link's bandwidth, its latency and the first-contact handshake."""

from __future__ import annotations

from penstock.core.errors import PenstockError
from penstock.perf.hardware import HardwareSpec

LINK_EFFICIENCY = 0.8
"""Share of a link's data-sheet rate that bulk point-to-point transfers reach: an assumption. PCIe and RDMA lose 10 to
20 % to headers and flow control; no measured table of KV transfers was at hand."""

HANDSHAKE_S = 0.2
"""Seconds of the first contact between two engines: NIXL swaps agent metadata and registers remote memory. Measured
at 0.1 to 0.4 s (NIXL 1.5.1 between vLLM's CPU engines)."""

HOST_COLLECTIVE_BPS = 16e9
HOST_COLLECTIVE_LATENCY_S = 2e-5
"""Rate and latency of a collective between cards that only share PCIe: NCCL goes through host memory. LLMServingSim's
description of its RTX PRO 6000 host (``ground_truth/RTXPRO6000/*/config.json``: 16 GB/s, 20 us)."""

NVLINK_COLLECTIVE_SHARE = 0.27
NVLINK_COLLECTIVE_LATENCY_S = 1e-6
"""With these two in the ring formula, vLLM's all-reduce of 8 KB to 64 MB over 2, 4 and 8 A100, H100 and H200 is met
within a factor of 1.5 (AIConfigurator's measured tables; the short-message kernels are far from the link's rate)."""

_LATENCY_S = {"nvlink": 5e-6, "xgmi": 5e-6, "pcie": 1e-5, "rdma": 1.5e-5, "tcp": 1e-4, "shm": 1e-4}
# NIXL between two CPU engines over shared memory: 1.0 to 1.45 GB/s measured (NIXL 1.5.1).
_SHM_BPS = 1.2e9
_TCP_BPS = 1.25e9  # 10 GbE


class Link:
    """A path from one instance to another. Plain attributes, so that the compiled simulator reads them fast.

    ``bandwidth_Bps`` is what one transfer alone gets, efficiency included; sharing among transfers is the simulator's
    business. ``latency_s`` is paid by every transfer, ``handshake_s`` by the first one between two engines.
    """

    def __init__(self, kind: str, bandwidth_Bps: float, latency_s: float = 1e-5, handshake_s: float = 0.0) -> None:
        if bandwidth_Bps <= 0.0:
            raise PenstockError(f"link bandwidth {bandwidth_Bps} B/s is not positive", "give bytes per second")
        self.kind = kind
        self.bandwidth_Bps = bandwidth_Bps
        self.latency_s = latency_s
        self.handshake_s = handshake_s

    def transfer_s(self, size_bytes: float, first_contact: bool = False, share: float = 1.0) -> float:
        """Seconds to move ``size_bytes`` with a ``share`` (0, 1] of the link: handshake + latency + size / rate."""
        seconds = self.latency_s + size_bytes / (self.bandwidth_Bps * share)
        return seconds + self.handshake_s if first_contact else seconds


def link_between(
    source: HardwareSpec,
    target: HardwareSpec,
    tp: int = 1,
    same_node: bool = True,
    kind: str | None = None,
    efficiency: float = LINK_EFFICIENCY,
    handshake_s: float = HANDSHAKE_S,
) -> Link:
    """The default link between an instance on ``source`` and one on ``target``.

    On one node: the scale-up link where both have the same kind (NVLink, Infinity Fabric), PCIe otherwise. Between
    nodes: RDMA through the NICs. The slower end counts; with tensor parallelism every one of ``tp`` GPU pairs moves
    its own shard at once, so the rate is that many times larger (give the smaller of the two groups).
    ``kind`` overrides: ``nvlink``, ``pcie``, ``rdma``, ``tcp`` (10 GbE), ``shm`` (CPU engines). Raises
    :class:`PenstockError` for an unknown kind, or ``nvlink`` where a card has none.
    """
    chosen = kind or _default_kind(source, target, same_node)
    if chosen in ("nvlink", "xgmi"):
        for end in (source, target):
            if not end.scale_up.startswith(chosen):
                raise PenstockError(f"{end.name} has no {chosen} (its link is {end.scale_up})", "use pcie or rdma")
        rate = min(source.scale_up_Bps, target.scale_up_Bps)
    elif chosen == "pcie":
        rate = min(source.pcie_Bps, target.pcie_Bps)
    elif chosen == "rdma":
        rate = min(source.nic_Bps, target.nic_Bps)
    elif chosen in ("tcp", "shm"):
        # Measured as a whole already: no efficiency factor, and one path however many GPUs there are.
        return Link(chosen, _TCP_BPS if chosen == "tcp" else _SHM_BPS, _LATENCY_S[chosen], handshake_s)
    else:
        raise PenstockError(f"unknown link {chosen!r}", f"choose one of {', '.join(sorted(_LATENCY_S))}")
    return Link(chosen, rate * efficiency * tp, _LATENCY_S[chosen], handshake_s)


def collective_link(hardware: HardwareSpec) -> tuple[float, float]:
    """(bytes/s, seconds of latency) of one GPU in a collective inside a node.

    NVLink and Infinity Fabric: :data:`NVLINK_COLLECTIVE_SHARE` of one direction of the data sheet's rate. PCIe:
    :data:`HOST_COLLECTIVE_BPS`, at most half of the card's PCIe rate.
    """
    if hardware.scale_up.startswith("pcie"):
        return min(HOST_COLLECTIVE_BPS, hardware.pcie_Bps / 2.0), HOST_COLLECTIVE_LATENCY_S
    return hardware.scale_up_Bps * NVLINK_COLLECTIVE_SHARE, NVLINK_COLLECTIVE_LATENCY_S


def _default_kind(source: HardwareSpec, target: HardwareSpec, same_node: bool) -> str:
    if not same_node:
        return "rdma"
    families = {end.scale_up.rstrip("0123456789") for end in (source, target)}
    family = families.pop()
    return family if not families and family in ("nvlink", "xgmi") else "pcie"
