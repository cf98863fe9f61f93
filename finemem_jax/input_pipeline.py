"""From a builder's name to an endless, deterministic, resumable order of streams.

A builder is a module in the folder `data/` that defines `load(spec: StreamSpec) -> StreamSource`. Adding a
data source is adding a file there. Knows nothing of prompts, tokens or models.
"""

from __future__ import annotations

import importlib
import pathlib
import sys
import types
from collections.abc import Sequence

import grain

from finemem_jax.episode import Stream, StreamSource, StreamSpec

DATA_DIR = pathlib.Path(__file__).resolve().parent.parent / "data"
_PACKAGE = "finemem_data"
# For ever, for all we know. Grain's own endless repeat overflows on a source of one stream.
_EPOCHS = 1_000_000


def load(name: str, spec: StreamSpec, data_dir: pathlib.Path = DATA_DIR) -> StreamSource:
    """Returns the streams of data source `name`.

    Raises:
        ValueError: no such builder; the message lists those there are. Builders raise ValueError for a
            missing folder and for a broken line, naming file and line.
    """
    return builder(name, data_dir).load(spec)


def builder(name: str, data_dir: pathlib.Path = DATA_DIR) -> types.ModuleType:
    """Imports `data/<name>.py` (modules there may import each other as `from . import other`)."""
    known = sorted(path.stem for path in data_dir.glob("*.py") if not path.stem.startswith("_"))
    if name not in known:
        raise ValueError(
            f"data.name must be a builder in {data_dir}: {', '.join(known) or '(the folder has none)'}; got {name!r}. "
            "To add a source, write a module there with `load(spec) -> StreamSource`."
        )
    package = sys.modules.get(_PACKAGE)
    if package is None or package.__path__ != [str(data_dir)]:
        for module in [m for m in sys.modules if m == _PACKAGE or m.startswith(_PACKAGE + ".")]:
            del sys.modules[module]
        package = types.ModuleType(_PACKAGE)
        package.__path__ = [str(data_dir)]
        sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.{name}")


def training_order(source: StreamSource, seed: int, batch_size: int) -> grain.DatasetIterator[Sequence[Stream]]:
    """Yields batches of streams for ever: shuffled anew each epoch, the same for the same seed.

    The iterator's `get_state()` / `set_state()` go into checkpoints, so that a resumed run reads the very next batch.
    """
    # A batch is a list of Streams, never stacked into arrays: Streams are text and ragged.
    endless = grain.MapDataset.source(source).seed(seed).shuffle().repeat(_EPOCHS)
    dataset = endless.batch(batch_size, batch_fn=list)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
