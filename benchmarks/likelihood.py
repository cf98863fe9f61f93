"""Compares the chunk reward by likelihoods with that by generated answers: time for 1,000 questions, and ranks.

    python benchmarks/likelihood.py [--source_dir=FOLDER] [--questions=N] [--repeats=3]

The frozen reader (SmolLM2-135M) is asked N of the chunks' own questions of each data source. Their evidence are the
best two sentences by BM25 out of a memory that holds what was read so far, and for every third question out of one
that lacks the chunk at hand, so that some answers are there to be found and some are not. Synthetic streams always,
SQuAD and LoCoMo where FOLDER has them. Both sides get the same questions in the same process, by turns; several
minutes.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import _common as common
import numpy as np
import scipy.stats

from experiments import smollm2_135m
from finemem_jax import build, input_pipeline
from finemem_jax import config as config_lib
from finemem_jax.config.sections import Config
from finemem_jax.memory.retrieval import Index
from finemem_jax.reading import reader, scoring
from finemem_jax.reading.reader import Query
from finemem_jax.runtime import workers
from finemem_jax.types import MemoryItem, Question, StreamSource

TARGET = 5.0
Asked = list[tuple[Question, tuple[str, ...]]]  # Questions, each with the texts of its evidence.


def config(source: str, folder: str) -> Config:
    """Returns the experiment's settings, for one data source."""
    settings = smollm2_135m.get_config()
    settings.data.name, settings.data.source_dir = source, folder
    settings.data.num_train = settings.data.num_test = 0 if folder else 400
    # Both are built.
    settings.likelihood.chunk_share = "0.5"
    return config_lib.parse(settings)


def questions(streams: StreamSource, count: int) -> Asked:
    """Collects chunk questions; ends the program if there are too few."""
    found: Asked = []
    for index in range(len(streams)):
        read: list[str] = []
        stream = streams[index]
        for chunk in stream.chunks:
            own = [s for s in re.split(r"(?<=[.!?])\s+|\n", chunk.text) if s.strip()]
            for question in chunk.questions:
                texts = read if len(found) % 3 == 2 else read + own
                memory = Index()
                memory.update([MemoryItem(i, text, 0) for i, text in enumerate(texts)])
                found.append((question, tuple(item.text for item in memory.retrieve(question.text, 2))))
                if len(found) == count:
                    return found
            read = read + own
    sys.exit(f"There are only {len(found)} questions; lower --questions.")


def main() -> None:
    """Measures, and prints the claims."""
    parser = common.parser(__doc__, repeats=3)
    parser.add_argument("--source_dir", default="", help="folder with files of SQuAD and LoCoMo")
    parser.add_argument("--questions", type=int, default=300, help="of each data source")
    flags = parser.parse_args()
    claims, repeats = [], flags.repeats
    count = -(-flags.questions // repeats)
    for source in ("synthetic", *(("squad", "locomo") if flags.source_dir else ())):
        folder = "" if source == "synthetic" else flags.source_dir
        parts = build.build(config(source, folder))
        with contextlib.closing(parts.answering):
            build.warm_up(config(source, folder), parts, lambda line: None)
            streams = input_pipeline.streams(config(source, folder), "train", parts.environment)
            every = questions(streams, (repeats + 1) * count)
            # The first calls of a program take longer than the others, and are not counted.
            first, *others = [every[n :: repeats + 1] for n in range(repeats + 1)]
            measured(parts, first, SIDES)
            # Each side is the first one by turns.
            runs = [measured(parts, asked, SIDES[:: -1 if n % 2 else 1]) for n, asked in enumerate(others)]
        claims += of_source(source, runs)
    common.report("likelihood", claims)


SIDES = ("generated", "likelihood")


def measured(parts: build.Components, asked: Asked, order: Sequence[str]) -> dict[str, Any]:
    """Has both sides do the same questions; returns the milliseconds a question of each, and what they found."""
    scorer = parts.answering.likelihood_scorer
    assert scorer
    queries = [Query(question.text, texts) for question, texts in asked]
    claims = [reader.likelihood_query(question, texts) for question, texts in asked]
    found: dict[str, list[Any]] = {}
    spent: dict[str, float] = {}
    sides = {
        "generated": lambda: found.update(generated=workers.run_all(parts.answering.answer, queries)),
        "likelihood": lambda: found.update(likelihood=workers.run_all(scorer, claims)),
    }
    for name in order:
        spent[name] = 1000 * common.seconds(sides[name]) / len(asked)
    pairs = list(zip(found["generated"], [question for question, _ in asked], strict=True))
    return {
        **spent,
        "scores": [scoring.score(text, question) for text, question in pairs],
        "exact": [scoring.exact(text, question.answers) for text, question in pairs],
        "values": [one.value for one in found["likelihood"]],
        "greedy": [float(one.greedy) for one in found["likelihood"]],
    }


def of_source(source: str, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Makes the claims of one data source."""
    every = {name: [x for run in runs for x in run[name]] for name in ("scores", "exact", "values", "greedy")}
    mean = {name: sum(values) / len(values) for name, values in every.items()}
    correlation = float(np.asarray(scipy.stats.spearmanr(every["values"], every["scores"]))[0])
    ratios = [run["generated"] / run["likelihood"] for run in runs]
    return [
        common.claim(f"{source}: generated, 1,000 questions", [run["generated"] for run in runs], "s"),
        common.claim(f"{source}: likelihoods, 1,000 questions", [run["likelihood"] for run in runs], "s"),
        common.claim(f"{source}: generated / likelihoods", ratios, "x", target=TARGET),
        common.claim(f"{source}: rank correlation", [correlation], "rho"),
        common.claim(f"{source}: mean generated score", [mean["scores"]], "score"),
        common.claim(f"{source}: mean likelihood", [mean["values"]], "p"),
        common.claim(f"{source}: greedy match", [mean["greedy"]], "share"),
        common.claim(f"{source}: exact answers at temperature 0.1", [mean["exact"]], "share"),
    ]


if __name__ == "__main__":
    main()
