"""Tests of finemem_jax/interrupt.py: one signal waits for a safe point, two Ctrl-C do not; no update is ever cut."""

import os
import signal
import threading

import pytest

from finemem_jax.interrupt import Interrupt, Terminated
from finemem_jax.processes import AskedByPeer


class Echo:
    """A worker that gives back what it was given."""

    def __init__(self):
        self._given = []

    def submit(self, item):
        self._given.append(item)
        return len(self._given)

    def collect(self, wait=True):
        done, self._given = [*enumerate(self._given, 1)], []
        return done

    def cancel(self, ticket):
        return ticket <= len(self._given)


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_one_waits_for_the_next_check(capfd):
    with Interrupt() as interrupt:
        interrupt.check()
        press()
        assert "safe point" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()


def test_a_second_does_not_wait():
    with Interrupt(), pytest.raises(KeyboardInterrupt):
        press()
        press()


def test_sigterm_never_cuts_anything():
    """Shells and schedulers both send it; neither is impatient."""
    with Interrupt() as interrupt:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Terminated):
            interrupt.check()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_others_may_ask_as_well():
    def ask():
        raise AskedByPeer("process 3")

    with Interrupt(ask) as interrupt, pytest.raises(AskedByPeer):
        interrupt.before(Echo()).collect()


def test_an_update_is_never_cut():
    with Interrupt() as interrupt:
        interrupt.updating = True
        for _ in range(3):
            press()
        interrupt.updating = False
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()


def test_workers_look_before_they_work():
    with Interrupt() as interrupt:
        worker = interrupt.before(Echo())
        ticket = worker.submit("a")
        assert worker.cancel(ticket)
        assert worker.collect() == [(ticket, "a")]
        press()
        with pytest.raises(KeyboardInterrupt):
            worker.collect()


def test_the_handler_that_was_there_comes_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), Interrupt():
        assert signal.getsignal(signal.SIGINT) is not before
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_can_have_one():
    """Where signals cannot be handled."""
    failures = []

    def run():
        try:
            with Interrupt() as interrupt:
                interrupt.check()
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures
