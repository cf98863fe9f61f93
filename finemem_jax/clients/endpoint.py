"""Asks servers that speak OpenAI's chat API (vLLM, SGLang, llama.cpp, hosted ones): chats in, replies out.

An `Endpoint` is a worker (`workers.Worker`): what is submitted is asked at once, by a thread of its own, as many at a
time as `concurrency` says; `collect` returns what has been answered. Faults of servers and networks are waited out; a
reply is never made up. Knows nothing of readers, judges or memories.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import email.utils
import json
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
import tenacity

from finemem_jax.config.sections import Server
from finemem_jax.types import Chat

T = TypeVar("T")

# The longest pause between two tries, and of a server that has failed, where none is asked for (s).
_LONGEST_PAUSE = 20.0
# How much of a server's reply an error quotes (characters).
_QUOTED = 300
# Characters of text that count as a token in `tokens_per_minute`.
_CHARACTERS_PER_TOKEN = 3
# Requests begin so long apart (s), about what sending one takes. Begun all at once they would wait for each other's
# handshakes, be answered all at once, and so on: a third of the throughput, at 50 ms a reply.
_APART = 0.0015
# For so many chats at a time, one more connection is made ahead.
_AHEAD = 4
# Answers below 500 that another try can change: the server's own time-out, and its limits.
_PASSING = (408, 429)


class EndpointError(RuntimeError):
    """No server has answered, or none ever will; the message names it, its last answer, and a remedy."""


@dataclasses.dataclass
class EndpointStats:
    """Counts since the last `Endpoint.take_stats`.

    Attributes:
        answered: Chats that have a reply.
        tries: Requests sent; what is beyond `answered` is what faults have cost.
        faults: How often each kind of fault was met, e.g. {"429": 3, "timeout": 1}.
        prompt_tokens, new_tokens: As servers have counted them, if they do.
        call_seconds: Σ over answered chats of the try that succeeded.
    """

    answered: int = 0
    tries: int = 0
    faults: dict[str, int] = dataclasses.field(default_factory=dict)
    prompt_tokens: int = 0
    new_tokens: int = 0
    call_seconds: float = 0.0


class _PassingFault(Exception):
    """Another try may succeed."""

    def __init__(self, kind: str, message: str, pause: float = 0.0):
        super().__init__(message)
        self.kind = kind
        self.pause = pause  # What the server asks to wait (s).


class _Health:
    """A base URL, and how its server has been doing."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.in_flight = 0
        self._faults = 0  # In a row; those of a rest count as one.
        self.rests_until = 0.0

    def has_failed(self, pause: float) -> None:
        now = time.monotonic()
        if now > self.rests_until:
            self._faults += 1
        self.rests_until = max(self.rests_until, now + max(pause, min(0.1 * 2**self._faults, _LONGEST_PAUSE)))

    def has_answered(self) -> None:
        self._faults, self.rests_until = 0, 0.0

    @property
    def rest(self) -> float:
        """Time for which it should still be left alone (s)."""
        return max(self.rests_until - time.monotonic(), 0.0)


