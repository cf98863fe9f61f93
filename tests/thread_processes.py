"""Threads that take each other for processes of one run, over a store in memory; shared by tests."""

import concurrent.futures
import threading

import jax

from finemem_jax.runtime.distributed import PeerError, Processes


class Store:
    """What JAX's coordinator keeps, without the network."""

    def __init__(self):
        self.values, self._news = {}, threading.Condition()

    def key_value_set_bytes(self, key, value, allow_overwrite=False):
        with self._news:
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self._news.notify_all()

    def blocking_key_value_get_bytes(self, key, timeout_in_ms):
        with self._news:
            if not self._news.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: it is not there")
            return self.values[key]

    def key_value_try_get_bytes(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self.values[key]

    def key_value_delete(self, key):
        with self._news:
            del self.values[key]


def together(action, count=3, seconds=60.0):
    """Runs `action(processes)` in so many threads; returns their results or errors, and the store."""
    store = Store()

    def run(index):
        try:
            with Processes(index=index, count=count, client=store, timeout_seconds=seconds) as one:
                return action(one)
        except (PeerError, KeyboardInterrupt, RuntimeError) as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count))), store
