"""Compiles programs ahead of their first call, counts compilations, and rounds sizes so that few shapes occur.

`jax.jit` compiles at the first call, and has no way to do it before without computing something. Here functions are
lowered and compiled explicitly (https://docs.jax.dev/en/latest/aot.html). Programs live as long as the process, and
are shared by all who call the same function with arguments of the same shapes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

# The event that JAX reports once for each program that it has compiled.
_EVENT = "/jax/core/compile/backend_compile_duration"
# Compilers of large programs take gigabytes of the host's memory each.
_MAX_COMPILERS = 8


@dataclasses.dataclass
class Counts:
    """How many programs this process has compiled, and how long that took (s)."""

    programs: int = 0
    seconds: float = 0.0


class Call(NamedTuple):
    """A call to the device.

    Attributes:
        arguments: A jitted function, then its array arguments (or their shapes).
        statics: Its static arguments, by name.
    """

    arguments: tuple[Any, ...]
    statics: Mapping[str, Any] = {}


_counts = Counts()
_programs: dict[Hashable, Callable[..., Any]] = {}
_placements: dict[Hashable, int] = {}
_lock = threading.Lock()


def counts() -> Counts:
    """Returns what has been compiled in this process since this module was imported, by whomever."""
    return dataclasses.replace(_counts)


def call(function: Any, *arguments: Any, **statics: Hashable) -> Any:
    """Returns function(*arguments, **statics), by a program compiled for such arguments; now, if need be.

    Args:
        function: Jitted; `statics` are its static arguments, and it has no others.
    """
    return prepare(function, *arguments, **statics)(*arguments)


def prepare(function: Any, *arguments: Any, **statics: Hashable) -> Callable[..., Any]:
    """Returns the program that `call` would call: compiled, but not run. It takes no static arguments."""
    key = _key(function, *arguments, **statics)
    if key not in _programs:
        # Not under the lock: compiling takes seconds to minutes, and `prepare_all` does several at a time.
        compiled = function.lower(*arguments, **statics).compile()
        with _lock:
            _programs.setdefault(key, compiled)
    return _programs[key]


def prepare_all(calls: Sequence[Call], say: Callable[[int, int], None]) -> None:
    """Compiles programs for all these calls, several at a time.

    Args:
        say: Called with the number of programs that are ready and the number of all, before each and at the end. What
            it raises ends the rest.
    """
    programs = {_key(*call.arguments, **call.statics): call for call in calls}
    # Where processes share devices, compilers may talk to one another: in the same order everywhere.
    workers = 1 if jax.process_count() > 1 else min(_MAX_COMPILERS, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(prepare, *call.arguments, **call.statics) for call in programs.values()]
            for done, future in enumerate(concurrent.futures.as_completed(futures)):
                say(done, len(programs))
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    say(len(programs), len(programs))


def _key(function: Any, *arguments: Any, **statics: Hashable) -> Hashable:
    """Identifies the program of a call: the function, its static arguments, and shapes, dtypes and placements."""
    leaves, tree = jax.tree.flatten(arguments)
    shapes = tuple((x.shape, x.dtype, _placement(getattr(x, "sharding", None), x.shape)) for x in leaves)
    return (function, tree, shapes, *sorted(statics.items()))


@functools.lru_cache(maxsize=100_000)
def _placement(sharding: jax.sharding.Sharding | None, shape: tuple[int, ...]) -> int | None:
    """Numbers the ways in which arrays are spread over devices.

    Equal placements have several descriptions in JAX (PartitionSpec() and PartitionSpec(None), say), and what a program
    returns often has another than its arguments. Keyed by these, a program would be compiled again for its own output.
    """
    if sharding is None:
        return None
    parts = sharding.devices_indices_map(shape).items()
    where = ((device.id, *((part.start, part.stop) for part in index or ())) for device, index in parts)
    # A number, because the full description grows with the number of devices and is hashed at every call.
    with _lock:
        return _placements.setdefault((tuple(sorted(where, key=str)), sharding.memory_kind), len(_placements))


def _count(event: str, duration_secs: float, **_: Any) -> None:
    if event == _EVENT:
        with _lock:
            _counts.programs += 1
            _counts.seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_count)


def bucket(size: int, unit: int = 1) -> int:
    """Rounds a size up to one of few: 1 to 8 units, then four to an octave (10, 12, 14, 16, 20, 24, … units).

    Every shape costs a compilation and every padded element costs computing. With four buckets to an octave, padding
    adds at most a quarter, and the number of shapes grows with the logarithm of the largest.
    """
    units = -(-max(size, 1) // unit)
    step = 2 ** max((units - 1).bit_length() - 3, 0)
    return unit * step * -(-units // step)


def buckets_up_to(size: int, unit: int = 1) -> list[int]:
    """Returns the buckets of the sizes from 1 to `size`, in order."""
    found = [bucket(1, unit)]
    while found[-1] < size:
        found.append(bucket(found[-1] + 1, unit))
    return found
