"""What the reader's client costs: throughput against a server of 50 ms, answers on file, overhead of a call.

    python benchmarks/reader.py

2,000 questions, each with two notes, go the whole way from query to answer: prompt, file of answers, client, server.
The server is another process on this machine and takes 50 ms for every reply, for as many as come at once, so that no
client can do better than concurrency / latency. About a minute and a half; needs two cores for itself.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
import time

# So that it runs from a checkout that is not installed.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import _common as common

from finemem_jax.clients import reply_cache as answers
from finemem_jax.clients.endpoint import Endpoint, EndpointOptions
from finemem_jax.reading import reader
from finemem_jax.reading.reader import Query, ReaderOptions
from finemem_jax.runtime import workers

QUESTIONS = 2_000
LATENCY = 0.05
REPEATS = 3
OPTIONS = ReaderOptions(max_new_tokens=64, temperature=0.1, num_examples=2)


def queries(repeat: int) -> list[Query]:
    """Of this repeat alone, so that nobody has asked them before."""
    notes = [f"Note {repeat}: " + "a fact that was kept " * 8, "Another one. " * 10]
    return [Query(f"What is known of number {i}?", tuple(f"{note} ({i})" for note in notes)) for i in range(QUESTIONS)]


def timed(worker, asked) -> tuple[float, float]:
    """Wall time and this process's processor time for all questions (s)."""
    began, used = time.perf_counter(), time.process_time()
    assert set(workers.run_all(worker, asked)) == {"an answer"}
    return time.perf_counter() - began, time.process_time() - used


def through_server(url: str, concurrency: int, keep_alive: bool, repeat: int, folder: str) -> tuple[float, float]:
    """Wall time and processor time where every question goes to the server."""
    path = pathlib.Path(folder) / f"{concurrency} {keep_alive} {repeat}.sqlite"
    file = answers.ReplyCache(path, 10**9)
    options = EndpointOptions((url,), "m", concurrency=concurrency, keep_alive=keep_alive)
    with Endpoint(options, lambda chat, reply: answers.keep(file, "m", chat, reply)) as client:
        # Opened before the clock runs.
        workers.run_all(reader.language_model(client, OPTIONS), [Query("Ready?", ())])
        model = answers.Cached(client, file, "m", stores=False)
        found = timed(reader.language_model(model, OPTIONS), queries(repeat))
    file.close()
    return found


def from_file(folder: str, repeat: int) -> float:
    """Answers a second where all questions are on file."""
    file = answers.ReplyCache(pathlib.Path(folder) / "warm.sqlite", 10**9)
    for known in (False, True):
        server = workers.Batched(lambda chats, known=known: [] if known else ["an answer"] * len(chats))
        # A new reader each time: it remembers what it was told itself.
        model = reader.language_model(answers.Cached(server, file, "m"), OPTIONS)
        seconds, _ = timed(model, queries(repeat))
    file.close()
    return QUESTIONS / seconds


def main() -> None:
    server = common.Worker(str(pathlib.Path(__file__).parent / "_latency_server.py"), str(1000 * LATENCY))
    url = server.read()["url"]
    claims = []
    with tempfile.TemporaryDirectory() as folder:
        for concurrency, keep_alive, target in (
            (16, False, 0.9),
            (16, True, None),
            (32, False, None),
            (8, False, None),
        ):
            ideal = QUESTIONS * LATENCY / concurrency
            runs = [through_server(url, concurrency, keep_alive, repeat, folder) for repeat in range(REPEATS)]
            name = f"throughput, {concurrency} at a time" + (", connections kept" if keep_alive else "")
            shares = [ideal / wall for wall, _ in runs]
            claims.append(common.claim(f"{name}, of concurrency / latency", shares, "x", target))
            used = [1000 * processor / QUESTIONS for _, processor in runs]
            claims.append(common.claim(f"{name}: processor time of a call", used, "ms"))
        alone = Endpoint(EndpointOptions((url,), "m", concurrency=1))
        with alone:
            worker = reader.language_model(alone, OPTIONS)
            walls = [timed(worker, [queries(100 + repeat)[0]])[0] for repeat in range(20)]
        claims.append(
            common.claim("one at a time: beyond the server's 50 ms", [1000 * (w - LATENCY) for w in walls], "ms")
        )
        warm = [from_file(folder, repeat) for repeat in range(REPEATS)]
        claims.append(common.claim("answers on file", warm, "answers/s", target=20_000))
    common.report("reader", claims, ["httpx"])
    server.close()


if __name__ == "__main__":
    main()
