"""A server of chat completions on loopback that fails on purpose; for the tests of what asks servers.

with FaultServer(share=0.3, seed=0) as server:
    ...  # server.url is a base URL; server.asked counts how often each question was put.
"""

import asyncio
import collections
import contextlib
import json
import random
import threading
import time

from finemem_jax.types import Chat, Message

# What can go wrong, each as likely as the others.
FAULTS = ("timeout", "reset", "429", "500", "502", "half", "html", "json", "shape", "twice")


def reply_to(question: str) -> str:
    """What the server answers: something that belongs to this question alone."""
    return f"answer to {question}"


def chat(text, **more):
    """Returns a chat whose question is `text`."""
    return Chat((Message("system", ("Be brief.",)), Message("user", ("", text))), 5, **more)


def ask_all(worker, count):
    """Asks questions 0 … count - 1; returns the replies, of which each must come once."""
    request_ids = {worker.submit(chat(f"question {i}")): i for i in range(count)}
    replies = {}
    while len(replies) < count:
        for request_id, reply in worker.collect():
            assert request_ids[request_id] not in replies
            replies[request_ids[request_id]] = reply
    return [replies[i] for i in range(count)]


class FaultServer:
    """See the module. A question is the last message of a chat."""

    def __init__(
        self, share=0.0, seed=0, faults=FAULTS, latency=0.0, down=False, hang=3.0, retry_after=None, reply=reply_to
    ):
        """Args:
        share: How many of the requests are answered wrongly.
        latency: Before every answer (s).
        down: Answer everything with 503.
        reply: What is answered to a question.
        hang: How long a "timeout" lasts, when nobody gives up before (s).
        """
        self.share, self._random, self._faults, self._latency = share, random.Random(seed), faults, latency
        self.down, self._hang, self._retry_after, self._reply = down, hang, retry_after, reply
        self.refuses = ""  # A question that is answered with 400.
        self.asked: collections.Counter[str] = collections.Counter()
        self.answered: collections.Counter[str] = collections.Counter()
        self.met: collections.Counter[str] = collections.Counter()
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict] = []
        self.in_flight = self.most_in_flight = 0
        self.moments: list[float] = []

    def __enter__(self):
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    async def _serve(self, ready):
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        ready.set()
        await self._closing.wait()
        server.close()
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections)

    async def _connection(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._request(reader, writer):
                pass
        writer.close()
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await writer.wait_closed()

    async def _request(self, reader, writer):
        """Answers one request; returns whether the connection goes on."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = (line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        headers = {name.lower(): value for name, value in fields}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        question = body["messages"][-1]["content"]
        self.asked[question] += 1
        self.headers.append(headers)
        self.bodies.append(body)
        self.moments.append(time.monotonic())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self._latency:
                await asyncio.sleep(self._latency)
            return await self._answer(question, headers, writer)
        finally:
            self.in_flight -= 1

    async def _answer(self, question, headers, writer):
        fault = self._random.choice(self._faults) if self._random.random() < self.share else ""
        if self.down:
            fault = "503"
        if question == self.refuses:
            fault = "400"
        self.met[fault] += 1
        good = json.dumps(
            {
                "choices": [{"message": {"role": "assistant", "content": self._reply(question)}}],
                "usage": {"prompt_tokens": 5, "completion_tokens": 2},
            }
        ).encode()
        if fault == "timeout":
            await asyncio.sleep(self._hang)
            return False
        if fault == "reset":
            writer.transport.abort()
            return False
        if fault.isdecimal():
            # Some servers quote what they were sent.
            said = json.dumps({"error": f"failed on {headers.get('authorization', 'nothing')}"}).encode()
            extra = f"Retry-After: {self._retry_after}\r\n" if self._retry_after is not None else ""
            await _send(writer, said, int(fault), extra)
        elif fault == "half":
            await _send(writer, good, cut=len(good) // 2)
            return False
        elif fault == "html":
            await _send(writer, b"<html><body>Welcome to nginx!</body></html>")
        elif fault == "json":
            await _send(writer, good[:-7])
        elif fault == "shape":
            await _send(writer, b'{"choices": []}')
        else:
            self.answered[question] += 1
            await _send(writer, good)
            if fault == "twice":
                await _send(writer, good)
        return True


async def _send(writer, body, status=200, extra="", cut=None):
    head = f"HTTP/1.1 {status} x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    writer.write(head.encode() + body[:cut])
    await writer.drain()
