"""The connector that an engine loads by ``kv_connector_module_path``: vLLM's NixlConnector, and Penstock beside it.

On the CPU it also mends two habits of vLLM 0.32 and 0.33 that make engines slow when several share a machine: the
worker pins itself to the last core of its NUMA node (``nixl/base_worker.py``), so all engines use one core; and NIXL's
progress thread spins, at two thirds of a core or more for each idle engine.

In a vLLM that it does not know it stays what vLLM's own connector is. The folder above this package goes on the
engine's PYTHONPATH alone: the engine's environment has no penstock, and need not.
"""

# mypy: ignore-errors
# (vLLM lives in another environment)

from __future__ import annotations

import contextlib
import importlib
import logging
import os

import vllm
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from . import versions

LOG = logging.getLogger("vllm.penstock")

PORT = "PENSTOCK_PLUGIN_PORT"
"""Environment variable: port of the stream; commands come on the next. Without it both stay closed."""

_Stock = KVConnectorFactory.get_connector_class_by_name("NixlConnector")
_REFUSAL = versions.refusal(vllm.__version__, os.environ.get(versions.ANYWAY) == "1")
if _REFUSAL:
    LOG.error("Penstock's plugin is off, KV transfer works as ever: %s", _REFUSAL)
    _Base = _Stock
else:
    from .scheduler import PenstockScheduler
    from .worker import PenstockSide as _Base


class PenstockConnector(_Base):
    """vLLM's own pull connector with hand-off, pre-copy, a stream of steps, and predictions."""

    def __init__(self, vllm_config, role, kv_cache_config):
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        on_cpu = vllm_config.device_config.device_type == "cpu"
        with _without_spinning() if on_cpu and role == KVConnectorRole.WORKER else contextlib.nullcontext():
            super().__init__(vllm_config, role, kv_cache_config)
        if on_cpu and cores is not None:
            for thread in os.listdir("/proc/self/task"):  # threads made meanwhile have inherited the narrow mask
                os.sched_setaffinity(int(thread), cores)
        if not _REFUSAL and role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler.shutdown()
            self.connector_scheduler = PenstockScheduler(vllm_config, self.engine_id, kv_cache_config)
            self.connector_scheduler.open(os.environ.get(PORT))


@contextlib.contextmanager
def _without_spinning():
    # Transfers progress when the engine polls them, once a step, which is when their results are used anyway.
    try:
        base_worker = importlib.import_module("vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker")
        stock = base_worker.nixl_agent_config
    except (ImportError, AttributeError):
        stock = None
    if stock is None:
        yield
        return
    base_worker.nixl_agent_config = lambda **settings: stock(
        **{**settings, "enable_prog_thread": False, "num_threads": 0}
    )
    try:
        yield
    finally:
        base_worker.nixl_agent_config = stock
