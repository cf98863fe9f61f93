"""Which streams a config asks for: sources, splits, mixtures, and the stages of a curriculum."""

from __future__ import annotations

import dataclasses
import functools

from finemem_jax import config as config_lib
from finemem_jax import input_pipeline
from finemem_jax.config import ConfigDict
from finemem_jax.input_pipeline import Mixture, Stage
from finemem_jax.memory.environment import Environment
from finemem_jax.types import StreamSpec


def load(config: ConfigDict, split: str, chunks_per_stream: int | None = None, part: str = "") -> Mixture:
    """The streams of a split as their builders give them.

    Args:
        split: "train" or "test"; which of the settings of `config.data` hold.
        chunks_per_stream: Instead of `data.chunks_per_stream`; for a stage of the curriculum.
        part: What the builders are asked for, if not this split: "train", "test" or "all".

    Raises:
        ValueError: a builder refuses; what it says names the remedy. Or the weights do not fit the sources.
    """
    names = names_of(config, split)
    spec = dataclasses.replace(_spec(config, split, chunks_per_stream), split=part or split)
    return Mixture([input_pipeline.load(name, spec) for name in names], _weights(config, names, split))


def names_of(config: ConfigDict, split: str) -> list[str]:
    """The builders that a split's streams come from."""
    names = (config.data.test_name if split == "test" else "") or config.data.name
    return [name.strip() for name in names.split(",")]


def streams(config: ConfigDict, split: str, environment: Environment, chunks_per_stream: int | None = None) -> Mixture:
    """Like `load`, with every chunk fitted to the environment."""
    return load(config, split, chunks_per_stream).map(environment.fit)


def stages(config: ConfigDict, environment: Environment, train_streams: Mixture) -> list[Stage]:
    """The curriculum's stages, each with training streams of its own number of chunks.

    Args:
        train_streams: The training streams of `data.chunks_per_stream` chunks; stages of that length use them.
    """

    def source(chunks: int) -> Mixture:
        if chunks == config.data.chunks_per_stream:
            return train_streams
        return streams(config, "train", environment, chunks)

    return [Stage(start, functools.partial(source, chunks)) for start, chunks in config_lib.curriculum(config)]


def _weights(config, names, split):
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


def _spec(config, split, chunks_per_stream):
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
