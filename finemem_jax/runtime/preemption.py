"""Ctrl-C and SIGTERM that never leave work half done."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from finemem_jax.runtime.distributed import Processes, StoppedByPeer


class Terminated(KeyboardInterrupt):
    """The machine is wanted back (SIGTERM)."""


class Interrupt:
    """Signals, made safe: the first asks the run to stop at the next safe point, a second Ctrl-C stops it at once.

    An exception raised wherever the signal happens to arrive can be lost (in a garbage collector's callback, say), or
    come in the middle of an update, which gives its arrays away. So the handler only takes note.

    Attributes:
        updating: Work is going on that cannot be given up; whoever does it says so.
    """

    def __init__(self, processes: Processes | None = None):
        """Args:
        processes: Those of the run, which stop together; None for this one alone.
        """
        self._asked: type[KeyboardInterrupt] | None = None
        self._processes = processes or Processes()
        self._handlers: dict[int, Any] = {}
        self.updating = False

    def __enter__(self) -> Interrupt:
        # Signals can only be handled by the main thread; elsewhere they do not arrive anyway.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._take_note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _take_note(self, number, _):
        if number == signal.SIGTERM:
            # It may come twice, of a shell and of a scheduler: neither wants the run to save nothing.
            self._asked = Terminated
            os.write(2, b"\nSIGTERM: stopping at the next safe point\n")
            return
        if self._asked and not self.updating:
            raise KeyboardInterrupt
        self._asked = KeyboardInterrupt
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping at the next safe point; once more stops at once\n")

    def check(self) -> None:
        """Raises KeyboardInterrupt or Terminated if one was asked for, here or in another process."""
        if self._asked:
            raise self._asked
        self._processes.check()

    def check_together(self) -> None:
        """The same for work that all processes do alike, where one alone must not stop: all call this at each point.

        Raises:
            KeyboardInterrupt: or Terminated, in a process alone.
            StoppedByPeer: in all of several.
        """
        if self._processes.count == 1:
            return self.check()
        for index, asked in enumerate(self._processes.all_gather(self._asked and self._asked.__name__)):
            if asked:
                raise StoppedByPeer(f"process {index} stops: {asked}")
