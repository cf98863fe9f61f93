"""Adaptive against fixed chunking at equal cost: chunk score, global score, memory tokens, each with standard errors.

    python benchmarks/chunking.py --source_dir=DIR [--workdir=RUN] [--streams=8]

DIR holds LoCoMo's and SQuALITY's files. The same text, a stretch of a conversation or a whole story, is cut both ways
into the same number of chunks, which is what a manager costs. It is read, and asked, by SmolLM2-135M as it is, or as a
run trained it (--workdir), in two ways: it manages the memory, or chunks are retrieved as they are (RAG).

LoCoMo's questions come with their evidence: those whose evidence lies in one chunk in both cuttings are asked after
that chunk, and again at the end. SQuALITY has none about parts of a story, so cloze questions stand in for them: a name
that stands within a sentence is left out, and the sentence is the question; at the end the story's own are asked. With
8 texts of each about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import re
import sys

import numpy as np

# So that it runs from a checkout that is not installed.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import _common as common

from finemem_jax import build as assembly
from finemem_jax import config as config_lib
from finemem_jax import input_pipeline
from finemem_jax.evaluation import baselines as methods
from finemem_jax.rl.method import rollout_options
from finemem_jax.types import Chunk, Question, Stream, StreamSpec

from experiments import smollm2_benchmarks  # isort: skip

CHUNKS, WORDS, CLOZE_EVERY, CHUNK_QUESTIONS, PER_TEXT = 10, 200, 120, 3, 4
WAYS = "fixed", "adaptive"
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}(?=[ ,.;!?])")


@dataclasses.dataclass(frozen=True)
class Text:
    """What is cut: lines, questions with the lines that answer them, and questions about all of it."""

    name: str
    text: str
    evidence: tuple[tuple[tuple[str, ...], Question], ...]
    questions: tuple[Question, ...]


def conversations(folder: str, count: int) -> list[Text]:
    """Stretches of LoCoMo's conversations. Read turn by turn, each with its session's date, which stands once here."""
    spec = StreamSpec("all", 0, 0, 100_000, 40, 10_000, 0, source_dir=folder)
    found, texts = input_pipeline.load("locomo", spec), []
    for stream in (found[i] for i in range(len(found))):
        lines, evidence, date, words = [], [], "", 0
        for chunk in stream.chunks:
            first, *turns = chunk.text.splitlines()
            lines += [*([first] if first != date else []), *turns]
            date = first
            evidence += [(tuple(turns), question) for question in chunk.questions]
            words += len(chunk.text.split())
            if words >= CHUNKS * WORDS:
                asked = tuple(question for _, question in evidence)
                texts.append(Text(f"{stream.stream_id}/{len(texts)}", "\n".join(lines), tuple(evidence), asked))
                lines, evidence, date, words = [], [], "", 0
                if len(texts) % PER_TEXT == 0:
                    break
    return texts[:count]


def stories(folder: str, count: int) -> list[Text]:
    """SQuALITY's stories, whole."""
    spec = StreamSpec("all", 0, count, 10_000, 100_000, 0, 10_000, source_dir=folder)
    found = input_pipeline.load("squality", spec)
    streams = [found[i] for i in range(len(found))]
    return [Text(s.stream_id, s.chunks[0].text, clozes(s.chunks[0].text), s.questions) for s in streams]


def cut(text: Text, chunking: str, chunker) -> list[str]:
    """CHUNKS chunks of a text. Adaptive ones are as many as asked for only on average: so others are asked for."""
    words = len(text.text.split()) / CHUNKS
    for change in sorted(np.linspace(0.6, 1.5, 181), key=lambda c: abs(c - 1)):
        spans = chunker.cut(text.text, max(1, math.ceil(change * words)), chunking)
        if len(spans) == CHUNKS:
            return [text.text[slice(*span)] for span in spans]
    raise ValueError(f"{text.name} cannot be cut into {CHUNKS} chunks ({chunking})")


