"""The chunk reward by likelihoods against generated answers: seconds for 1,000 questions, and whether ranks agree.

    python benchmarks/likelihood.py [--source_dir=FOLDER] [--questions=N]

The frozen reader (SmolLM2-135M) is asked N of the chunks' own questions of each data source. Their evidence are the
best two sentences by BM25 out of a memory that holds what was read so far, and for every third question out of one
that lacks the chunk at hand, so that some answers are there to be found and some are not. Synthetic streams always,
SQuAD and LoCoMo where FOLDER has them. Both sides get the same questions in the same process, by turns; several
minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import re
import sys

# So that it runs from a checkout that is not installed.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import _common as common
import scipy.stats

from experiments import smollm2_135m
from finemem_jax import assembly, reader, scoring, workers
from finemem_jax.episode import MemoryItem
from finemem_jax.reader import Query
from finemem_jax.retrieval import Index

REPEATS = 3
TARGET = 5.0


def config(source: str, folder: str):
    settings = smollm2_135m.get_config()
    settings.data.name, settings.data.source_dir = source, folder
    settings.data.num_train = settings.data.num_test = 0 if folder else 400
    # Both are built.
    settings.likelihood.chunk_share = 0.5
    return settings


def questions(streams, count: int):
    """Chunk questions, each with the texts of its evidence."""
    found = []
    for index in range(len(streams)):
        read, stream = [], streams[index]
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
    parser = argparse.ArgumentParser(description="Likelihoods against generated answers.")
    parser.add_argument("--source_dir", default="", help="folder with files of SQuAD and LoCoMo")
    parser.add_argument("--questions", type=int, default=300, help="of each data source")
    flags = parser.parse_args()
    claims = []
    for source in ("synthetic", *(("squad", "locomo") if flags.source_dir else ())):
        folder = "" if source == "synthetic" else flags.source_dir
        parts = assembly.build(config(source, folder))
        with contextlib.closing(parts.answering):
            assembly.warm_up(config(source, folder), parts, lambda line: None)
            asked = questions(assembly.streams(config(source, folder), "train", parts.environment), flags.questions)
            claims += compare(source, parts, asked)
    common.report("likelihood", claims)


def compare(source, parts, asked):
    """Both sides on the same questions, a part of them in every repeat."""
    generated, likelihoods, times = [], [], []
    for repeat in range(REPEATS):
        some = asked[repeat::REPEATS]
        queries = [Query(question.text, texts) for question, texts in some]
        claims = [reader.claim(question, texts) for question, texts in some]

        def generate(queries=queries, some=some):
            answers = workers.work(parts.answer, queries)
            generated.extend(scoring.score(a, question) for a, (question, _) in zip(answers, some, strict=True))

        def compute(claims=claims):
            likelihoods.extend(workers.work(parts.likely, claims))

        # By turns first and second.
        sides = {"generated": generate, "likelihood": compute}
        order = list(sides) if repeat % 2 else list(sides)[::-1]
        spent = {name: common.seconds(sides[name]) for name in order}
        times.append({name: 1000 * seconds / len(some) for name, seconds in spent.items()})
    values = [found.value for found in likelihoods]
    exact = [
        scoring.exact(text, question.answers)
        for (question, _), text in zip(in_order(asked), answers_of(parts, asked), strict=True)
    ]
    return [
        common.claim(f"{source}: generated, 1,000 questions", [t["generated"] for t in times], "s"),
        common.claim(f"{source}: likelihoods, 1,000 questions", [t["likelihood"] for t in times], "s"),
        common.claim(
            f"{source}: generated / likelihoods", [t["generated"] / t["likelihood"] for t in times], "x", TARGET
        ),
        common.claim(f"{source}: rank correlation", [scipy.stats.spearmanr(values, generated)[0]], "rho"),
        common.claim(f"{source}: mean generated score", [sum(generated) / len(generated)], "score"),
        common.claim(f"{source}: mean likelihood", [sum(values) / len(values)], "p"),
        common.claim(f"{source}: greedy match", [sum(found.greedy for found in likelihoods) / len(values)], "share"),
        common.claim(f"{source}: exact answers at temperature 0.1", [sum(exact) / len(exact)], "share"),
    ]


def in_order(asked):
    return [pair for repeat in range(REPEATS) for pair in asked[repeat::REPEATS]]


def answers_of(parts, asked):
    """As the reader remembers them."""
    return workers.work(parts.answer, [Query(question.text, texts) for question, texts in in_order(asked)])


if __name__ == "__main__":
    main()
