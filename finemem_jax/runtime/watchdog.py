"""Stops a run on non-finite gradients or when it takes too much of the host's memory."""

from __future__ import annotations

import collections
import pathlib
import resource
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from finemem_jax.config.sections import Config
from finemem_jax.runtime import checksums
from finemem_jax.runtime.distributed import Processes


class StopError(Exception):
    """A run has gone beyond its bounds; what it has learned is saved."""


class Watchdog:
    """Counts updates skipped for non-finite gradients, measures the host's memory, and stops a run at their limits."""

    def __init__(self, config: Config, workdir: pathlib.Path):
        """Reads the limits from `config.train`; batches that led to a stop go to `workdir`/dumps."""
        self._max_skipped, self._max_gigabytes = config.train.max_skipped_updates, config.train.max_memory_gigabytes
        self._folder = workdir / "dumps"
        self._in_a_row = 0
        self._skipped: collections.Counter[int] = collections.Counter()
        self._dump: pathlib.Path | None = None

    def observe(self, step: int, minibatch: Sequence[Any], measured: Mapping[str, float]) -> None:
        """Counts an update if it was skipped; at the limit of those in a row, writes down its batches.

        Args:
            minibatch: The update's micro-batches, each a tree of arrays.
            measured: Metrics of the update; {} if there was nothing to learn from.
        """
        if not measured:
            return
        skipped = measured["loss/skipped_updates"] > 0
        self._skipped[step] += skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if skipped and self._in_a_row >= self._max_skipped:
            self._dump = _write_arrays(self._folder / f"step_{step + 1:06d}", minibatch)

    def skipped_in(self, step: int) -> float:
        """Returns how many updates of a step were skipped."""
        return float(self._skipped[step])

    def memory(self) -> float:
        """Returns how much of the host's memory the process holds (GiB): now on Linux, at its peak elsewhere."""
        statm = pathlib.Path("/proc/self/statm")
        if not statm.exists():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        # The second number is the resident set size in pages: man 5 proc_pid_statm.
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**30

    def check(self, processes: Processes) -> None:
        """Raises StopError, in all processes, if one of them must not go on."""
        if self._in_a_row >= self._max_skipped:
            raise StopError(
                f"the gradients of {self._in_a_row} updates in a row were not finite (train.max_skipped_updates), and "
                f"none of these was made. The last one's batches are in {self._dump}. Lower optimizer.learning_rate or "
                "optimizer.clip_norm, or go back to an older checkpoint."
            )
        if self._max_gigabytes and max(processes.all_gather(self.memory())) > self._max_gigabytes:
            raise StopError(
                f"the process holds {self.memory():.1f} GiB of the host's memory, more than train.max_memory_gigabytes="
                f"{self._max_gigabytes}; the same command goes on in a new one."
            )


def _write_arrays(folder: pathlib.Path, trees: Iterable[Any]) -> pathlib.Path:
    """Writes the arrays of some trees, one .npz for each, into a folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, tree in enumerate(trees):
        arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in checksums.leaves_by_path(tree).items()}
        np.savez_compressed(folder / f"{number:03d}.npz", **arrays)
    return folder
