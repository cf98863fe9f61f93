"""What faults cost the reader's client in time: 2,000 questions where three calls in ten fail, against none that do.

    python benchmarks/faults.py

Both run over loopback, 16 questions at a time, against a server that takes 30 ms for a reply; calls fail in ten ways,
each as likely as the others, and one that hangs is given up after half a second. About two minutes.
"""

from __future__ import annotations

import pathlib
import sys
import time

# So that it runs from a checkout that is not installed.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import _common as common

from finemem_jax.clients.endpoint import Endpoint, EndpointOptions
from finemem_jax.runtime import workers
from finemem_jax.types import Chat, Message
from tests.fault_server import FaultServer, reply_to

QUESTIONS = 2_000
REPEATS = 5


def seconds(share: float, seed: int) -> float:
    """Wall time of all questions, each of which must be answered rightly."""
    asked = [f"question {i}" for i in range(QUESTIONS)]
    with FaultServer(share, seed=seed, latency=0.03) as server:
        options = EndpointOptions((server.url,), "m", concurrency=16, call_seconds=0.5)
        with Endpoint(options) as client:
            began = time.perf_counter()
            replies = workers.run_all(client, [Chat((Message("user", ("", question)),), 5) for question in asked])
            took = time.perf_counter() - began
    assert replies == [reply_to(question) for question in asked]
    return took


def main() -> None:
    ratios = [seconds(0.3, seed) / seconds(0.0, seed) for seed in range(REPEATS)]
    # A ratio to be kept below 2.5: said the other way round, as all claims here are.
    speeds = [1 / ratio for ratio in ratios]
    claim = common.claim("2,000 questions, speed where 30 % of calls fail / where none does", speeds, "x", 0.4)
    common.report("faults", [claim], ["httpx"])


if __name__ == "__main__":
    main()
