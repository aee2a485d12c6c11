"""NIXL's scheduler side with `live.Live` hung into it."""

# mypy: ignore-errors
# (vLLM lives in another environment)

from __future__ import annotations

import logging
import os

import vllm
import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec

from .channel import Commands, Stream
from .custody import fitted
from .fingerprint import fingerprint
from .folder import model_folder
from .live import Live
from .messages import Answer
from .plugin import HEAD
from .predictor import read_card

LOG = logging.getLogger("vllm.penstock")


class PenstockScheduler(NixlPullConnectorScheduler):
    """The stock scheduler side; `open` gives it sockets, without which it only guards what is pulled."""

    live: Live | None = None

    def open(self, port):
        """Serve the stream on ``port`` and commands on the next; for each data-parallel rank two more."""
        if not port:
            LOG.info("Penstock's stream is closed: the engine was given no port for it")
            return
        first = int(port) + 2 * self.vllm_config.parallel_config.data_parallel_index
        abilities = self._abilities()
        try:
            stream = Stream(f"tcp://{self.side_channel_host}:{first}")
        except zmq.ZMQError as error:
            LOG.error("Penstock's stream is closed: port %d: %s", first, error)
            return
        try:
            commands = Commands(f"tcp://{self.side_channel_host}:{first + 1}", self._hello(abilities))
        except zmq.ZMQError as error:
            stream.close()
            LOG.error("Penstock's stream is closed: port %d: %s", first + 1, error)
            return
        self._sockets = (commands, stream)
        self.live = Live(
            self,
            super().request_finished,
            stream.send,
            commands,
            abilities,
            self.vllm_config.model_config.max_model_len,
        )

    def shutdown(self):
        """Close everything."""
        super().shutdown()
        if self.live is not None:
            self.live = None
            for socket in self._sockets:
                socket.close()

    def bind(self, manager):
        """Give it the KV cache manager."""
        if self.live is not None:
            self.live.bind(manager)

    def on_new_request(self, request):
        """Stock, and remember the request."""
        super().on_new_request(request)
        if self.live is not None:
            self.live.added(request)

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        """Stock, within what was pulled for and what the giver's blocks hold."""
        params = request.kv_transfer_params or {}
        if params.get("_remote_blocks_processed"):
            return 0, False  # one pull a request: what was preempted is computed here
        if params.get("do_remote_prefill") and (fit := fitted(params, request.num_prompt_tokens, self.block_size)):
            tokens, params["remote_block_ids"] = fit
            more = tokens - num_computed_tokens
            return (more, True) if more > 0 else (0, False)
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def build_connector_meta(self, scheduler_output):
        """Stock, and a step of `Live`."""
        held, released = self.live.step(scheduler_output) if self.live is not None else ((), ())
        meta = super().build_connector_meta(scheduler_output)
        meta.penstock = (held, released)
        return meta

    def update_connector_output(self, connector_output):
        """Stock, and what the workers tell `Live`."""
        if self.live is not None:
            news = connector_output.kv_connector_worker_meta
            self.live.updated(connector_output, *((news.predictions, news.tracked) if news else ((), ())))
        super().update_connector_output(connector_output)

    def request_finished(self, request, block_ids):
        """Stock, or the end of a hand-off."""
        if self.live is None:
            return super().request_finished(request, block_ids)
        return self.live.finished(request, block_ids)

    def has_pending_push_work(self):
        """Whether the engine must go on stepping without requests."""
        return super().has_pending_push_work() or (self.live is not None and self.live.unfinished())

    def _abilities(self):
        groups = self.kv_cache_config.kv_cache_groups
        parallel = self.vllm_config.parallel_config
        plain = (
            len(groups) == 1
            and isinstance(groups[0].kv_cache_spec, FullAttentionSpec)
            and parallel.decode_context_parallel_size == 1
            and parallel.prefill_context_parallel_size == 1
            and not self.use_host_buffer
        )
        if not plain:
            LOG.info("Penstock hands nothing off here: that needs full attention and no context parallelism")
            return ()
        # vLLM's cascade attention takes the reference counts of blocks for a count of requests.
        cascade = not getattr(self.vllm_config.model_config, "disable_cascade_attn", True)
        return ("handoff",) if cascade else ("handoff", "precopy")

    def _hello(self, abilities):
        name, quantiles = "", ()
        folder = os.environ.get(HEAD)
        if folder:
            try:
                card = read_card(folder, fingerprint(model_folder(self.vllm_config.model_config)))
                name, quantiles, abilities = card.name, card.quantiles, (*abilities, "predict")
            except ValueError as error:
                LOG.error("Penstock serves without predictions: %s", error)
        return Answer(
            vllm=vllm.__version__,
            engine_id=self.engine_id,
            abilities=abilities,
            predictor=name,
            quantiles=quantiles,
        )
