"""Measures what the reader's client costs: throughput against a server of 50 ms, cached replies, overhead of a call.

    python benchmarks/reader.py [--repeats=3] [--questions=2000]

2,000 questions, each with two notes, go the whole way from query to answer: prompt, reply cache, client, server.
The server is another process on this machine and takes 50 ms for every reply, for as many as come at once, so that no
client can do better than concurrency / latency. About a minute and a half; needs two cores for itself.
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import _common as common

from finemem_jax.clients import reply_cache
from finemem_jax.clients.endpoint import Endpoint
from finemem_jax.config import sections
from finemem_jax.reading import reader
from finemem_jax.reading.reader import Query
from finemem_jax.runtime import workers

LATENCY = 0.05
OPTIONS = sections.Reader(max_new_tokens=64, temperature=0.1, num_examples=2)


def queries(repeat: int, count: int) -> list[Query]:
    """Makes queries of this repeat alone, so that nobody has asked them before."""
    notes = [f"Note {repeat}: " + "a fact that was kept " * 8, "Another one. " * 10]
    return [Query(f"What is known of number {i}?", tuple(f"{note} ({i})" for note in notes)) for i in range(count)]


def timed(worker: workers.Worker[Query, str], asked: Sequence[Query]) -> tuple[float, float]:
    """Returns wall time and this process's processor time for all questions (s)."""
    began, used = time.perf_counter(), time.process_time()
    assert set(workers.run_all(worker, asked)) == {"an answer"}
    return time.perf_counter() - began, time.process_time() - used


def through_server(options: sections.Server, asked: Sequence[Query], path: pathlib.Path) -> tuple[float, float]:
    """Times questions that all go to the server, whose replies are cached in a new file at `path`; as `timed`."""
    file = reply_cache.ReplyCache(path, 10**9)
    with Endpoint(options, lambda chat, reply: file.keep("m", chat, reply)) as client:
        # Opened before the clock runs.
        workers.run_all(reader.language_model(client, OPTIONS), [Query("Ready?", ())])
        model = reply_cache.Cached(client, file, "m", stores=False)
        found = timed(reader.language_model(model, OPTIONS), asked)
    file.close()
    return found


def from_file(asked: Sequence[Query], path: pathlib.Path) -> float:
    """Returns answers a second where all replies are cached."""
    file, seconds = reply_cache.ReplyCache(path, 10**9), 0.0
    for known in (False, True):
        server = workers.Batched(lambda chats, known=known: [] if known else ["an answer"] * len(chats))
        # A new reader each time: it remembers what it was told itself.
        model = reader.language_model(reply_cache.Cached(server, file, "m"), OPTIONS)
        seconds, _ = timed(model, asked)
    file.close()
    return len(asked) / seconds


def throughput(url: str, folder: pathlib.Path, count: int, *, repeats: int) -> list[dict[str, Any]]:
    """Makes the claims of several numbers of questions at a time, with connections that are kept and that are not."""
    claims = []
    for concurrency, keep_alive, target in ((16, False, 0.9), (16, True, None), (32, False, None), (8, False, None)):
        options = sections.Server(urls=url, model="m", concurrency=concurrency, keep_alive=keep_alive)
        name = f"throughput, {concurrency} at a time" + (", connections kept" if keep_alive else "")
        runs = [
            through_server(options, queries(repeat, count), folder / f"{name} {repeat}.sqlite")
            for repeat in range(repeats)
        ]
        shares = [count * LATENCY / concurrency / wall for wall, _ in runs]
        claims.append(common.claim(f"{name}, of concurrency / latency", shares, "x", target=target))
        used = [1000 * processor / count for _, processor in runs]
        claims.append(common.claim(f"{name}: processor time of a call", used, "ms"))
    return claims


def main() -> None:
    """Measures, and prints the claims."""
    parser = common.parser(__doc__, repeats=3)
    parser.add_argument("--questions", type=int, default=2_000)
    arguments = parser.parse_args()
    count, repeats = arguments.questions, arguments.repeats
    server = common.Worker(str(pathlib.Path(__file__).parent / "_latency_server.py"), str(1000 * LATENCY))
    url = server.read()["url"]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        claims = throughput(url, folder, count, repeats=repeats)
        with Endpoint(sections.Server(urls=url, model="m", concurrency=1)) as client:
            model = reader.language_model(client, OPTIONS)
            walls = [timed(model, queries(100 + repeat, 1))[0] for repeat in range(20)]
        beyond = [1000 * (wall - LATENCY) for wall in walls]
        claims.append(common.claim("one at a time: beyond the server's 50 ms", beyond, "ms"))
        warm = [from_file(queries(repeat, count), folder / "warm.sqlite") for repeat in range(repeats)]
        claims.append(common.claim("cached replies", warm, "answers/s", target=20_000))
    common.report("reader", claims, ["httpx"])
    server.close()


if __name__ == "__main__":
    main()
