"""Compares adaptive with fixed chunking at equal cost: chunk and global score, memory tokens, with standard errors.

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

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import _common as common
import numpy as np

from experiments import smollm2_benchmarks
from finemem_jax import build, input_pipeline
from finemem_jax import config as config_lib
from finemem_jax.evaluation import baselines
from finemem_jax.rl.method import rollout_options
from finemem_jax.types import Chunk, Question, Stream, StreamSpec

CHUNKS, WORDS, CLOZE_EVERY, CHUNK_QUESTIONS, PER_TEXT = 10, 200, 120, 3, 4
WAYS = "fixed", "adaptive"
CutFn = Callable[[str, int, str], Sequence[tuple[int, int]]]  # `data/_chunking.py`, cut.
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}(?=[ ,.;!?])")


@dataclasses.dataclass(frozen=True)
class Text:
    """What is cut: lines, questions with the lines that answer them, and questions about all of it."""

    name: str
    text: str
    evidence: tuple[tuple[tuple[str, ...], Question], ...]
    questions: tuple[Question, ...]


def conversations(folder: str, count: int) -> list[Text]:
    """Reads stretches of LoCoMo's conversations, turn by turn; a session's date stands once, above its turns."""
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
    """Reads SQuALITY's stories, whole."""
    spec = StreamSpec("all", 0, count, 10_000, 100_000, 0, 10_000, source_dir=folder)
    found = input_pipeline.load("squality", spec)
    streams = [found[i] for i in range(len(found))]
    return [Text(s.stream_id, s.chunks[0].text, clozes(s.chunks[0].text), s.questions) for s in streams]


def cut(text: Text, chunking: str, cut_text: CutFn) -> list[str]:
    """Cuts a text into CHUNKS chunks. Adaptive ones come in other numbers than asked for, so others are asked for."""
    words = len(text.text.split()) / CHUNKS
    for change in sorted(np.linspace(0.6, 1.5, 181), key=lambda c: abs(c - 1)):
        spans = cut_text(text.text, max(1, math.ceil(change * words)), chunking)
        if len(spans) == CHUNKS:
            return [text.text[slice(*span)] for span in spans]
    raise ValueError(f"{text.name} cannot be cut into {CHUNKS} chunks ({chunking})")


def clozes(text: str) -> tuple[tuple[tuple[str, ...], Question], ...]:
    """Makes questions of sentences, whose last name is left out."""
    found, next_word = [], 0
    for match in re.finditer(r"[A-Z][^.!?\n]{40,240}[.!?]", text):
        names = list(_NAME.finditer(match[0]))
        word = len(text[: match.start()].split())
        if names and word >= next_word:
            name, next_word = names[-1], word + CLOZE_EVERY
            blank = f"{match[0][: name.start()]}____{match[0][name.end() :]}"
            found.append(((match[0],), Question(f"Which name is missing? {blank}", (name[0],), "substring")))
    return tuple(found)


def both_ways(text: Text, source: str, cut_text: CutFn) -> list[Stream]:
    """Cuts a text in both ways, with the same questions: those whose evidence lies in one chunk in both."""
    cuts = [cut(text, chunking, cut_text) for chunking in WAYS]
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
    """Measures, and prints the claims."""
    parser = common.parser(__doc__, repeats=1)
    parser.add_argument("--source_dir", required=True)
    parser.add_argument("--workdir", default="")
    parser.add_argument("--streams", type=int, default=8, help="texts of each data set")
    given = parser.parse_args()
    settings = smollm2_benchmarks.get_config("")
    settings.manager.chunk_tokens = 2_048
    settings.manager.long_chunk = "refuse"
    settings.data.questions_per_chunk = CHUNK_QUESTIONS
    config = config_lib.parse(settings)
    parts = build.build(config)
    if given.workdir:
        build.use_checkpoint(parts, pathlib.Path(given.workdir))
    options = rollout_options(config, evaluation=True)
    ways = {
        "manager": baselines.manager(options, parts.players, (0, "chunking")),
        "rag": baselines.without_manager(baselines.chunks("lucene", 2), parts.environment, parts.answering.answer),
    }
    claims = []
    for source, read in (("locomo", conversations), ("squality", stories)):
        cut_text = input_pipeline.builder(source)._chunking.cut
        texts = read(given.source_dir, given.streams)
        streams = [stream for text in texts for stream in both_ways(text, source, cut_text)]
        asked = [sum(len(chunk.questions) for chunk in stream.chunks) for stream in streams[::2]]
        print(f"{source}: {len(asked)} texts, {sum(asked)} questions about chunks, "
              f"{sum(len(stream.questions) for stream in streams[::2])} at the end", flush=True)  # fmt: skip
        for name, method in ways.items():
            played = method([parts.environment.fit(stream) for stream in streams])
            claims += of_method(f"{source}, {name}", played)
    common.report("chunking", claims, ["flax"])


# What is measured of a text.
MEASURES: dict[str, Callable[[baselines.Result], float]] = {
    "chunk score": lambda one: _mean([a.score for answers in one.chunk_answers for a in answers]),
    "global score": lambda one: _mean([answer.score for answer in one.answers]),
    "memory tokens": lambda one: one.memory_tokens,
    "words of the longest chunk": lambda one: max(len(chunk.text.split()) for chunk in one.stream.chunks),
}


def of_method(name: str, played: Sequence[baselines.Result]) -> list[dict[str, Any]]:
    """Makes the claims of one method on one data set; every text was played in both ways, one after the other."""
    claims = []
    for measure, of in MEASURES.items():
        values = np.array([of(one) for one in played]).reshape(-1, 2)
        values = values[~np.isnan(values).any(1)]
        if len(values):
            for way, column in zip(WAYS, values.T, strict=True):
                claims.append(_claim(f"{name}, {measure}, {way}", column))
            claims.append(_claim(f"{name}, {measure}, adaptive - fixed", values[:, 1] - values[:, 0]))
    return claims


def _mean(values: Sequence[float | None]) -> float:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else float("nan")


def _claim(name: str, values: np.ndarray) -> dict[str, Any]:
    """Makes a claim whose value is a mean over texts, with its standard error."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    claim = common.claim(name, values.tolist(), "")
    return claim | {"value": float(np.mean(values)), "standard_error": error, "n": len(values)}


if __name__ == "__main__":
    main()
