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

    def collect(self) -> list[tuple[int, Out]]:
        """Works until something is done, and returns what is: (ticket, result). [] only if nothing is to be done."""
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

    def collect(self) -> list[tuple[int, Out]]:
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

    def collect(self) -> list[tuple[int, Out]]:
        return [(ticket, self._after(result)) for ticket, result in self._worker.collect()]

    def cancel(self, ticket: int) -> bool:
        return self._worker.cancel(ticket)


class Once(Generic[Key, Out]):
    """A worker that is given equal items only once, whenever they come, and remembers the results."""

    def __init__(self, worker: Worker[Key, Out]):
        self._worker = worker
        self._tickets = 0
        self._known: OrderedDict[Key, Out] = OrderedDict()
        self._asked: dict[Key, int] = {}  # Tickets of the worker's.
        self._waiting: dict[int, Key] = {}  # By tickets of our own.

    def submit(self, item: Key) -> int:
        self._tickets += 1
        self._waiting[self._tickets] = item
        if item not in self._known and item not in self._asked:
            self._asked[item] = self._worker.submit(item)
        return self._tickets

    def collect(self) -> list[tuple[int, Out]]:
        if self._waiting and not any(item in self._known for item in self._waiting.values()):
            items = {ticket: item for item, ticket in self._asked.items()}
            try:
                results = self._worker.collect()
            except BaseException:
                # What else it was given may be lost with it: nothing is being asked now, and whoever asks again may.
                for ticket in self._asked.values():
                    self._worker.cancel(ticket)
                self._asked.clear()
                self._waiting.clear()
                raise
            for ticket, result in results:
                self._known[items[ticket]] = result
                del self._asked[items[ticket]]
        ready = [(ticket, item) for ticket, item in self._waiting.items() if item in self._known]
        for ticket, item in ready:
            del self._waiting[ticket]
            self._known.move_to_end(item)
        done = [(ticket, self._known[item]) for ticket, item in ready]
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return done

    def cancel(self, ticket: int) -> bool:
        item = self._waiting.pop(ticket, None)
        if item is None:
            return False
        if item in self._asked and item not in self._waiting.values():
            self._worker.cancel(self._asked.pop(item))
        return True
