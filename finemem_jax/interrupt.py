"""Ctrl-C that never leaves work half done."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from finemem_jax.workers import Worker

In, Out = TypeVar("In"), TypeVar("Out")


class Interrupt:
    """Ctrl-C, made safe: the first asks the run to stop at the next safe point, a second stops it at once.

    An exception raised wherever the signal happens to arrive can be lost (in a garbage collector's callback, say), or
    come in the middle of an update, which gives its arrays away. So the handler only takes note.
    """

    def __init__(self):
        self._asked = False
        self._handler: Any = None
        self.updating = False

    def __enter__(self) -> Interrupt:
        # Signals can only be handled by the main thread; elsewhere Ctrl-C does not arrive anyway.
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._take_note)
        return self

    def __exit__(self, *_) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)

    def _take_note(self, *_):
        if self._asked and not self.updating:
            raise KeyboardInterrupt
        self._asked = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping at the next safe point; once more stops at once\n")

    def check(self) -> None:
        """Raises KeyboardInterrupt if one was asked for."""
        if self._asked:
            raise KeyboardInterrupt

    def before(self, worker: Worker[In, Out]) -> Worker[In, Out]:
        """The same worker, with a check whenever it is to work."""
        return _Checked(worker, self.check)


class _Checked(Generic[In, Out]):
    """A worker that calls a function before it works."""

    def __init__(self, worker: Worker[In, Out], check: Callable[[], None]):
        self.submit, self.cancel = worker.submit, worker.cancel
        self._worker, self._check = worker, check

    def collect(self, wait: bool = True) -> list[tuple[int, Out]]:
        self._check()
        return self._worker.collect(wait)
