"""Measures how fast streams are read: array_record files, through Grain in training order, to the manager's prompts.

    python benchmarks/input.py [--repeats=3]

Streams are written as the published data sets are (parquet), made into array_record files by TFDS, shuffled, and
encoded with SmolLM2's tokenizer. Beside it, in turn, whole streams are rolled out by SmolLM2 as in training; that the
update takes time as well is left out, in favor of training. Also reported, without a peer: streams as long as
Mem-alpha's.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import tempfile
import time

import _common as common
import pyarrow
import pyarrow.parquet
import rollout as rollout_benchmark

from finemem_jax import input_pipeline
from finemem_jax.input_pipeline import Stage
from finemem_jax.memory.environment import Environment
from finemem_jax.types import Memory, StreamSpec

STREAMS, CHUNKS, READ = 2, 2, 300
# About 1,400 tokens each, as many as in Mem-alpha's streams.
LONG_CHUNKS, LONG_WORDS, LONG_READ = 10, 1_000, 30


def written(folder: pathlib.Path, spec: StreamSpec) -> pathlib.Path:
    """Writes synthetic streams as parquet, in the columns of Mem-alpha."""
    source = input_pipeline.load("synthetic", spec)
    rows = [
        {
            "instance_id": i,
            "prompt": "",
            "chunks": json.dumps([chunk.text for chunk in stream.chunks]),
            "questions_and_answers": json.dumps(
                [{"question": question.text, "answer": question.answers[0]} for question in stream.questions]
            ),
            "data_source": "squad",
            "metadata": "{}",
        }
        for i, stream in enumerate(source[i] for i in range(len(source)))
    ]
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    return folder


class Reading:
    """Reads streams in training order, and makes prompts of their chunks."""

    def __init__(self, folder: pathlib.Path, spec: StreamSpec, environment: Environment):
        """Makes array_record files of what is in `folder`, and reads the first streams."""
        os.environ["TFDS_DATA_DIR"] = str(folder / "prepared")
        source = input_pipeline.load("memalpha_full", dataclasses.replace(spec, source_dir=str(folder), num_streams=0))
        mixture = input_pipeline.Mixture([source], [1.0]).map(environment.fit)
        self._order = input_pipeline.TrainingOrder([Stage(0, lambda: mixture)], 0, STREAMS)
        self._environment = environment
        next(self._order)

    def read(self, count: int) -> tuple[float, int]:
        """Reads some streams; returns how many a second, and the prompt tokens of each."""
        began, tokens = time.perf_counter(), 0
        for stream in itertools.islice(itertools.chain.from_iterable(self._order), count):
            tokens += sum(len(self._environment.observe(chunk, Memory()).ids) for chunk in stream.chunks)
        return count / (time.perf_counter() - began), tokens // count


def main() -> None:
    """Measures, and prints the claims."""
    repeats = common.parser(__doc__, repeats=3).parse_args().repeats
    setting = rollout_benchmark.Setting(STREAMS, CHUNKS, 16)
    environment, data = setting.parts.environment, setting.config.data
    with tempfile.TemporaryDirectory() as folder:
        short = StreamSpec("train", 0, READ, CHUNKS, data.chunk_words, 0, data.questions_per_stream)
        long = dataclasses.replace(short, num_streams=LONG_READ, chunks_per_stream=LONG_CHUNKS, chunk_words=LONG_WORDS)
        reading = Reading(written(pathlib.Path(folder, "short"), short), short, environment)
        reading_long = Reading(
            written(pathlib.Path(folder, "long"), long), long, dataclasses.replace(environment, chunk_tokens=2_048)
        )
        setting.run(0)
        ratios, rates, consumed, long_rates, long_tokens = [], [], [], [], []
        for repeat in range(1, repeats + 1):
            rates.append(reading.read(READ)[0])
            consumed.append(STREAMS / setting.run(repeat)["seconds"])
            ratios.append(rates[-1] / consumed[-1])
            rate, tokens = reading_long.read(LONG_READ)
            long_rates.append(rate)
            long_tokens.append(rate * tokens)
    common.report(
        "input",
        [
            common.claim("streams read / streams rolled out", ratios, "x", target=50.0),
            common.claim("streams read", rates, "streams/s"),
            common.claim("streams rolled out", consumed, "streams/s"),
            common.claim(f"streams of {LONG_CHUNKS} x {LONG_WORDS} words read", long_rates, "streams/s"),
            common.claim("the same, in prompt tokens", long_tokens, "tokens/s"),
        ],
        ["grain", "tensorflow-datasets", "array-record"],
    )


if __name__ == "__main__":
    main()
