"""Mem-alpha's whole training set, before sources were capped at 100 streams."""

from __future__ import annotations

from finemem_jax.types import StreamSource, StreamSpec

from . import _memalpha, _tfds


class MemalphaFull(_memalpha.Rows, skip_registration=True):
    """TFDS dataset of YuWangX/Memalpha-full."""

    REPO = "YuWangX/Memalpha-full"
    SPLITS = ("train",)


def load(spec: StreamSpec) -> StreamSource:
    """Returns its streams, whole; see `_memalpha.load`.

    Raises:
        ValueError: the spec cannot be served, or a file is missing or broken (with file, row and column).
    """
    return _memalpha.load(_tfds.rows(MemalphaFull, spec.source_dir, _tfds.splits(MemalphaFull, spec.split)), spec)
