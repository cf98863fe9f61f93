"""Streams like those of `trec`, with the fine classes ("COARSE:fine") as labels."""

from finemem_jax.types import StreamSource, StreamSpec

from . import trec

NAME = "trec_fine"


def load(spec: StreamSpec) -> StreamSource:
    """Returns streams that teach the fine classes; raises as `trec.load` does."""
    return trec.load(spec, NAME, fine=True)
