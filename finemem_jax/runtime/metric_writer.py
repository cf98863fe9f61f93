"""Writes the metrics of a run, step by step, to metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

import tensorboardX

from finemem_jax.runtime.files import read_metrics, replace_text


class MetricWriter:
    """Appends metrics to `metrics.jsonl` and TensorBoard events in a workdir. A context manager."""

    def __init__(self, workdir: pathlib.Path, silent: bool = False):
        """Makes the workdir, and opens a file of events in it.

        Args:
            silent: Write nothing, because another process does.
        """
        self._silent = silent
        if silent:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        self._workdir = workdir
        self._path = workdir / "metrics.jsonl"
        self._events = self._open_events()

    def _open_events(self, purge_step: int | None = None) -> tensorboardX.SummaryWriter:
        return tensorboardX.SummaryWriter(str(self._workdir / "tensorboard"), purge_step=purge_step, flush_secs=10)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._silent:
            self._events.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of one step, whole or not at all."""
        if self._silent:
            return
        line = json.dumps({"step": step, **metrics})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        """Drops what was written from `step` on, because a resumed run does these steps again."""
        if self._silent:
            return
        kept = [line for line in read_metrics(self._workdir) if line["step"] < step]
        replace_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        # TensorBoard's files cannot be cut; `purge_step` has it ignore events from that step on.
        self._events.close()
        self._events = self._open_events(purge_step=step)
