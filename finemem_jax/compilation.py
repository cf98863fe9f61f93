"""Programs compiled ahead of their first call; and a count of every compilation there is.

`jax.jit` compiles at the first call, and has no way to do it before without computing something. Programs live as long
as the process, and are shared by all who call the same function with arguments of the same shapes.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Hashable
from typing import Any

import jax

# What JAX reports once for each program that it has compiled.
_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass
class Counts:
    """How many programs this process has compiled, and how long that took (s)."""

    programs: int = 0
    seconds: float = 0.0


_counts = Counts()
_programs: dict[Hashable, Callable[..., Any]] = {}
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
    leaves, tree = jax.tree.flatten(arguments)
    shapes = tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
    key = (function, tree, shapes, *sorted(statics.items()))
    if key not in _programs:
        compiled = function.lower(*arguments, **statics).compile()
        with _lock:
            _programs.setdefault(key, compiled)
    return _programs[key]


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
