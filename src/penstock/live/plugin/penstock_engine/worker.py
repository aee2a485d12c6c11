"""The connector's worker side: which blocks NIXL's worker watches over or gives up, and what is predicted."""

# mypy: ignore-errors
# (vLLM lives in another environment)

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector

from . import tap


class News(KVConnectorWorkerMetadata):
    """What workers tell the scheduler of a step: predictions, and the holds they watch over from now on."""

    def __init__(self, predictions, tracked):
        self.predictions = predictions
        self.tracked = tracked

    def aggregate(self, other):
        """One for all workers."""
        return News(self.predictions + other.predictions, self.tracked | other.tracked)


class PenstockSide(NixlPullConnector):
    """vLLM's connector with both of Penstock's sides; `connector.PenstockConnector` chooses."""

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        self._given_up = set()
        self._tracked = set()

    # Scheduler

    def bind_kv_cache_manager(self, kv_cache_manager):
        """Stock, and for the plugin."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self.connector_scheduler.bind(kv_cache_manager)

    # Worker

    def start_load_kv(self, forward_context, **kwargs):
        """Stock, then holds that are new or given up."""
        super().start_load_kv(forward_context, **kwargs)
        held, released = getattr(self._connector_metadata, "penstock", ((), ()))
        self._tracked.update(held)
        worker = self.connector_worker
        for name in released:
            if name in worker._reqs_to_process:  # else a puller's word came first
                worker._reqs_to_process.discard(name)
                worker._reqs_to_send.pop(name, None)
                worker.consumer_notification_counts_by_req.pop(name, None)
                worker.expected_consumer_notifications_by_req.pop(name, None)
                self._given_up.add(name)

    def get_transfer_results(self, finished_req_ids):
        """Stock, and what was given up: for the scheduler that is as if it had been sent."""
        results = super().get_transfer_results(finished_req_ids)
        results.finished_sending.update(self._given_up)
        self._given_up.clear()
        return results

    def build_connector_worker_meta(self):
        """What there is to tell the scheduler."""
        source = tap.active
        predictions = source.take() if source is not None else []
        if not predictions and not self._tracked:
            return None
        tracked, self._tracked = self._tracked, set()
        return News(predictions, tracked)
