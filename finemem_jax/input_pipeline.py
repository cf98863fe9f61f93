"""Loads streams from builders, and yields training batches in an endless, deterministic, resumable order.

A builder is a function `load(spec: StreamSpec) -> StreamSource` in a file of the folder `data/`, and is called as its
file; `load_full` in `memalpha.py` is the builder `memalpha_full`. Adding a data source is adding a file there.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import functools
import importlib
import itertools
import math
import operator
import pathlib
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import grain

from finemem_jax.config import schedules
from finemem_jax.config.sections import Config
from finemem_jax.memory.environment import Environment
from finemem_jax.runtime.distributed import Processes
from finemem_jax.types import Stream, StreamSource, StreamSpec

Item = TypeVar("Item")

DATA_DIR = pathlib.Path(__file__).resolve().parent.parent / "data"
_PACKAGE = "finemem_data"
# Practically endless: Grain's own endless repeat overflows on a source of one stream.
_EPOCHS = 1_000_000


def load(name: str, spec: StreamSpec, data_dir: pathlib.Path = DATA_DIR) -> StreamSource:
    """Returns the streams of data source `name`.

    Raises:
        ValueError: no such builder; the message lists those there are. Builders raise ValueError for a
            missing folder and for a broken line, naming file and line.
    """
    module, function = _find(name, data_dir)
    return getattr(_import(module, data_dir), function)(spec)


def builder(name: str, data_dir: pathlib.Path = DATA_DIR) -> types.ModuleType:
    """Imports the module of a builder; raises ValueError as `load` does."""
    module, _ = _find(name, data_dir)
    return _import(module, data_dir)


def _find(name: str, data_dir: pathlib.Path) -> tuple[str, str]:
    """Finds a builder: its module and its function there, `load` or `load_SUFFIX`."""
    known: dict[str, tuple[str, str]] = {}
    for path in sorted(data_dir.glob("[!_]*.py")):
        known[path.stem] = path.stem, "load"
        # Found in the text, not by importing all modules: some take seconds.
        for suffix in re.findall(r"^def load_(\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            known[f"{path.stem}_{suffix}"] = path.stem, f"load_{suffix}"
    if name not in known:
        raise ValueError(
            f"data.name must be a builder in {data_dir}: {', '.join(known) or '(the folder has none)'}; got {name!r}. "
            "To add a source, write a module there with `load(spec) -> StreamSource`."
        )
    return known[name]


def _import(name: str, data_dir: pathlib.Path) -> types.ModuleType:
    """Imports a module of the folder, as of a package: modules there may import each other as `from . import other`."""
    package = sys.modules.get(_PACKAGE)
    if package is None or package.__path__ != [str(data_dir)]:
        for module in [m for m in sys.modules if m == _PACKAGE or m.startswith(_PACKAGE + ".")]:
            del sys.modules[module]
        package = types.ModuleType(_PACKAGE)
        package.__path__ = [str(data_dir)]
        sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.{name}")


class Mixture:
    """Streams of several sources, one after the other; a `StreamSource`.

    Where there are several, their names stand before the streams' ids, so that these stay unique.

    Attributes:
        parts: The sources.
        weights: How often a stream of each comes in training, relative to the others.
    """

    def __init__(self, parts: Sequence[StreamSource], weights: Sequence[float]):
        """Joins sources.

        Raises:
            ValueError: not a positive weight for each source.
        """
        if len(parts) != len(weights) or not parts or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(
                f"data.weights must be a number above 0 for each of the {len(parts)} sources of data.name, got "
                f"{', '.join(map(str, weights)) or 'none'}."
            )
        self.parts: list[StreamSource] = (
            list(parts) if len(parts) == 1 else [_Changed(part, _with_source) for part in parts]
        )
        self.weights = tuple(weights)
        self._ends = list(itertools.accumulate(map(len, parts)))

    def map(self, change: Callable[[Stream], Stream]) -> Mixture:
        """Returns the same mixture of changed streams; a stream is changed when it is read."""
        changed = copy.copy(self)
        changed.parts = [_Changed(part, change) for part in self.parts]
        return changed

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Stream:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"stream {index} of {len(self)}")
        place = bisect.bisect_right(self._ends, index)
        return self.parts[place][index - (self._ends[place - 1] if place else 0)]

    def __iter__(self) -> Iterator[Stream]:
        return (self[index] for index in range(len(self)))


def _with_source(stream: Stream) -> Stream:
    return dataclasses.replace(stream, stream_id=f"{stream.source}/{stream.stream_id}")


@dataclasses.dataclass(frozen=True)
class _Changed:
    """The streams of a source, each changed when it is read."""

    source: StreamSource
    change: Callable[[Stream], Stream]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Stream:
        return self.change(self.source[index])


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of the curriculum.

    Attributes:
        start: Its first batch, from 0.
        load: Returns its streams; called when the stage begins, so that only one stage is in memory.
    """

    start: int
    load: Callable[[], StreamSource]


