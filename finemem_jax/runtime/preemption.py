"""Stops a run on Ctrl-C or SIGTERM without leaving work half done.

A *safe point* is a place in the run where all that it has learned can be saved: between two pieces of sampling, two
questions to a reader, two micro-batches of gradients. Whoever works there calls `Interrupt.check` again and again; the
exception that this raises goes up to the training loop, which saves a checkpoint and ends the run. In the middle of an
optimizer update there is none: its input arrays are donated, so that the old state is gone before the new one is there.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from finemem_jax.runtime.distributed import Processes, StoppedByPeer


class Terminated(KeyboardInterrupt):
    """The machine is wanted back (SIGTERM): a preempted node, a scheduler's time limit."""


class Interrupt:
    """Handles signals: the first asks the run to stop at the next safe point, a second Ctrl-C stops it at once.

    The handler only takes note. Python runs it between any two bytecodes of the main thread, and an exception raised
    there can be lost (in a garbage collector's callback, which only prints what it raises), or can come in the middle
    of an update. `check` raises it where that does no harm.

    Attributes:
        updating: True while work goes on that cannot be given up; whoever does it sets this. Ctrl-C then waits for the
            next safe point, however often it is pressed.
    """

    def __init__(self, processes: Processes | None = None):
        """Prepares; signals are handled within the `with` block.

        Args:
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

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _take_note(self, number: int, _: FrameType | None) -> None:
        # os.write, not print: the signal may have come in the middle of a print, which cannot be entered twice.
        if number == signal.SIGTERM:
            # A shell and a scheduler may both send it; neither wants the run to stop before it has saved.
            self._asked = Terminated
            os.write(2, b"\nSIGTERM: stopping at the next safe point\n")
            return
        if self._asked and not self.updating:
            raise KeyboardInterrupt
        self._asked = KeyboardInterrupt
        os.write(2, b"\nstopping at the next safe point; once more stops at once\n")

    def check(self) -> None:
        """Raises KeyboardInterrupt or Terminated if one was asked for, here or in another process."""
        if self._asked:
            raise self._asked
        self._processes.check()

    def check_together(self) -> None:
        """Does the same for work that all processes do alike, where one alone must not stop: all call this together.

        Raises:
            KeyboardInterrupt: or Terminated, in a process alone.
            StoppedByPeer: in all of several.
        """
        if self._processes.count == 1:
            return self.check()
        for index, asked in enumerate(self._processes.all_gather(self._asked and self._asked.__name__)):
            if asked:
                raise StoppedByPeer(f"process {index} stops: {asked}")
