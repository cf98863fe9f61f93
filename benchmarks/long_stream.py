"""Reads a stream as long as MemoryAgentBench's: 400,000 tokens, 210 chunks, over 3,000 memory items.

    python benchmarks/long_stream.py [--view=both] [--chunks=210]

A scripted manager writes down what a chunk says, sentence by sentence, and now and then changes or deletes an item; so
what is measured is everything around a model: prompts within their budget, the memory, retrieval, questions after every
chunk. Tokens are SmolLM2's.

Memory is flat if little more is held after the stream than at its half: what the manager has written, with the memory's
state after each chunk. Counted is what Python has allocated (a process keeps what it once had, which hides growth), in
a run of its own, as counting makes everything slower.
"""

from __future__ import annotations

import gc
import json
import random
import re
import time
import tracemalloc
from collections.abc import Sequence

import _common as common

from experiments import smollm2_135m
from finemem_jax import build
from finemem_jax import config as config_lib
from finemem_jax.memory import build as memory_build
from finemem_jax.memory import retrieval
from finemem_jax.models.tokenizer import Tokenizer
from finemem_jax.reading.reader import Query
from finemem_jax.rl import rollout
from finemem_jax.rl.method import rollout_options
from finemem_jax.types import Chunk, Completion, Memory, MemoryItem, Question, Request, Stream, Trajectory

SENTENCES, WRITTEN = 118, 16  # Of a chunk.
VIEW_TOKENS, CHUNK_TOKENS, QUERIES = 2_048, 4_096, 5


def stream(num_chunks: int) -> Stream:
    """Makes sentences about made-up people, and questions that one of them answers."""
    rng = random.Random(0)
    chunks: list[Chunk] = []
    names = [f"{a}{b}{c}" for a in ("Ka", "Lo", "Mi", "Ru", "Se") for b in ("ra", "ne", "to", "vi") for c in "lmnst"]
    things = [f"{kind}{thing}" for kind in ("old ", "small ", "") for thing in ("lamp", "boat", "chair", "drum")]
    for t in range(num_chunks):
        said: list[str] = []
        for _ in range(SENTENCES):
            name, thing, price = rng.choice(names), rng.choice(things), rng.randint(100, 99_999)
            said.append(f"On day {t} {name} sold a {thing} to {rng.choice(names)} for {price} crowns.")
        asked = [
            Question(re.sub(r"for \d+ crowns\.", "for how many crowns?", one), (re.findall(r"\d+", one)[-1],))
            for one in rng.sample(said[:WRITTEN], QUERIES)
        ]
        chunks.append(Chunk(" ".join(said), tuple(asked)))
    return Stream("long", "made up", tuple(chunks), chunks[0].questions)


class Scripted:
    """Writes the first sentences of the chunk in its prompt, and touches some items that the prompt shows."""

    def __init__(self, tokens: Tokenizer):
        """Begins with nothing read."""
        self._tokens, self._rng = tokens, random.Random(1)
        self.longest = 0  # Prompt so far (tokens).
        self.megabytes: list[float] = []  # Allocated, before each chunk.

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """Answers as a sampler would."""
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Completion:
        self.longest = max(self.longest, len(request.prompt_ids))
        text = self._tokens.decode(request.prompt_ids)
        chunk = text.rpartition("New text:\n")[2].partition("\n\nMemory:")[0]
        shown = [int(number) for number in re.findall(r'\{"id": (\d+)', text.rpartition("Memory:\n")[2])]
        calls = [{"name": "memory_insert", "arguments": {"content": one}} for one in chunk.split(". ")[:WRITTEN]]
        if len(shown) > 3:
            changed, deleted = self._rng.sample(shown, 2)
            content = f"Changed to {self._rng.random()}"
            calls.append({"name": "memory_update", "arguments": {"id": changed, "content": content}})
            calls.append({"name": "memory_delete", "arguments": {"id": deleted}})
        ids = tuple(self._tokens.encode("\n".join(map(json.dumps, calls)))) + tuple(self._tokens.end_ids[:1])
        if tracemalloc.is_tracing():
            gc.collect()
            self.megabytes.append(tracemalloc.get_traced_memory()[0] / 1e6)
        return Completion(ids, (0.0,) * len(ids), "stop", 0)


def main() -> None:
    """Measures, and prints the claims."""
    parser = common.parser(__doc__, repeats=3)
    parser.add_argument("--view", default="both", choices=["recent", "retrieved", "both"])
    parser.add_argument("--chunks", type=int, default=210)
    arguments = parser.parse_args()
    settings = smollm2_135m.get_config()
    settings.memory.view, settings.memory.view_tokens = arguments.view, VIEW_TOKENS
    settings.manager.chunk_tokens, settings.rollout.max_new_tokens = CHUNK_TOKENS, 1_024
    config = config_lib.parse(settings)
    tokens = build.load(config).tokenizer
    environment = memory_build.environment(config, tokens)
    one = environment.fit(stream(arguments.chunks))
    policy = Scripted(tokens)

    def answer(queries: Sequence[Query]) -> list[str]:
        return [query.evidence[0] if query.evidence else "" for query in queries]

    def read_all() -> Trajectory:
        options, players = rollout_options(config, evaluation=True), rollout.Players(environment, policy, answer)
        ((found,),) = rollout.run([one], options, players, (0,))
        return found

    began = time.perf_counter()
    trajectory = read_all()
    seconds = time.perf_counter() - began
    # Again, with every allocation counted.
    tracemalloc.start()
    read_all()
    tracemalloc.stop()
    print(f"allocated, MB, at every tenth chunk: {[round(one, 1) for one in policy.megabytes[::10]]}")
    growth = policy.megabytes[-1] - policy.megabytes[len(one.chunks) // 2]
    items = trajectory.steps[-1].memory.items
    times = query_times(one, items, config.memory.top_k, repeats=arguments.repeats)
    empty = len(environment.observe(Chunk(""), Memory()).ids)
    longest = empty + CHUNK_TOKENS + VIEW_TOKENS + 64
    read = sum(environment.count_tokens(chunk.text) for chunk in one.chunks)
    scores = [answer.score or 0.0 for step in trajectory.steps for answer in step.answers]
    common.report(
        "long_stream",
        [
            common.claim("tokens read", [read], "tokens", target=400_000),
            common.claim("chunks", [len(one.chunks)], "", target=200),
            common.claim("memory items at the end", [len(items)], "", target=3_000),
            common.claim("longest prompt", [policy.longest], "tokens", target=longest, lower_is_better=True),
            common.claim("allocated in the second half and kept", [growth], "MB", target=20, lower_is_better=True),
            common.claim("a query at the end", times, "ms", target=5.0, lower_is_better=True),
            common.claim("all of it, without a model", [seconds], "s"),
            common.claim("chunk questions whose best item answers them", [sum(scores) / len(scores)], ""),
        ],
    )


def query_times(one: Stream, items: Sequence[MemoryItem], top_k: int, *, repeats: int) -> list[float]:
    """Times the retrieval for each chunk question from the whole memory (ms a question)."""
    index = retrieval.Index("lucene")
    index.update(items)
    questions = [question.text for chunk in one.chunks for question in chunk.questions]

    def ask() -> None:
        for text in questions:
            index.retrieve(text, top_k)

    return [1e3 * common.seconds(ask) / len(questions) for _ in range(repeats)]


if __name__ == "__main__":
    main()
