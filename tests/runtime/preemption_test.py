"""Tests of finemem_jax/runtime/preemption.py: one signal waits for a safe point, two Ctrl-C do not."""

import os
import signal
import threading

import pytest

import thread_processes
from finemem_jax.runtime.distributed import AskedByPeer, StoppedByPeer
from finemem_jax.runtime.preemption import Interrupt, Terminated


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
    def act(one):
        if one.index == 2:
            return one.stop("SIGTERM")
        while True:
            try:
                Interrupt(one).check()
            except AskedByPeer as error:
                one.stop("with the other")
                return str(error)

    results, _ = thread_processes.together(act)
    assert results[2] is None and {"SIGTERM"} <= set(results[:2]) <= {"SIGTERM", "with the other"}


def test_all_stop_at_the_same_point_of_common_work():
    def act(one):
        with Interrupt(one) as interrupt:
            for point in range(5):
                if one.index == 1 and point == 3:
                    interrupt._take_note(signal.SIGTERM, None)
                try:
                    interrupt.check_together()
                except StoppedByPeer as error:
                    return point, str(error)
        return None

    results, _ = thread_processes.together(act)
    assert results == [(3, "process 1 stops: Terminated")] * 3


def test_alone_common_work_is_ones_own():
    with Interrupt() as interrupt:
        interrupt.check_together()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Terminated):
            interrupt.check_together()


def test_an_update_is_never_cut():
    with Interrupt() as interrupt:
        interrupt.updating = True
        for _ in range(3):
            press()
        interrupt.updating = False
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()


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
