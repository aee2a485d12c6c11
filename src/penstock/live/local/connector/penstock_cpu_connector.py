"""NIXL connector for vLLM's CPU build, loaded into the engine by ``kv_connector_module_path``; transfers are unchanged.

It mends two habits of vLLM 0.32 and 0.33 that make CPU engines slow when several share a machine:

* the worker pins itself to the last core of its NUMA node (``nixl/base_worker.py``), so all engines use one core;
* NIXL's progress thread spins, at two thirds of a core or more for each idle engine.

This folder goes on the engine's PYTHONPATH alone: the engine's environment has no penstock, and need not.
"""

# mypy: ignore-errors
# (vLLM lives in another environment)

import os

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector


def _without_threads(make):
    def config(**settings):
        # Transfers progress when the engine polls them, once a step, which is when their results are used anyway.
        return make(**{**settings, "enable_prog_thread": False, "num_threads": 0})

    return config


class PenstockCpuConnector(NixlPullConnector):
    """The stock pull connector, on all the cores that this process was given and without a spinning thread."""

    def __init__(self, vllm_config, role, kv_cache_config):
        cores = os.sched_getaffinity(0)
        if role == KVConnectorRole.WORKER and base_worker.nixl_agent_config is not None:
            stock = base_worker.nixl_agent_config
            base_worker.nixl_agent_config = _without_threads(stock)
            try:
                super().__init__(vllm_config, role, kv_cache_config)
            finally:
                base_worker.nixl_agent_config = stock
        else:
            super().__init__(vllm_config, role, kv_cache_config)
        for thread in os.listdir("/proc/self/task"):  # threads made meanwhile have inherited the narrow mask
            os.sched_setaffinity(int(thread), cores)
