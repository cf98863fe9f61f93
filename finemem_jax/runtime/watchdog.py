"""What a run must not go on with: gradients that are not finite, and too much of the host's memory."""

from __future__ import annotations

import collections
import pathlib
import resource
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from finemem_jax.config.sections import Config
from finemem_jax.runtime.distributed import Processes


class StopError(Exception):
    """A run has gone beyond its bounds; what it has learned is saved."""


class Watchdog:
    """Watches what a run must not go on with: gradients that are not finite, and the host's memory."""

    def __init__(self, config: Config, workdir: pathlib.Path):
        self._most_skipped, self._most_memory = config.train.max_skipped_updates, config.train.max_memory_gigabytes
        self._folder = workdir / "dumps"
        self._in_a_row = 0
        self._skipped: collections.Counter[int] = collections.Counter()

    def observe(self, step: int, minibatch: Sequence[Any], measured: Mapping[str, float]) -> None:
        """Counts updates that were skipped, those in a row as well; writes down what led to the last that is borne."""
        if not measured:
            return
        skipped = measured["loss/skipped_updates"] > 0
        self._skipped[step] += skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if skipped and self._in_a_row >= self._most_skipped:
            self._dump = _write_arrays(self._folder / f"step_{step + 1:06d}", minibatch)

    def skipped_in(self, step: int) -> float:
        """How many updates of a step were skipped."""
        return float(self._skipped[step])

    def memory(self) -> float:
        """What the process holds of the host's memory now (GiB)."""
        statm = pathlib.Path("/proc/self/statm")
        if not statm.exists():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**30

    def check(self, processes: Processes) -> None:
        """Raises StopError, in all processes, if one of them must not go on."""
        if self._in_a_row >= self._most_skipped:
            raise StopError(
                f"the gradients of {self._in_a_row} updates in a row were not finite (train.max_skipped_updates), and "
                f"none of these was made. The last one's batches are in {self._dump}. Lower optimizer.learning_rate or "
                "optimizer.clip_norm, or go back to an older checkpoint."
            )
        if self._most_memory and max(processes.all_gather(self.memory())) > self._most_memory:
            raise StopError(
                f"the process holds {self.memory():.1f} GiB of the host's memory, more than train.max_memory_gigabytes="
                f"{self._most_memory}; the same command goes on in a new one."
            )


def _write_arrays(folder: pathlib.Path, trees: Iterable[Any]) -> pathlib.Path:
    """Writes the arrays of some trees, one .npz for each, into a folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, tree in enumerate(trees):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        named: dict[str, Any] = {
            jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves
        }
        np.savez_compressed(folder / f"{number:03d}.npz", **named)
    return folder