class _Pace:
    """Lets one through after the other, so many seconds apart for each unit of what they cost."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._free_at = 0.0

    async def wait(self, cost: float) -> None:
        now = time.monotonic()
        start = max(now, self._free_at)
        self._free_at = start + cost * self._seconds
        if start > now:
            await asyncio.sleep(start - now)


class _Slot:
    """One of so many places among the chats that servers are working on: from when it is sent until it is answered.

    Connections are made before, and closed after: over TLS a handshake can take a tenth of a second.
    """

    def __init__(self, slots: asyncio.Semaphore, call_seconds: float):
        self._slots, self._call_seconds = slots, call_seconds
        self._began, self._left, self._is_held = time.monotonic(), 0.0, False
        self.limit: asyncio.Timeout

    async def follow(self, event: str, _: Any) -> None:
        """Is called by httpcore on its way (its "trace" extension)."""
        if event.endswith("send_request_headers.started") and not self._is_held:
            # Waiting for a place is not part of the call.
            self.limit.reschedule(None)
            await self._slots.acquire()
            self._is_held, self._began = True, time.monotonic()
            self.limit.reschedule(asyncio.get_running_loop().time() + self._call_seconds)
        elif event.endswith("receive_response_body.complete"):
            self.leave()

    def leave(self) -> float:
        """Gives the place back, if it was taken; returns the seconds from then on, or of connecting if it never was."""
        now = time.monotonic()
        if self._is_held:
            self._is_held, self._left = False, now
            self._slots.release()
        return (self._left or now) - self._began


def urls_of(server: Server) -> list[str]:
    """Splits the base URLs of a section `servers.NAME`.

    Raises:
        ValueError: there is none, or one that is none or holds secrets.
    """
    urls = [url.strip() for url in server.urls.split(",") if url.strip()]
    if not urls:
        raise ValueError("An endpoint needs a URL, e.g. http://localhost:8000/v1.")
    for url in urls:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            # Without its words, and without what may be secret: a password can be what makes it none.
            shown = url.rpartition("@")[2].partition("?")[0]
            raise ValueError(f"{shown!r} is no URL; write e.g. http://localhost:8000/v1.") from None
        if parsed.userinfo or parsed.query:
            # Not shown, and not accepted: it would stand in configs and messages.
            raise ValueError(
                f"The URL of the server at {parsed.host!r} holds a password or a query; leave it out, and put the "
                f"key into the environment variable {server.key_variable}."
            )
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"{url!r} is no URL of a server; write e.g. http://localhost:8000/v1.")
    return urls


class Endpoint:
    """Asks the servers of one section `servers.NAME`. Use it from one thread; `close` it, or use it in a `with`.

    With `server.keep_alive`, the next chat goes over a connection that has brought a reply. That saves a handshake each
    time; but a server or proxy that sends a reply twice has then answered the next question with the last one's reply,
    and nothing in the protocol shows it.

    Attributes:
        poll: Called now and then while `collect` waits. Where it returns True, `collect` comes back; what it raises
            ends `collect`, and what is being asked goes on.
    """

    def __init__(self, server: Server, keep: Callable[[Chat, str], None] | None = None):
        """Connects to nothing yet.

        Args:
            keep: Called with every chat and its reply as soon as that is there, in the endpoint's own thread: for what
                must not be lost if the program is killed before it collects.

        Raises:
            ValueError: a URL that is none, extra fields that are no JSON, or a key that cannot be sent.
        """
        self._server, self._extra = server, json.loads(server.extra or "{}")
        self.poll: Callable[[], bool | None] = lambda: None
        self._keep = keep
        self._servers = [_Health(url) for url in urls_of(server)]
        self._key = os.environ.get(server.key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(
                f"The environment variable {server.key_variable} holds characters that no key has; set it anew."
            )
        self._last_id = 0
        self._pending: set[int] = set()
        self._done: queue.Queue[tuple[int, str | Exception]] = queue.Queue()
        self._stats, self._stats_lock = EndpointStats(), threading.Lock()
        self._thread: threading.Thread | None = None
        # Of the thread.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}

    # ---------------------------------------------------------------------------------- what callers see

    def submit(self, chat: Chat) -> int:
        """Hands a chat in; it is asked as soon as fewer than `concurrency` are. Returns its request_id."""
        loop = self._running_loop()
        self._last_id += 1
        self._pending.add(self._last_id)
        loop.call_soon_threadsafe(self._begin, self._last_id, chat)
        return self._last_id

    def collect(self, wait: bool = True) -> list[tuple[int, str]]:
        """Waits until a chat is answered; returns all that are, as (request_id, reply). [] if none is to be answered.

        It may come back earlier, with [], where `poll` says so.

        Args:
            wait: False: return what has been answered already.

        Raises:
            EndpointError: a chat cannot be answered. It is given up; the others go on, and can be collected.
        """
        found: list[tuple[int, str]] = []
        while self._pending and not found:
            try:
                # With a time-out, for Ctrl-C and `poll`.
                first = self._done.get(timeout=0.5) if wait else self._done.get_nowait()
            except queue.Empty:
                if not wait:
                    break
                if self._thread is None or not self._thread.is_alive():
                    raise EndpointError("The thread that asks the servers has ended; see the errors above.") from None
                if self.poll():
                    break
                continue
            results = [first, *_drained(self._done)]
            for i, (request_id, reply) in enumerate(results):
                if request_id not in self._pending:  # Cancelled meanwhile.
                    continue
                self._pending.remove(request_id)
                if isinstance(reply, Exception):
                    # What else has come can still be collected.
                    self._pending.update(other for other, _ in found)
                    for other in (*found, *results[i + 1 :]):
                        self._done.put(other)
                    raise reply
                found.append((request_id, reply))
        return found

    def cancel(self, request_id: int) -> bool:
        """Takes a chat back. Returns whether it was still to be collected."""
        if request_id not in self._pending:
            return False
        self._pending.remove(request_id)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop, request_id)
        return True

    def take_stats(self) -> EndpointStats:
        """Returns the counts since the last call."""
        with self._stats_lock:
            stats, self._stats = self._stats, EndpointStats()
        return stats

    def close(self) -> None:
        """Gives up what is being asked, and ends the thread."""
        self._pending.clear()
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()
        self._loop = self._thread = None

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------- what its thread does

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            opened: queue.Queue[asyncio.AbstractEventLoop | Exception] = queue.Queue()

            def serve() -> None:
                try:
                    asyncio.run(self._serve(opened))
                except Exception as error:  # The one who waits must hear of it, whatever it is.
                    opened.put(error)
                    raise

            # A daemon, so that a program which forgets to close it ends all the same.
            self._thread = threading.Thread(target=serve, name="endpoint", daemon=True)
            self._thread.start()
            loop = opened.get()
            if isinstance(loop, Exception):
                raise EndpointError(f"No connection can be made from here: {loop}") from loop
            self._loop = loop
        return self._loop

    async def _serve(self, opened: queue.Queue[asyncio.AbstractEventLoop | Exception]) -> None:
        server = self._server
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        kept = server.concurrency if server.keep_alive else 0
        connections = httpx.Limits(max_connections=None, max_keepalive_connections=kept)
        self._closing, self._slots = asyncio.Event(), asyncio.Semaphore(server.concurrency)
        # A few more connections are made ahead: a handshake takes no server's time.
        self._near = asyncio.Semaphore(server.concurrency + max(server.concurrency // _AHEAD, 2))
        limits = server.requests_per_minute, server.tokens_per_minute
        requests_apart, tokens_apart = (60 / limit if limit else 0.0 for limit in limits)
        self._requests, self._tokens = _Pace(max(requests_apart, _APART)), _Pace(tokens_apart)
        async with httpx.AsyncClient(headers=headers, timeout=server.call_seconds, limits=connections) as self._client:
            opened.put(asyncio.get_running_loop())
            await self._closing.wait()
            for task in (tasks := [*self._tasks.values()]):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, request_id: int, chat: Chat) -> None:
        self._tasks[request_id] = asyncio.get_running_loop().create_task(self._answer(request_id, chat))

    def _stop(self, request_id: int) -> None:
        if request_id in self._tasks:
            self._tasks[request_id].cancel()

    async def _answer(self, request_id: int, chat: Chat) -> None:
        try:
            reply: str | Exception = await self._ask(chat)
            if self._keep is not None:
                self._keep(chat, reply)
        except Exception as error:  # Whatever it is, whoever collects must hear of it.
            reply = error
        finally:
            del self._tasks[request_id]
        self._done.put((request_id, reply))

    async def _ask(self, chat: Chat) -> str:
        """Returns the reply to a chat, after as many tries as its time allows."""
        seconds, tries = 0.0, 0  # In tries; not while it waits for its turn.
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_PassingFault),
            wait=self._pause,
            stop=lambda state: seconds + state.idle_for + state.upcoming_sleep > self._server.total_seconds,
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    # Not held while it pauses: others can be asked meanwhile.
                    async with self._near:
                        await self._requests.wait(1)
                        await self._tokens.wait(_estimated_tokens(chat))
                        tries, slot = tries + 1, _Slot(self._slots, self._server.call_seconds)
                        try:
                            return await self._try(chat, slot)
                        finally:
                            seconds += slot.leave()
        except _PassingFault as fault:
            raise EndpointError(
                f"No answer after {tries} {'try' if tries == 1 else 'tries'}; the last one: {fault} Check that the "
                f"server runs, can be reached and serves {self._server.model!r}; then the same command goes on."
            ) from fault
        raise AssertionError("tenacity ends by returning or raising")

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Gives the pause before the next try (s): as long as the server asks, if there is no other to turn to."""
        fault = state.outcome.exception() if state.outcome is not None else None
        asked = 0.0
        if isinstance(fault, _PassingFault) and all(server.rest for server in self._servers):
            asked = fault.pause
        # With jitter, so that not all come back at once.
        return asked + tenacity.wait_random_exponential(multiplier=0.1, max=_LONGEST_PAUSE)(state)

    async def _try(self, chat: Chat, slot: _Slot) -> str:
        server = min(self._servers, key=lambda server: (server.rest, server.in_flight))
        server.in_flight += 1
        self._count(tries=1)
        try:
            # httpx limits the time of each read: a server that sends a byte now and then would never end.
            async with asyncio.timeout(self._server.call_seconds) as slot.limit:
                response = await self._client.post(
                    f"{server.url}/chat/completions", json=self._body(chat), extensions={"trace": slot.follow}
                )
            reply = self._read(server, response)
        except (httpx.RequestError, TimeoutError, _PassingFault) as error:
            fault = error if isinstance(error, _PassingFault) else self._fault(server, error)
            server.has_failed(fault.pause)
            self._count(fault=fault.kind)
            raise fault from error
        finally:
            server.in_flight -= 1
        server.has_answered()
        self._count(answered=1, call_seconds=slot.leave())
        return reply

    def _body(self, chat: Chat) -> dict[str, Any]:
        return {
            "model": self._server.model,
            "messages": [
                {"role": message.role, "content": _plain("".join(message.parts))} for message in chat.messages
            ],
            "max_tokens": chat.max_new_tokens,
            "temperature": chat.temperature,
            "seed": chat.seed,
        } | self._extra

    def _fault(self, server: _Health, error: Exception) -> _PassingFault:
        if isinstance(error, TimeoutError | httpx.TimeoutException):
            return _PassingFault("timeout", f"{server.url} took longer than {self._server.call_seconds:g} s.")
        said = self._quoted(str(error))
        return _PassingFault("connection", f"{server.url}: {type(error).__name__}{said and f' ({said})'}.")

    def _read(self, server: _Health, response: httpx.Response) -> str:
        """Takes the reply out of a response."""
        status, text = response.status_code, self._quoted(response.text)
        said = f"{server.url} answered {status}{text and f' ({text})'}."
        if status in _PASSING or status >= 500:
            raise _PassingFault(str(status), said, _retry_after(response.headers.get("retry-after", "")))
        if status != 200:
            raise EndpointError(f"{said} {self._remedy(status)}")
        try:
            data = json.loads(response.content)
            reply = data["choices"][0]["message"]["content"]
            usage = data.get("usage") or {}
            if not (reply is None or isinstance(reply, str)):
                raise TypeError
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise _PassingFault("malformed", f"{server.url} answered with no chat completion ({text}).") from error
        tokens = (usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens"))
        self._count(**dict(zip(("prompt_tokens", "new_tokens"), tokens, strict=True)))
        # None stands for a reply without words.
        return self._without_key(reply or "")

    def _remedy(self, status: int) -> str:
        variable = self._server.key_variable
        if status in (401, 403):
            return (
                f"The key is read from the environment variable {variable}, which is {'' if self._key else 'not '}set."
            )
        if status in (404, 405):
            return f"Check the URL, which mostly ends in /v1, and the model's name, {self._server.model!r}."
        return "Asking again would not change that: check what is asked against what the server takes."

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "(key)") if self._key else text

    def _quoted(self, text: str) -> str:
        # Cut last: a key that is cut in two would not be found.
        return " ".join(self._without_key(text).split())[:_QUOTED]

    def _count(self, fault: str = "", **more: float) -> None:
        with self._stats_lock:
            if fault:
                self._stats.faults[fault] = self._stats.faults.get(fault, 0) + 1
            for name, value in more.items():
                setattr(self._stats, name, getattr(self._stats, name) + value)


def _plain(text: str) -> str:
    """Replaces halves of surrogate pairs, which data may hold and no request can."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _estimated_tokens(chat: Chat) -> float:
    text = sum(len(part) for message in chat.messages for part in message.parts)
    return text / _CHARACTERS_PER_TOKEN + chat.max_new_tokens


def _retry_after(value: str) -> float:
    """Reads a Retry-After header, which holds seconds or a date, in seconds; 0 if it says nothing useful."""
    with contextlib.suppress(ValueError):
        return max(float(value), 0.0) if float(value) < float("inf") else 0.0
    with contextlib.suppress(ValueError, TypeError):
        moment = email.utils.parsedate_to_datetime(value)
        return max((moment - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0)
    return 0.0


def _drained(waiting: queue.Queue[T]) -> list[T]:
    found: list[T] = []
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(waiting.get_nowait())
    return found
