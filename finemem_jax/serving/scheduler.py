"""Calls of many threads, served by one that owns a manager and a reader: all that is pending is decoded together."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Generator
from concurrent.futures import Future
from typing import Any

from finemem_jax.reading.reader import Query
from finemem_jax.runtime.workers import Worker
from finemem_jax.types import Request

# What a call does. It hands out what the manager is to complete, or the reader to answer, and is sent the result.
Work = Generator["Request | Query", Any, Any]

# How long to wait between two looks at servers that are answering, where nothing is to be computed here.
_LOOK_SECONDS = 0.01


@dataclasses.dataclass(eq=False)
class _Call:
    """Work that somebody waits for."""

    user: str
    work: Work
    done: Future = dataclasses.field(default_factory=Future)


class Calls:
    """The one thread that owns manager and reader, and all that have called it."""

    def __init__(self, manager: Worker, reader: Worker, waits: bool):
        self._manager, self._reader = _Counter(manager, True), _Counter(reader, waits)
        self._waits = waits
        # None asks the thread to end.
        self._new: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._lines: dict[str, collections.deque[_Call]] = {}
        self._lock, self._open = threading.Lock(), True
        self._thread = threading.Thread(target=self._run, name="memory agent", daemon=True)
        self._thread.start()

    def make(self, user: str, work: Work) -> Any:
        """Has the thread do some work, and waits for its result.

        Raises:
            RuntimeError: it is closed. And whatever the work raises.
        """
        call = _Call(user, work)
        with self._lock:
            if not self._open:
                raise _closed()
            self._new.put(call)
        return call.done.result()

    def is_wanted(self) -> bool:
        """Whether there is more to do than what a worker is doing, so that it should come back before that is done."""
        return not self._new.empty() or (self._manager.busy and self._reader.busy)

    def close(self) -> None:
        """Ends the thread. Calls that are not done yet end with a RuntimeError."""
        with self._lock:
            self._open = False
            self._new.put(None)
        self._thread.join()

    def _run(self):
        try:
            while self._enter_new():
                for counter in (self._manager, self._reader):
                    for call, result in counter.collect():
                        self._go_on(call, result)
        finally:
            self._end_all()

    def _enter_new(self):
        """Lets in who has come, and waits for somebody if nobody is there; returns whether to go on."""
        if self._manager.busy or (self._reader.busy and self._waits):
            patience = 0.0
        else:
            patience = _LOOK_SECONDS if self._reader.busy else None
        with contextlib.suppress(queue.Empty):
            call = self._new.get(timeout=patience) if patience != 0.0 else self._new.get_nowait()
            while call is not None:  # Until there is no more, which raises, or the thread is to end.
                line = self._lines.setdefault(call.user, collections.deque())
                line.append(call)
                if len(line) == 1:
                    self._go_on(call, None)
                call = self._new.get_nowait()
            return False
        return True

    def _go_on(self, call, result):
        """Takes a call on to where it has to wait again. If it ends, its user's next one is due."""
        while call is not None:
            try:
                item = call.work.throw(result) if isinstance(result, Exception) else call.work.send(result)
            except StopIteration as end:
                call.done.set_result(end.value)
            except Exception as error:  # Whatever it is, it is for who called.
                call.done.set_exception(error)
            else:
                (self._manager if isinstance(item, Request) else self._reader).put(call, item)
                return
            line = self._lines[call.user]
            line.popleft()
            if not line:
                del self._lines[call.user]
            call, result = (line[0] if line else None), None

    def _end_all(self):
        with self._lock:
            self._open = False  # Should the thread end by itself, nobody else is let in to wait for ever.
        self._manager.cancel()
        self._reader.cancel()
        waiting = [call for line in self._lines.values() for call in line]
        while not self._new.empty():
            call = self._new.get()
            waiting += [call] if call is not None else []
        for call in waiting:
            try:
                call.work.throw(_closed())
            except Exception as error:
                call.done.set_exception(error)


def _closed():
    return RuntimeError("This agent has been closed; load it again.")


class _Counter:
    """A worker, and the calls that wait for it."""

    def __init__(self, worker: Worker, waits: bool):
        """Args:
        waits: Whether `collect` has it work until something is done; else it works by itself, and is only looked at.
        """
        self._worker, self._waits = worker, waits
        self._served: dict[int, tuple[_Call, Request | Query]] = {}
        # A worker that fails does not say because of whom: those it was serving come again, one after the other.
        self._suspects: collections.deque[tuple[_Call, Request | Query]] = collections.deque()

    @property
    def busy(self) -> bool:
        return bool(self._served or self._suspects)

    def put(self, call: _Call, item: Request | Query) -> None:
        """Hands in what a call needs."""
        if self._suspects:
            self._suspects.append((call, item))
        else:
            self._served[self._worker.submit(item)] = call, item

    def collect(self) -> list[tuple[_Call, Any]]:
        """What is done: calls with their results, or with the exception that one has caused."""
        if self._suspects and not self._served:
            suspect = self._suspects.popleft()
            self._served[self._worker.submit(suspect[1])] = suspect
        if not self._served:
            return []
        try:
            done = self._worker.collect(self._waits)
        except Exception as error:
            served = list(self._served.values())
            self._give_up()
            if len(served) == 1:
                return [(served[0][0], error)]
            self._suspects.extend(served)
            return []
        return [(self._served.pop(request_id)[0], result) for request_id, result in done]

    def cancel(self) -> None:
        """Gives up all that is still to come."""
        self._give_up()
        self._suspects.clear()

    def _give_up(self):
        for request_id in self._served:
            self._worker.cancel(request_id)
        self._served.clear()
