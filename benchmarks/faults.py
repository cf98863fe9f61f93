"""Measures what faults cost the reader's client in time: 2,000 questions where three calls in ten fail, or none.

    python benchmarks/faults.py [--repeats=5] [--questions=2000]

Both run over loopback, 16 questions at a time, against a server that takes 30 ms for a reply; calls fail in ten ways,
each as likely as the others, and one that hangs is given up after half a second. About two minutes.
"""

from __future__ import annotations

import time

import _common as common

from finemem_jax.clients.endpoint import Endpoint
from finemem_jax.config.sections import Server
from finemem_jax.runtime import workers
from finemem_jax.types import Chat, Message
from tests.fault_server import FaultServer, reply_to


def seconds(share: float, seed: int, count: int) -> float:
    """Times `count` questions, each of which must be answered rightly; a share of the calls fails."""
    asked = [f"question {i}" for i in range(count)]
    with FaultServer(share, seed=seed, latency=0.03) as server:
        options = Server(urls=server.url, model="m", concurrency=16, call_seconds=0.5)
        with Endpoint(options) as client:
            began = time.perf_counter()
            replies = workers.run_all(client, [Chat((Message("user", ("", question)),), 5) for question in asked])
            took = time.perf_counter() - began
    assert replies == [reply_to(question) for question in asked]
    return took


def main() -> None:
    """Measures, and prints the claim."""
    parser = common.parser(__doc__, repeats=5)
    parser.add_argument("--questions", type=int, default=2_000)
    arguments = parser.parse_args()
    count = arguments.questions
    speeds = [seconds(0.0, seed, count) / seconds(0.3, seed, count) for seed in range(arguments.repeats)]
    name = f"{count:,} questions, speed where 30 % of calls fail / where none does"
    claim = common.claim(name, speeds, "x", target=0.4)
    common.report("faults", [claim], ["httpx"])


if __name__ == "__main__":
    main()
