"""MemoryAgentBench as Mem-alpha processed it for its own evaluation."""

from __future__ import annotations

from finemem_jax.types import StreamSource, StreamSpec

from . import _memalpha, _tfds


class MemalphaMab(_memalpha.Rows, skip_registration=True):
    """TFDS dataset of YuWangX/Memalpha-Memoryagentbench."""

    REPO = "YuWangX/Memalpha-Memoryagentbench"
    SPLITS = ("test",)


def load(spec: StreamSpec) -> StreamSource:
    """Returns its streams, whole; see `_memalpha.load`.

    Raises:
        ValueError: the spec cannot be served, or a file is missing or broken (with file, row and column).
    """
    return _memalpha.load(_tfds.rows(MemalphaMab, spec.source_dir, _tfds.splits(MemalphaMab, spec.split)), spec)
