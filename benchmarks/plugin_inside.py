"""Run by an engine's Python for plugin_overhead.py: what the plugin costs an engine's thread in a step.

Prints JSON: microseconds of the thread's processor time a step, of sending the stream and of the head, over steps in
which every request makes a token. Only the requests are stand-ins.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from enum import Enum
from types import SimpleNamespace
from typing import Any

STEPS = 4000


class Status(Enum):
    """All that is asked of vLLM's."""

    RUNNING = 1


class Port:
    """Commands that never come."""

    waiting = False

    def busy(self, busy: bool) -> None:
        """Nobody asks."""

    def take(self) -> list[Any]:
        """None."""
        return []

    def answer(self, ticket: Any, answer: Any) -> None:
        """Never called."""


def main() -> None:
    """Measure with the head in a folder, for a number of requests and a hidden size."""
    folder, fingerprint, rows, hidden_size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    import torch  # type: ignore[import-not-found, unused-ignore]
    import zmq
    from penstock_engine.channel import Stream  # type: ignore[import-not-found]
    from penstock_engine.head import Head  # type: ignore[import-not-found]
    from penstock_engine.live import Live  # type: ignore[import-not-found]
    from penstock_engine.predictor import read_card  # type: ignore[import-not-found]
    from penstock_engine.tap import Tap  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    device = torch.device("cpu")
    tap = Tap(Head(folder, read_card(folder, fingerprint), device), device)
    stream = Stream("tcp://127.0.0.1:*")
    where = stream._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def listen() -> None:
        reader: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        reader.subscribe(b"")
        reader.connect(where)
        while reader.poll(2000):
            reader.recv()
        reader.close()

    listener = threading.Thread(target=listen)
    listener.start()
    time.sleep(0.3)
    stock = SimpleNamespace(engine_id="e" * 36, block_size=16)
    live = Live(stock, None, stream.send, Port(), (), 10**6)
    pool = SimpleNamespace(get_num_free_blocks=lambda: 1000, num_gpu_blocks=2000)
    live.bind(SimpleNamespace(block_pool=pool))
    names = [f"cmpl-{'0123456789abcdef' * 2}-{index}-01234567" for index in range(rows)]
    requests = [
        SimpleNamespace(
            request_id=name,
            status=Status.RUNNING,
            num_prompt_tokens=500,
            num_output_tokens=1,
            num_computed_tokens=500,
        )
        for name in names
    ]
    for request in requests:
        live.added(request)
    output = SimpleNamespace(num_scheduled_tokens=dict.fromkeys(names, 1), preempted_req_ids=None)
    result = SimpleNamespace(finished_sending=None)
    hidden = torch.randn(rows, hidden_size)
    whole = [True] * rows
    streamed, looked = [], []
    with torch.inference_mode():
        for step in range(1, STEPS + 1):
            for request in requests:
                request.num_output_tokens = step
                request.num_computed_tokens = 500 + step
            begin = time.thread_time()
            live.step(output)
            middle = time.thread_time()
            tap.look(hidden, names, [step] * rows, whole)
            live.updated(result, tap.take(), set())
            end = time.thread_time()
            streamed.append(middle - begin)
            looked.append(end - middle)
            time.sleep(0.0002)  # as an engine, which does other things between
    listener.join()
    stream.close()
    print(json.dumps({"stream": summary(streamed), "head": summary(looked)}))


def summary(seconds: list[float]) -> dict[str, float]:
    """Mean, median and 99th percentile in microseconds, without the first steps."""
    ordered = sorted(seconds[200:])
    mean = sum(ordered) / len(ordered)
    return {
        "mean_us": 1e6 * mean,
        "p50_us": 1e6 * ordered[len(ordered) // 2],
        "p99_us": 1e6 * ordered[int(0.99 * len(ordered))],
    }


if __name__ == "__main__":
    main()