class TrainingOrder:
    """Yields batches of streams for ever: shuffled anew each epoch, the same for the same seed.

    Batch n is batch n of its stage's own shuffled order: where the stages hold equally many streams, a stream that an
    earlier stage has shown does not come again before the epoch is over. Of a `Mixture`, each source is shuffled by
    itself, and its streams are spread evenly by weight.

    With several processes, each reads its share of every batch: streams i, i + n, i + 2 n, … of it for process i of n.
    All of them together read what one alone would (`interleave`).

    Its `get_state()` / `set_state()` go into checkpoints, so that a resumed run reads the very next batch.
    """

    def __init__(self, stages: Sequence[Stage], seed: int, batch_size: int, *, process: tuple[int, int] = (0, 1)):
        """Begins before the first batch.

        Args:
            stages: With ascending `start`, the first 0.
            batch_size: Streams in a batch, those of all processes together.
            process: Which process this is, from 0, and how many there are.

        Raises:
            ValueError: the stages' starts do not ascend from 0, or the processes cannot share a batch evenly.
        """
        starts = [stage.start for stage in stages]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise ValueError(f"the stages of a curriculum must start at ascending batches from 0, got {starts}.")
        if batch_size % process[1]:
            raise ValueError(
                f"rollout.streams_per_step={batch_size} must be a multiple of the number of processes, {process[1]}: "
                "each reads an equal share of a batch."
            )
        self._stages, self._seed, self._batch_size, self._process = stages, seed, batch_size, process
        self._next_index = 0
        self._stage: Stage | None = None
        self._batches: Iterator[list[Stream]] = iter(())

    def __iter__(self) -> TrainingOrder:
        return self

    def __next__(self) -> list[Stream]:
        stage = [stage for stage in self._stages if stage.start <= self._next_index][-1]
        if stage is not self._stage:
            # Frees the old stage before the new one is loaded.
            self._batches = iter(())
            self._batches, self._stage = self._from(stage.load(), self._next_index), stage
        batch = next(self._batches)
        self._next_index += 1
        return batch

    def _from(self, source: StreamSource, first: int) -> Iterator[list[Stream]]:
        parts, weights = (source.parts, source.weights) if isinstance(source, Mixture) else ([source], (1.0,))
        orders = [grain.MapDataset.source(part).seed(self._seed).shuffle().repeat(_EPOCHS) for part in parts]
        endless = orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights)
        index, count = self._process
        # A batch is a list of Streams, never stacked into arrays: Streams are text and ragged.
        batches = endless[index::count].batch(self._batch_size // count, batch_fn=list)[first:]
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    def get_state(self) -> dict[str, int]:
        """Returns how many batches were taken, as plain JSON."""
        return {"next_index": self._next_index}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes on where `get_state` was called.

        Raises:
            ValueError: the state is of another form.
        """
        if state.keys() != {"next_index"}:
            raise ValueError(
                f"the checkpoint's position in the training streams, {dict(state)}, was written by another version of "
                "finemem_jax; go on with that version, or start in another --workdir."
            )
        self._next_index, self._stage = state["next_index"], None


def interleave(shares: Sequence[Sequence[Item]]) -> list[Item]:
    """Joins what processes made of their shares of a batch (`TrainingOrder`), in the batch's order."""
    count = len(shares)
    return [shares[i % count][i // count] for i in range(sum(map(len, shares)))]


def load_split(config: Config, split: str, *, chunks_per_stream: int | None = None, part: str = "") -> Mixture:
    """Loads the streams of a split as their builders give them.

    Args:
        split: "train" or "test"; which of the settings of `config.data` hold.
        chunks_per_stream: Instead of `data.chunks_per_stream`; for a stage of the curriculum.
        part: What the builders are asked for, if not this split: "train", "test" or "all".

    Raises:
        ValueError: a builder refuses; what it says names the remedy. Or the weights do not fit the sources.
    """
    names = names_of(config, split)
    spec = dataclasses.replace(_spec(config, split, chunks_per_stream), split=part or split)
    return Mixture([load(name, spec) for name in names], _weights(config, names, split))


def names_of(config: Config, split: str) -> list[str]:
    """Names the builders that a split's streams come from."""
    names = (config.data.test_name if split == "test" else "") or config.data.name
    return [name.strip() for name in names.split(",")]


def streams(config: Config, split: str, environment: Environment, *, chunks_per_stream: int | None = None) -> Mixture:
    """Loads the streams of a split, every chunk fitted to the environment (`Environment.fit`)."""
    return load_split(config, split, chunks_per_stream=chunks_per_stream).map(environment.fit)


def stages(config: Config, environment: Environment, train_streams: Mixture) -> list[Stage]:
    """Returns the curriculum's stages, each with training streams of its own number of chunks.

    Args:
        train_streams: The training streams of `data.chunks_per_stream` chunks; stages of that length use them.
    """

    def source(chunks: int) -> Mixture:
        if chunks == config.data.chunks_per_stream:
            return train_streams
        return streams(config, "train", environment, chunks_per_stream=chunks)

    planned = schedules.curriculum(config.train, config.data)
    return [Stage(start, functools.partial(source, chunks)) for start, chunks in planned]


def batches(config: Config, environment: Environment, train_streams: Mixture, *, processes: Processes) -> TrainingOrder:
    """Returns the endless order of training batches that a config asks for, this process's share of each.

    Args:
        train_streams: The training streams of `data.chunks_per_stream` chunks (`stages`).
        processes: Those that share out every batch.
    """
    share = processes.index, processes.count
    planned = stages(config, environment, train_streams)
    return TrainingOrder(planned, config.seed, config.rollout.streams_per_step, process=share)


def _weights(config: Config, names: Sequence[str], split: str) -> Sequence[float]:
    if split == "test" or not config.data.weights:
        return (1.0,) * len(names)
    try:
        weights = tuple(float(weight) for weight in config.data.weights.split(","))
    except ValueError:
        weights = ()
    if len(weights) != len(names):
        raise ValueError(
            f"data.weights must be a number for each source of data.name={config.data.name!r}, comma-separated, "
            f"got {config.data.weights!r}; or leave it empty, and all are equal."
        )
    return weights


def _spec(config: Config, split: str, chunks_per_stream: int | None) -> StreamSpec:
    data = config.data
    return StreamSpec(
        split=split,
        seed=config.seed,
        num_streams=data.num_test if split == "test" else data.num_train,
        chunks_per_stream=chunks_per_stream or data.chunks_per_stream,
        chunk_words=data.chunk_words,
        questions_per_chunk=data.questions_per_chunk,
        questions_per_stream=data.questions_per_stream,
        source_dir=(data.test_dir if split == "test" else "") or data.source_dir,
        style=data.style,
        chunking=data.chunking,
        rules=data.rules,
    )
