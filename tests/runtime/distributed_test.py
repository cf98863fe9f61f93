"""Tests of finemem_jax/runtime/distributed.py: threads that take each other for processes."""

import random
import time

import jax
import pytest

from finemem_jax.runtime import distributed
from finemem_jax.runtime.distributed import AskedByPeer, PeerError, Processes, StoppedByPeer
from thread_processes import together


def test_one_alone():
    alone = Processes()
    assert alone.all_gather("a") == ["a"] and alone.broadcast(3) == 3 and alone.is_first
    alone.barrier()
    alone.check()
    alone.stop("no matter")


def test_values_are_gathered_in_order_and_forgotten():
    rounds = 20

    def action(one):
        return [one.all_gather((one.index, n)) for n in range(rounds)], one.broadcast(one.index)

    results, store = together(action)
    assert results == [([[(i, n) for i in range(3)] for n in range(rounds)], 0)] * 3
    # What is left is of the last round, and who they are.
    assert {key.split("/")[1] for key in store.values} == {"who", str(rounds + 1)}


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, 3_500_000])
def test_values_of_all_sizes(size):
    noise = random.Random(size).randbytes(size)  # Incompressible: large ones go in several pieces.
    results, _ = together(lambda one: one.all_gather((one.index, noise)), count=2)
    assert results == [[(0, noise), (1, noise)]] * 2


def test_one_that_stops_stops_all_at_the_same_point():
    def action(one):
        for n in range(5):
            if one.index == 1 and n == 3:
                one.stop("SIGTERM")
                return n
            try:
                one.all_gather(n)
            except StoppedByPeer as error:
                return n, str(error)
        return None

    results, _ = together(action)
    assert results == [(3, "process 1 stops: SIGTERM"), 3, (3, "process 1 stops: SIGTERM")]


def test_a_call_to_stop_is_heard_before_the_next_gathering():
    def action(one):
        one.barrier()
        if one.index == 1:
            one.stop("SIGTERM")
            return "stopped"
        while True:
            try:
                one.check()
            except AskedByPeer as error:
                one.stop("with the other")
                return str(error)
            time.sleep(0.01)

    results, _ = together(action, count=2)
    assert results == ["SIGTERM", "stopped"]


def test_one_that_is_missing_is_named():
    def action(one):
        if one.index == 2:
            return "gone"
        one.all_gather(one.index)

    (first, second, third), _ = together(action, seconds=0.1)
    assert third == "gone"
    for error in (first, second):
        assert isinstance(error, PeerError)
        assert "process 2 of 3 (" in str(error) and "train.barrier_seconds" in str(error)


def test_one_that_has_failed_is_not_waited_for():
    def action(one):
        if one.index == 1:
            raise RuntimeError("its own trouble")
        one.all_gather(one.index)

    (first, second), _ = together(action, count=2, seconds=600)
    assert isinstance(second, RuntimeError) and isinstance(first, PeerError)
    assert "process 1 (" in str(first) and "RuntimeError: its own trouble" in str(first)


def test_after_an_error_of_the_devices_the_missing_one_is_named(monkeypatch):
    monkeypatch.setattr(distributed, "_ROLL_CALL_SECONDS", 0.3)

    def action(one):
        if one.index == 1:
            return "gone"
        with one.explaining():
            raise jax.errors.JaxRuntimeError("Connection closed by peer\nand so on")

    results, _ = together(action)
    for error in (results[0], results[2]):
        assert isinstance(error, PeerError)
        assert "(Connection closed by peer): process 1 of 3 (" in str(error) and "process 2" not in str(error)
    with pytest.raises(jax.errors.JaxRuntimeError), Processes().explaining():
        raise jax.errors.JaxRuntimeError("of one alone")
