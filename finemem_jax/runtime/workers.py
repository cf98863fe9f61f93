"""Hands work to samplers, readers, judges and servers item by item, and takes results in whatever order they come.

All of these are a `Worker`. The classes below put something in front of one (`Transformed`, `Memoized`, `Shared`), make
one of a plain function (`Batched`), or remember who waits for which result (`Pending`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")
Inner = TypeVar("Inner")
InnerOut = TypeVar("InnerOut")
Key = TypeVar("Key", bound=Hashable)
Owner = TypeVar("Owner")
In_contra = TypeVar("In_contra", contravariant=True)

# Results that `Memoized` remembers; beyond these the least recently used go.
_REMEMBERED = 100_000


class Worker(Protocol[In_contra, Out]):
    """Takes items, and returns a result for each, in its own order and time."""

    def submit(self, item: In_contra, /) -> int:
        """Hands an item in; returns its request_id."""
        ...

    def collect(self, wait: bool = True) -> list[tuple[int, Out]]:
        """Works until something is done, and returns what is: (request_id, result). [] if nothing is to be done.

        Some have a function `poll`, which may call them away before something is done; that is [] as well.

        Args:
            wait: False: do no work, and return what is done already.
        """
        ...

    def cancel(self, request_id: int, /) -> bool:
        """Takes an item back; its result will not be returned. Returns whether there was one to take back."""
        ...


def run_all(worker: Worker[In, Out], items: Sequence[In]) -> list[Out]:
    """Has a worker do all items, and nothing else meanwhile; results stand in the order of the items."""
    request_ids = [worker.submit(item) for item in items]
    results: dict[int, Out] = {}
    try:
        while len(results) < len(request_ids):
            results |= worker.collect()
    except BaseException:
        for request_id in request_ids:
            worker.cancel(request_id)
        raise
    return [results[request_id] for request_id in request_ids]


class Pending(Generic[In, Out, Owner]):
    """A worker with the items it has been handed, and who waits for each result: a callback, a state, a key, ….

    Attributes:
        worker: What does the work. Only this object should use it, or a port of a `Shared` one.
    """

    def __init__(self, worker: Worker[In, Out]):
        self.worker = worker
        self._waiting: dict[int, tuple[In, Owner]] = {}

    @property
    def busy(self) -> bool:
        """True while results are still to come."""
        return bool(self._waiting)

    def submit(self, item: In, owner: Owner) -> int:
        """Hands an item to the worker; `collect` returns its result with the owner. Returns its request_id."""
        request_id = self.worker.submit(item)
        self._waiting[request_id] = item, owner
        return request_id

    def collect(self, wait: bool = True) -> list[tuple[Owner, Out]]:
        """Returns what is done, as (owner, result); see `Worker.collect`. The worker is not asked if nothing is due."""
        done = self.worker.collect(wait) if self._waiting else []
        return [(self._waiting.pop(request_id)[1], result) for request_id, result in done]

    def cancel(self, request_id: int) -> bool:
        """Takes an item back; see `Worker.cancel`."""
        self._waiting.pop(request_id, None)
        return self.worker.cancel(request_id)

    def cancel_all(self) -> list[tuple[In, Owner]]:
        """Takes back all that is still to come, and returns it as (item, owner)."""
        waiting, self._waiting = self._waiting, {}
        for request_id in waiting:
            self.worker.cancel(request_id)
        return list(waiting.values())


class Batched(Generic[In, Out]):
    """A function of many items as a worker: it is called for all that have been handed in, when results are wanted."""

    def __init__(self, function: Callable[[list[In]], Sequence[Out]]):
        self._function = function
        self._waiting: dict[int, In] = {}
        self._last_id = 0

    def submit(self, item: In) -> int:
        self._last_id += 1
        self._waiting[self._last_id] = item
        return self._last_id

    def collect(self, wait: bool = True) -> list[tuple[int, Out]]:
        if not wait:
            return []
        # Taken out first: a function that fails has had its chance.
        waiting, self._waiting = self._waiting, {}
        return list(zip(waiting, self._function(list(waiting.values())), strict=True)) if waiting else []

    def cancel(self, request_id: int) -> bool:
        return self._waiting.pop(request_id, None) is not None


def as_worker(asked: Worker[In, Out] | Callable[[list[In]], Sequence[Out]]) -> Worker[In, Out]:
    """Returns a worker as it is; a function of many items as `Batched`."""
    return Batched(asked) if callable(asked) else asked


class Transformed(Generic[In, Out, Inner, InnerOut]):
    """A worker of one kind of items made of a worker of another: items and results go through a function each."""

    def __init__(
        self, worker: Worker[Inner, InnerOut], before: Callable[[In], Inner], after: Callable[[InnerOut], Out]
    ):
        self._worker, self._before, self._after = worker, before, after

    def submit(self, item: In) -> int:
        return self._worker.submit(self._before(item))

    def collect(self, wait: bool = True) -> list[tuple[int, Out]]:
        return [(request_id, self._after(result)) for request_id, result in self._worker.collect(wait)]

    def cancel(self, request_id: int) -> bool:
        return self._worker.cancel(request_id)


class Memoized(Generic[Key, Out]):
    """A worker that is given equal items only once, whenever they come, and remembers the results."""

    def __init__(self, worker: Worker[Key, Out]):
        self._pending: Pending[Key, Out, Key] = Pending(worker)
        self._last_id = 0
        self._known: OrderedDict[Key, Out] = OrderedDict()
        # Our own request ids of what the worker has been given: by item, with the worker's id of it; and back.
        self._waiters: dict[Key, tuple[int, list[int]]] = {}
        self._waiting: dict[int, Key] = {}
        # Results by our own request ids.
        self._ready: dict[int, Out] = {}

    def submit(self, item: Key) -> int:
        self._last_id += 1
        if item in self._known:
            self._known.move_to_end(item)
            self._ready[self._last_id] = self._known[item]
            return self._last_id
        if item not in self._waiters:
            self._waiters[item] = self._pending.submit(item, item), []
        self._waiters[item][1].append(self._last_id)
        self._waiting[self._last_id] = item
        return self._last_id

    def collect(self, wait: bool = True) -> list[tuple[int, Out]]:
        if self._waiting and not self._ready:
            try:
                results = self._pending.collect(wait)
            except BaseException:
                # What else it was given may be lost with it: nothing is being asked now, and whoever asks again may.
                self._pending.cancel_all()
                self._waiters.clear()
                self._waiting.clear()
                raise
            for item, result in results:
                self._keep(item, result)
        ready, self._ready = self._ready, {}
        return list(ready.items())

    def cancel(self, request_id: int) -> bool:
        if request_id in self._ready:
            del self._ready[request_id]
            return True
        item = self._waiting.pop(request_id, None)
        if item is None:
            return False
        asked, waiters = self._waiters[item]
        waiters.remove(request_id)
        if not waiters:
            del self._waiters[item]
            self._pending.cancel(asked)
        return True

    def _keep(self, item: Key, result: Out) -> None:
        self._known[item] = result
        for request_id in self._waiters.pop(item)[1]:
            del self._waiting[request_id]
            self._ready[request_id] = result
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)


class Shared(Generic[In, Out]):
    """A worker with several users, each of whom gets back what it has handed in itself, through a port of its own."""

    def __init__(self, worker: Worker[In, Out]):
        self.worker = worker
        self.owners: dict[int, _Port[In, Out]] = {}

    def port(self) -> Worker[In, Out]:
        """Makes a port for one more user of the worker."""
        return _Port(self)

    def collect(self, wait: bool) -> bool:
        """Puts what is done into its owners' boxes; returns whether there was anything."""
        done = self.worker.collect(wait)
        for request_id, result in done:
            self.owners.pop(request_id).receive(request_id, result)
        return bool(done)


class _Port(Generic[In, Out]):
    def __init__(self, shared: Shared[In, Out]):
        self._shared = shared
        self._asked: set[int] = set()
        self._done: list[tuple[int, Out]] = []

    def submit(self, item: In) -> int:
        request_id = self._shared.worker.submit(item)
        self._shared.owners[request_id] = self
        self._asked.add(request_id)
        return request_id

    def receive(self, request_id: int, result: Out) -> None:
        """Takes a result that was collected, for whomever."""
        self._asked.remove(request_id)
        self._done.append((request_id, result))

    def collect(self, wait: bool = True) -> list[tuple[int, Out]]:
        # What is done for others on the way waits in their boxes.
        while self._asked and not self._done and self._shared.collect(wait):
            pass
        done, self._done = self._done, []
        return done

    def cancel(self, request_id: int) -> bool:
        if request_id in self._asked:
            self._asked.remove(request_id)
            del self._shared.owners[request_id]
            return self._shared.worker.cancel(request_id)
        before = len(self._done)
        self._done = [pair for pair in self._done if pair[0] != request_id]
        return len(self._done) < before
