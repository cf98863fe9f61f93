"""Mem-alpha's balanced training set and its test set, as published."""

from __future__ import annotations

from finemem_jax.types import StreamSource, StreamSpec

from . import _memalpha, _tfds


class Memalpha(_memalpha.Rows, skip_registration=True):
    """TFDS dataset of YuWangX/Memalpha."""

    REPO = "YuWangX/Memalpha"
    SPLITS = ("train", "test")


def load(spec: StreamSpec) -> StreamSource:
    """Returns its streams, whole; see `_memalpha.load`.

    Raises:
        ValueError: the spec cannot be served, or a file is missing or broken (with file, row and column).
    """
    return _memalpha.load(_tfds.rows(Memalpha, spec.source_dir, _tfds.splits(Memalpha, spec.split)), spec)
