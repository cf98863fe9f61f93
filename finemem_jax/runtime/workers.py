"""Work that is handed in piece by piece and comes back as it is done: of samplers, readers, and plain functions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")
Inner = TypeVar("Inner")
InnerOut = TypeVar("InnerOut")
Key = TypeVar("Key", bound=Hashable)
In_contra = TypeVar("In_contra", contravariant=True)

# Answers that `Once` remembers.
_REMEMBERED = 100_000


class Worker(Protocol[In_contra, Out]):
    """Takes items, and returns a result for each, in its own order and time."""

    def submit(self, item: In_contra, /) -> int:
        """Hands an item in; returns its ticket."""
        ...

    def collect(self, wait: bool = True) -> list[tuple[int, Out]]:
        """Works until something is done, and returns what is: (ticket, result). [] if nothing is to be done.

        Some have a function `between`, which may call them away before something is done; that is [] as well.

        Args:
            wait: False: do no work, and return what is done already.
        """
        ...

    def cancel(self, ticket: int, /) -> bool:
        """Takes an item back; its result will not be returned. Returns whether there was one to take back."""
        ...


def work(worker: Worker[In, Out], items: Sequence[In]) -> list[Out]:
    """Has a worker do all items, and nothing else meanwhile; results stand in the order of the items."""
    tickets = [worker.submit(item) for item in items]
    results: dict[int, Out] = {}
    try:
        while len(results) < len(tickets):
            results |= worker.collect()
    except BaseException:
        for ticket in tickets:
            worker.cancel(ticket)
        raise
    return [results[ticket] for ticket in tickets]


class Batched(Generic[In, Out]):
    """A function of many items as a worker: it is called for all that have been handed in, when results are wanted."""

    def __init__(self, function: Callable[[list[In]], Sequence[Out]]):
        self._function = function
        self._waiting: dict[int, In] = {}
        self._tickets = 0

    def submit(self, item: In) -> int:
        self._tickets += 1
        self._waiting[self._tickets] = item
        return self._tickets

    def collect(self, wait: bool = True) -> list[tuple[int, Out]]:
        if not wait:
            return []
        # Taken out first: a function that fails has had its chance.
        waiting, self._waiting = self._waiting, {}
        return list(zip(waiting, self._function(list(waiting.values())), strict=True)) if waiting else []

    def cancel(self, ticket: int) -> bool:
        return self._waiting.pop(ticket, None) is not None


class Mapped(Generic[In, Out, Inner, InnerOut]):
    """A worker with another in front: what it is given, and what it returns, go through a function each."""

    def __init__(
        self, worker: Worker[Inner, InnerOut], before: Callable[[In], Inner], after: Callable[[InnerOut], Out]
    ):
        self._worker, self._before, self._after = worker, before, after

    def submit(self, item: In) -> int:
        return self._worker.submit(self._before(item))

    def collect(self, wait: bool = True) -> list[tuple[int, Out]]:
        return [(ticket, self._after(result)) for ticket, result in self._worker.collect(wait)]

    def cancel(self, ticket: int) -> bool:
        return self._worker.cancel(ticket)


class Once(Generic[Key, Out]):
    """A worker that is given equal items only once, whenever they come, and remembers the results."""

    def __init__(self, worker: Worker[Key, Out]):
        self._worker = worker
        self._tickets = 0
        self._known: OrderedDict[Key, Out] = OrderedDict()
        # What the worker has been given, by its tickets, and the other way round.
        self._asked: dict[int, Key] = {}
        self._asked_as: dict[Key, int] = {}
        # By tickets of our own: what waits for the worker, also by its key, and what has a result.
        self._waiting: dict[int, Key] = {}
        self._waiters: dict[Key, list[int]] = {}
        self._ready: dict[int, Out] = {}

    def submit(self, item: Key) -> int:
        self._tickets += 1
        if item in self._known:
            self._known.move_to_end(item)
            self._ready[self._tickets] = self._known[item]
            return self._tickets
        self._waiting[self._tickets] = item
        if item not in self._waiters:
            self._waiters[item] = []
            asked = self._worker.submit(item)
            self._asked[asked], self._asked_as[item] = item, asked
        self._waiters[item].append(self._tickets)
        return self._tickets

    def collect(self, wait: bool = True) -> list[tuple[int, Out]]:
        if self._waiting and not self._ready:
            try:
                results = self._worker.collect(wait)
            except BaseException:
                # What else it was given may be lost with it: nothing is being asked now, and whoever asks again may.
                for ticket in self._asked:
                    self._worker.cancel(ticket)
                for waiting in (self._asked, self._asked_as, self._waiters, self._waiting):
                    waiting.clear()
                raise
            for ticket, result in results:
                self._keep(self._asked.pop(ticket), result)
        ready, self._ready = self._ready, {}
        return list(ready.items())

    def cancel(self, ticket: int) -> bool:
        if ticket in self._ready:
            del self._ready[ticket]
            return True
        item = self._waiting.pop(ticket, None)
        if item is None:
            return False
        self._waiters[item].remove(ticket)
        if not self._waiters[item]:
            del self._waiters[item]
            asked = self._asked_as.pop(item)
            del self._asked[asked]
            self._worker.cancel(asked)
        return True

    def _keep(self, item, result):
        self._known[item] = result
        del self._asked_as[item]
        for ticket in self._waiters.pop(item):
            del self._waiting[ticket]
            self._ready[ticket] = result
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)


class Shared(Generic[In, Out]):
    """A worker with several users, each of whom gets back what it has handed in itself, through a port of its own."""

    def __init__(self, worker: Worker[In, Out]):
        self.worker = worker
        self.owners: dict[int, _Port[In, Out]] = {}

    def port(self) -> Worker[In, Out]:
        """The worker as one more user sees it."""
        return _Port(self)

    def collect(self, wait: bool) -> bool:
        """Puts what is done into its owners' boxes; returns whether there was anything."""
        done = self.worker.collect(wait)
        for ticket, result in done:
            self.owners.pop(ticket).receive(ticket, result)
        return bool(done)


class _Port(Generic[In, Out]):
    def __init__(self, shared: Shared[In, Out]):
        self._shared = shared
        self._asked: set[int] = set()
        self._done: list[tuple[int, Out]] = []

    def submit(self, item: In) -> int:
        ticket = self._shared.worker.submit(item)
        self._shared.owners[ticket] = self
        self._asked.add(ticket)
        return ticket

    def receive(self, ticket: int, result: Out) -> None:
        """Takes a result that was collected, for whomever."""
        self._asked.remove(ticket)
        self._done.append((ticket, result))

    def collect(self, wait: bool = True) -> list[tuple[int, Out]]:
        # What is done for others on the way waits in their boxes.
        while self._asked and not self._done and self._shared.collect(wait):
            pass
        done, self._done = self._done, []
        return done

    def cancel(self, ticket: int) -> bool:
        if ticket in self._asked:
            self._asked.remove(ticket)
            del self._shared.owners[ticket]
            return self._shared.worker.cancel(ticket)
        before = len(self._done)
        self._done = [pair for pair in self._done if pair[0] != ticket]
        return len(self._done) < before
