"""Serves the calls of many threads in one, which owns manager and reader: all that is pending is decoded together."""

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
from finemem_jax.runtime.workers import Pending, Worker
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
    done: Future[Any] = dataclasses.field(default_factory=Future)


class _Isolating:
    """A worker with the calls that wait for it; where it fails, that is for the one call that makes it fail.

    A worker does not say because of which item it fails: those it was serving are handed in again, one after the other,
    and what fails alone is the cause.
    """

    def __init__(self, worker: Worker[Any, Any]):
        self.pending: Pending[Request | Query, Any, _Call] = Pending(worker)
        self._suspects: collections.deque[tuple[Request | Query, _Call]] = collections.deque()

    @property
    def busy(self) -> bool:
        return self.pending.busy or bool(self._suspects)

    def submit(self, item: Request | Query, call: _Call) -> None:
        """Hands in what a call needs; after the suspects, if there are some."""
        if self._suspects:
            self._suspects.append((item, call))
        else:
            self.pending.submit(item, call)

    def collect(self, wait: bool) -> list[tuple[_Call, Any]]:
        """Returns what is done: calls with their results, or with the exception that one has caused."""
        if self._suspects and not self.pending.busy:
            self.pending.submit(*self._suspects.popleft())
        try:
            return self.pending.collect(wait)
        except Exception as error:
            served = self.pending.cancel_all()
            if len(served) == 1:
                return [(served[0][1], error)]
            self._suspects.extend(served)
            return []

    def cancel_all(self) -> None:
        """Gives up all that is still to come."""
        self.pending.cancel_all()
        self._suspects.clear()


class Calls:
    """The one thread that owns manager and reader, and all that have called it."""

    def __init__(self, manager: Worker[Request, Any], reader: Worker[Query, str], waits: bool):
        """Starts the thread.

        Args:
            waits: Whether the reader works while it is waited for; else it works by itself, and is only looked at.
        """
        self._manager, self._reader, self._waits = _Isolating(manager), _Isolating(reader), waits
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
        """Tells whether there is more to do than what a worker is doing: it should come back before that is done."""
        return not self._new.empty() or (self._manager.busy and self._reader.busy)

    def close(self) -> None:
        """Ends the thread. Calls that are not done yet end with a RuntimeError."""
        with self._lock:
            self._open = False
            self._new.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._enter_new():
                for call, result in self._manager.collect(wait=True):
                    self._go_on(call, result)
                for call, result in self._reader.collect(self._waits):
                    self._go_on(call, result)
        finally:
            self._end_all()

    def _enter_new(self) -> bool:
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

    def _go_on(self, call: _Call | None, result: Any) -> None:
        """Takes a call on to where it has to wait again. If it ends, its user's next one is due."""
        while call is not None:
            try:
                item = call.work.throw(result) if isinstance(result, Exception) else call.work.send(result)
            except StopIteration as end:
                call.done.set_result(end.value)
            except Exception as error:  # Whatever it is, it is for who called.
                call.done.set_exception(error)
            else:
                (self._manager if isinstance(item, Request) else self._reader).submit(item, call)
                return
            line = self._lines[call.user]
            line.popleft()
            if not line:
                del self._lines[call.user]
            call, result = (line[0] if line else None), None

    def _end_all(self) -> None:
        with self._lock:
            self._open = False  # Should the thread end by itself, nobody else is let in to wait for ever.
        self._manager.cancel_all()
        self._reader.cancel_all()
        waiting = [call for line in self._lines.values() for call in line]
        while not self._new.empty():
            call = self._new.get()
            waiting += [call] if call is not None else []
        for call in waiting:
            try:
                call.work.throw(_closed())
            except Exception as error:
                call.done.set_exception(error)


def _closed() -> RuntimeError:
    return RuntimeError("This agent has been closed; load it again.")
