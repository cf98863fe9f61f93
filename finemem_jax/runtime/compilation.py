"""Programs compiled ahead of their first call; and a count of every compilation there is.

`jax.jit` compiles at the first call, and has no way to do it before without computing something. Programs live as long
as the process, and are shared by all who call the same function with arguments of the same shapes.
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

# What JAX reports once for each program that it has compiled.
_EVENT = "/jax/core/compile/backend_compile_duration"
# Compilers of large programs take gigabytes of the host's memory each.
_MOST_AT_ONCE = 8


@dataclasses.dataclass
class Counts:
    """How many programs this process has compiled, and how long that took (s)."""

    programs: int = 0
    seconds: float = 0.0


class Call(NamedTuple):
    """A call to the device: a jitted function with its arguments, and the static ones."""

    arguments: tuple[Any, ...]
    statics: Mapping[str, Any] = {}


_counts = Counts()
_programs: dict[Hashable, Callable[..., Any]] = {}
_places: dict[Hashable, int] = {}
_lock = threading.Lock()


def counts() -> Counts:
    """What has been compiled in this process since this module was imported, by whomever."""
    return dataclasses.replace(_counts)


def call(function: Any, *arguments: Any, **statics: Hashable) -> Any:
    """function(*arguments, **statics), by a program that was compiled for such arguments; now, if need be.

    Args:
        function: Jitted; `statics` are its static arguments, and it has no others.
    """
    return prepare(function, *arguments, **statics)(*arguments)


def prepare(function: Any, *arguments: Any, **statics: Hashable) -> Callable[..., Any]:
    """The program that `call` would call: compiled, but not run. It takes the arguments without the static ones."""
    key = _key(function, *arguments, **statics)
    if key not in _programs:
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
    workers = 1 if jax.process_count() > 1 else min(_MOST_AT_ONCE, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(prepare, *call.arguments, **call.statics) for call in programs.values()]
            for done, future in enumerate(concurrent.futures.as_completed(futures)):
                say(done, len(programs))
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    say(len(programs), len(programs))


def _key(function, *arguments, **statics):
    leaves, tree = jax.tree.flatten(arguments)
    shapes = tuple((x.shape, x.dtype, _placed(getattr(x, "sharding", None), x.shape)) for x in leaves)
    return (function, tree, shapes, *sorted(statics.items()))


@functools.lru_cache(maxsize=100_000)
def _placed(sharding, shape):
    """Which part of an array is where: what a program returns is where its arguments were, under another name."""
    if sharding is None:
        return None
    parts = sharding.devices_indices_map(shape).items()
    where = ((device.id, *((part.start, part.stop) for part in index)) for device, index in parts)
    # A number: of many devices, the rest is long, and would be hashed at every call.
    with _lock:
        return _places.setdefault((tuple(sorted(where, key=str)), sharding.memory_kind), len(_places))


def forget() -> None:
    """Drops all programs, and those that JAX keeps; whoever needs them again compiles them again."""
    with _lock:
        _programs.clear()
    jax.clear_caches()


def _note(event: str, duration_secs: float, **_) -> None:
    if event == _EVENT:
        with _lock:
            _counts.programs += 1
            _counts.seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_note)


def rounded(size: int, unit: int = 1) -> int:
    """A size of at least 1 rounded up: to 1 to 8 units, then four to an octave (10, 12, 14, 16, 20, 24, … units)."""
    units = -(-max(size, 1) // unit)
    step = 2 ** max((units - 1).bit_length() - 3, 0)
    return unit * step * -(-units // step)


def all_up_to(size: int, unit: int = 1) -> list[int]:
    """What sizes from 1 to `size` are rounded to, from the least."""
    found = [rounded(1, unit)]
    while found[-1] < size:
        found.append(rounded(found[-1] + 1, unit))
    return found
