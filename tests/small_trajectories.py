"""Trajectories small enough to work out by hand, for the tests of what is made of them.

Everything has a default, so that a test spells out only what it is about.
"""

from collections.abc import Sequence

from finemem_jax.memory.environment import Environment
from finemem_jax.models.tokenizer import ByteTokenizer
from finemem_jax.types import (
    Action,
    Answer,
    Chunk,
    Completion,
    Likelihood,
    Malformed,
    Memory,
    MemoryItem,
    Operation,
    Outcome,
    Probes,
    Question,
    Status,
    Step,
    Stream,
    Trajectory,
)

TOKENS = ByteTokenizer()
ENVIRONMENT = Environment(
    TOKENS, num_examples=0, view_tokens=400, chunk_tokens=900, long_chunk="split", repair_json=False
)

SKIP = Outcome(Operation(Action.SKIP), Status.APPLIED)
MALFORMED = Outcome(Malformed("?", "not JSON"), Status.MALFORMED)
NO_PROBES = Probes()


def item(step: int = 0, operation: int = 0, text: str = "m", item_id: int = 1, memory_type: str = "") -> MemoryItem:
    """An item that this operation of this step last wrote."""
    return MemoryItem(item_id, text, step, operation, memory_type)


def items(*writers: tuple[int, int]) -> tuple[MemoryItem, ...]:
    """One item for each (step, operation) that wrote it."""
    return tuple(item(*writer, item_id=i) for i, writer in enumerate(writers, start=1))


def inserted(text: str = "m", item_id: int = 1, memory_type: str = "") -> Outcome:
    """An INSERT that took effect."""
    return Outcome(Operation(Action.INSERT, text, None, memory_type), Status.APPLIED, item_id)


def updated(previous: MemoryItem, text: str) -> Outcome:
    """An UPDATE of an item that took effect."""
    operation = Operation(Action.UPDATE, text, previous.item_id, previous.memory_type)
    return Outcome(operation, Status.APPLIED, previous.item_id, previous)


def deleted(previous: MemoryItem) -> Outcome:
    """A DELETE of an item that took effect."""
    operation = Operation(Action.DELETE, "", previous.item_id, previous.memory_type)
    return Outcome(operation, Status.APPLIED, previous.item_id, previous)


def answer(
    score: float | None,
    evidence: Sequence[MemoryItem] = (),
    kind: str = "",
    gold_steps: tuple[int, ...] = (),
    cited: tuple[bool, ...] = (),
    likelihood: Likelihood | None = None,
) -> Answer:
    """An answer of this score."""
    question = Question("q", ("a",), gold_steps=gold_steps, kind=kind)
    return Answer(question, tuple(evidence), "a", score, cited, likelihood)


def answers(*scores: float, kind: str = "") -> tuple[Answer, ...]:
    """Answers of these scores, without evidence."""
    return tuple(answer(score, kind=kind) for score in scores)


def step(
    outcomes: Sequence[Outcome] = (),
    answers: Sequence[Answer] = (),
    memory: Sequence[MemoryItem] = (),
    response: str = "A",
    **fields,
) -> Step:
    """A step that wrote `response`, an end token after it; it need not say what the outcomes are of."""
    ids = (*TOKENS.encode(response), *TOKENS.end_ids)
    completion = Completion(ids, (-0.5,) * len(ids), "stop", 0)
    return Step((1, 2), (1, 2), completion, tuple(outcomes), Memory(tuple(memory)), answers=tuple(answers), **fields)


def trajectory(
    steps: Sequence[Step],
    answers: Sequence[Answer] = (),
    rollout: int = 0,
    chunks: Sequence[str] = (),
    name: str = "s",
    probes: Probes = NO_PROBES,
) -> Trajectory:
    """A rollout of a stream called `name`.

    Args:
        chunks: The stream's texts; "c" for each step unless given.
    """
    stream = Stream(name, "made up", tuple(map(Chunk, chunks or ["c"] * len(steps))))
    return Trajectory(stream, rollout, tuple(steps), tuple(answers), probes)