def clozes(text: str) -> tuple[tuple[tuple[str, ...], Question], ...]:
    """Sentences with a question each: its last name is left out."""
    found, next_word = [], 0
    for match in re.finditer(r"[A-Z][^.!?\n]{40,240}[.!?]", text):
        names = list(_NAME.finditer(match[0]))
        word = len(text[: match.start()].split())
        if names and word >= next_word:
            name, next_word = names[-1], word + CLOZE_EVERY
            blank = f"{match[0][: name.start()]}____{match[0][name.end() :]}"
            found.append(((match[0],), Question(f"Which name is missing? {blank}", (name[0],), "substring")))
    return tuple(found)


def both_ways(text: Text, source: str, chunker) -> list[Stream]:
    """The text cut in both ways, with the same questions: those whose evidence lies in one chunk in both."""
    cuts = [cut(text, chunking, chunker) for chunking in WAYS]
    asked: list[list[list[Question]]] = [[[] for _ in chunks] for chunks in cuts]
    for lines, question in text.evidence:
        places = [[t for t, chunk in enumerate(chunks) if all(line in chunk for line in lines)] for chunks in cuts]
        if all(len(place) == 1 for place in places):
            rows = [of[place[0]] for of, place in zip(asked, places, strict=True)]
            if all(len(row) < CHUNK_QUESTIONS for row in rows):
                for row in rows:
                    row.append(question)
    return [
        Stream(
            f"{text.name}/{way}",
            source,
            tuple(Chunk(chunk, tuple(row)) for chunk, row in zip(chunks, rows, strict=True)),
            text.questions,
        )
        for way, chunks, rows in zip(WAYS, cuts, asked, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source_dir", required=True)
    parser.add_argument("--workdir", default="")
    parser.add_argument("--streams", type=int, default=8)
    given = parser.parse_args()
    settings = smollm2_benchmarks.get_config("")
    settings.manager.chunk_tokens = 2_048
    settings.manager.long_chunk = "refuse"
    settings.data.questions_per_chunk = CHUNK_QUESTIONS
    config = config_lib.parse(settings)
    parts = assembly.build(config)
    if given.workdir:
        assembly.use_checkpoint(parts, pathlib.Path(given.workdir))
    options = rollout_options(config, evaluation=True)
    ways = {
        "manager": methods.manager(options, parts.players, (0, "chunking")),
        "rag": methods.without_manager(methods.chunks("lucene", 2), parts.environment, parts.answering.answer),
    }
    claims = []
    for source, read in (("locomo", conversations), ("squality", stories)):
        chunker = sys.modules[input_pipeline.builder(source).__name__.rpartition(".")[0] + "._chunking"]
        streams = [
            stream for text in read(given.source_dir, given.streams) for stream in both_ways(text, source, chunker)
        ]
        asked = [sum(len(chunk.questions) for chunk in stream.chunks) for stream in streams[::2]]
        print(f"{source}: {len(asked)} texts, {sum(asked)} questions about chunks, "
              f"{sum(len(stream.questions) for stream in streams[::2])} at the end", flush=True)  # fmt: skip
        for name, method in ways.items():
            played = method([parts.environment.fit(stream) for stream in streams])
            for measure, of in {
                "chunk score": lambda one: mean([a.score for answers in one.chunk_answers for a in answers]),
                "global score": lambda one: mean([answer.score for answer in one.answers]),
                "memory tokens": lambda one: one.memory_tokens,
                "words of the longest chunk": lambda one: max(len(chunk.text.split()) for chunk in one.stream.chunks),
            }.items():
                values = np.array([of(one) for one in played]).reshape(-1, 2)
                values = values[~np.isnan(values).any(1)]
                if not len(values):
                    continue
                for way, column in zip(WAYS, values.T, strict=True):
                    claims.append(_claim(f"{source}, {name}, {measure}, {way}", column))
                claims.append(_claim(f"{source}, {name}, {measure}, adaptive - fixed", values[:, 1] - values[:, 0]))
    print(json.dumps({"benchmark": "chunking", "claims": claims, "machine": common.machine()}))


def mean(values):
    return float(np.mean(values)) if values else float("nan")


def _claim(name, values):
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    print(f"{name:<55} {np.mean(values):8.3f} ± {error:.3f}  (n = {len(values)})")
    return {"claim": name, "value": float(np.mean(values)), "standard_error": error, "n": len(values)}


if __name__ == "__main__":
    main()
