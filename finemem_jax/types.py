"""Defines the plain values that all rooms pass around: streams, memory, operations, requests, trajectories.

Plain immutable Python. Nothing here knows of arrays, tokenizers or models.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

# --------------------------------------------------------------------------------------
# What is read
# --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its accepted answers.

    Attributes:
        text: The question; what memories are searched for.
        answers: Gold answers; any one of them counts. Never empty.
        metric: Name of the scoring rule, a key of `scoring.METRICS` or one of `scoring.JUDGED`. Some rules read the
            first of the answers only, or all of them together.
        gold_steps: Chunks (0-based) that state what the answer needs; () when unknown.
        kind: What the question tests, e.g. "latest_value"; for reports, and for judges (LongMemEval's types).
        choices: All answers that are possible, e.g. the labels of a classification; () for an open question.
        instruction: How it is to be answered; the reader sees it before the question, and no memory is searched for it.
    """

    text: str
    answers: tuple[str, ...]
    metric: str = "substring"
    gold_steps: tuple[int, ...] = ()
    kind: str = ""
    choices: tuple[str, ...] = ()
    instruction: str = ""

    @property
    def prompt(self) -> str:
        """The question as the reader sees it."""
        return f"{self.instruction}\n{self.text}" if self.instruction else self.text


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One piece of a stream, with the questions that it alone can answer (CSR's)."""

    text: str
    questions: tuple[Question, ...] = ()


@dataclasses.dataclass(frozen=True)
class Stream:
    """One example: chunks in order, and the global questions asked after the last of them.

    Attributes:
        stream_id: Unique within a data source and split; goes into logs and random keys.
        source: Name of the data source, e.g. "synthetic".
        chunks: c_1 … c_T; T >= 1.
        questions: The global questions. May be empty: r_global and EARA are then 0.
        competency: "AR" (accurate retrieval), "TTL" (test-time learning), "LRU" (long-range
            understanding), "CR" (conflict resolution) or "" when mixed.
    """

    stream_id: str
    source: str
    chunks: tuple[Chunk, ...]
    questions: tuple[Question, ...] = ()
    competency: str = ""

    def __post_init__(self) -> None:
        if not self.chunks:
            raise ValueError(
                f"Stream {self.stream_id!r} of source {self.source!r} has no chunks; a stream needs at least one. "
                "Remove it from the data, or give it text."
            )


class StreamSource(Protocol):
    """Random access to streams; what a builder in `data/` returns and Grain reads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Stream: ...


@dataclasses.dataclass(frozen=True)
class StreamSpec:
    """How a builder in `data/` is asked for streams.

    Attributes:
        split: "train" or "test", which never share text, and where the source allows, entities; or "all" for both.
        seed: Seed of every random choice of the builder.
        num_streams: How many streams are wanted; 0 means all that the source holds.
        chunks_per_stream: T, the number of chunks (the last stream of a text may have fewer).
        chunk_words: Budget of one chunk in whitespace-separated words.
        questions_per_chunk: K_c, at most so many questions are kept for each chunk.
        questions_per_stream: At most so many global questions are kept.
        source_dir: Folder of the original files, for builders that read some.
        style: "plain" (texts as they are) or "memalpha" (gathered and framed as Mem-alpha's streams are); builders that
            know one style only take no notice.
        chunking: How running text is cut into chunks: "fixed", "sentence" or "adaptive" (see data/_chunking.py).
        rules: How published data sets are scored: "ours", "published", "published_training" (see `dataset_metrics`).
    """

    split: str
    seed: int
    num_streams: int
    chunks_per_stream: int
    chunk_words: int
    questions_per_chunk: int
    questions_per_stream: int
    source_dir: str = ""
    style: str = "plain"
    chunking: str = "sentence"
    rules: str = "ours"


@dataclasses.dataclass(frozen=True)
class Message:
    """One chat message. `parts` are encoded apart, so that prompts which share a part share its token ids."""

    role: str
    parts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Chat:
    """A chat that a language model is to go on with; text in and text out, whoever serves it.

    Attributes:
        max_new_tokens: Longest reply, in the model's own tokens.
        temperature: 0 means greedy.
        seed: Tells repetitions of a chat apart: another seed, another draw.
    """

    messages: tuple[Message, ...]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


# --------------------------------------------------------------------------------------
# What is written
# --------------------------------------------------------------------------------------


# The parts of Mem-alpha's typed memory: one running summary, facts, dated events.
CORE, SEMANTIC, EPISODIC = MEMORY_TYPES = ("core", "semantic", "episodic")


class Action(enum.Enum):
    """The four operations a manager can write."""

    INSERT = "memory_insert"
    UPDATE = "memory_update"
    DELETE = "memory_delete"
    SKIP = "skip"


@dataclasses.dataclass(frozen=True)
class Operation:
    """One well-formed operation.

    Attributes:
        content: Set for INSERT and UPDATE.
        item_id: Set for UPDATE and DELETE; None for those of the core memory, of which there is one.
        memory_type: One of `MEMORY_TYPES` in a typed memory, "" in a flat one.
    """

    action: Action
    content: str = ""
    item_id: int | None = None
    memory_type: str = ""


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A line that is no operation: what was written, and why it was refused. Data, not an error."""

    text: str
    reason: str


class Status(enum.Enum):
    """What became of one written operation."""

    APPLIED = "applied"
    DUPLICATE = "duplicate"  # INSERT of a text that the memory already holds; changes nothing
    UNKNOWN_ID = "unknown_id"  # UPDATE or DELETE of an item that does not exist; changes nothing
    MALFORMED = "malformed"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One written operation, and what became of it.

    Attributes:
        item_id: The item it inserted, updated or deleted; None where nothing changed.
        previous: That item as it stood before an UPDATE or DELETE; None otherwise.
    """

    operation: Operation | Malformed
    status: Status
    item_id: int | None = None
    previous: MemoryItem | None = None

    @property
    def valid(self) -> bool:
        """Whether it counts as valid for r_fmt: well-formed, and it named what exists."""
        return self.status is Status.APPLIED


@dataclasses.dataclass(frozen=True)
class MemoryItem:
    """One stored text.

    Attributes:
        source_step: φ(m): the step (0-based) that last wrote it.
        source_operation: Which of the operations written at that step did so (0-based, malformed ones counted).
        memory_type: One of `MEMORY_TYPES` in a typed memory, "" in a flat one.
    """

    item_id: int
    text: str
    source_step: int
    source_operation: int = 0
    memory_type: str = ""


@dataclasses.dataclass(frozen=True)
class Memory:
    """M_t: the items in order of insertion, and the id that the next INSERT will get."""

    items: tuple[MemoryItem, ...] = ()
    next_id: int = 1


# --------------------------------------------------------------------------------------
# What happened
# --------------------------------------------------------------------------------------


class Matcher(Protocol):
    """Follows one completion, and says which tokens may come next."""

    def mask(self) -> np.ndarray:
        """[⌈V / 32⌉] uint32: bit v % 32 of word v // 32 is set if token v may be next. At least one is."""
        ...

    def advance(self, token: int, /) -> None:
        """Takes the token that came."""
        ...


class Constraint(Protocol):
    """Something that completions must keep to."""

    def start(self) -> Matcher:
        """A completion that has not begun."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to complete.

    Attributes:
        prompt_ids: Token ids.
        cuts: Ends of the prompt's parts (see `tokenizer.EncodedChat`): of the shared prefix, of the group prefix where
            there is one, and of the whole.
        max_new_tokens: At least 1.
        temperature: 0 means greedy.
        top_k, top_p: Which tokens may be drawn; see `token_sampling.SamplingParams`.
        key: Two uint32 of random key. The completion depends on the prompt and on this alone.
        constraint: What the completion must keep to; None for nothing. The host then looks at every token, which makes
            all requests served at the same time slower.
    """

    prompt_ids: tuple[int, ...]
    cuts: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    key: tuple[int, int]
    top_k: int = 0
    top_p: float = 1.0
    constraint: Constraint | None = None

    @property
    def shared_prefix(self) -> tuple[int, ...]:
        """What many requests begin with: the instructions."""
        return self.prompt_ids[: self.cuts[0]]

    @property
    def group_prefix(self) -> tuple[int, ...]:
        """What the requests of a group go on with: the chunk. Empty where the prompt has two parts only."""
        return self.prompt_ids[self.cuts[0] : self.cuts[1]] if len(self.cuts) > 2 else ()

    @property
    def suffix(self) -> tuple[int, ...]:
        """The request's own part."""
        return self.prompt_ids[self.cuts[0] + len(self.group_prefix) :]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a sampler returns for one request.

    Attributes:
        ids: Sampled token ids, the end-of-turn token included when it was sampled.
        log_probs: log of each id's probability, in nats, in the distribution it was drawn from: at the request's
            temperature, of the tokens that its constraint allows, after top-k and top-p.
        finish_reason: "stop" (an end token was sampled) or "length".
        policy_version: Number of updates behind the weights that sampled it.
        raw_log_probs: Like `log_probs`, but in the model's own distribution: at temperature 1, all tokens allowed.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: str
    policy_version: int
    raw_log_probs: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What a sampler returns for a request that it cannot serve: why, and what to change."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """How likely a model finds the gold answer to a question, given some evidence.

    Attributes:
        log_prob: ℓ, mean over the answer's tokens of their log-probability, in nats; of several gold answers the
            greatest.
        greedy: Whether greedy decoding would give a gold answer, token for token.
        closed: Probability of the gold answer among a closed set of answers; None where there is no such set.
    """

    log_prob: float
    greedy: bool
    closed: float | None = None

    @property
    def value(self) -> float:
        """In [0, 1]: `closed`, or else p = exp ℓ."""
        return math.exp(self.log_prob) if self.closed is None else self.closed


@dataclasses.dataclass(frozen=True)
class Answer:
    """A reader's answer to one question, with the evidence it was shown and its score in [0, 1].

    Attributes:
        text: "" where no answer was generated.
        score: None where no answer was generated, or a judge came to no verdict about it.
        cited: For each item of the evidence whether the answer rests on it; () where nobody asked.
        likelihood: Of the gold answer, given the same evidence; None where nobody asked.
    """

    question: Question
    evidence: tuple[MemoryItem, ...]
    text: str
    score: float | None
    cited: tuple[bool, ...] = ()
    likelihood: Likelihood | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """One chunk of one rollout: what the manager saw, wrote and caused.

    Attributes:
        prompt_ids: Token ids of the manager's prompt.
        prompt_cuts: Ends (exclusive) of the prompt's parts, ordered from most to least shared.
        completion: The sampled response P_t.
        outcomes: Its operations, parsed and applied, in the order written.
        memory: M_t, after the operations.
        token_operations: For each token of the response the operation it belongs to, an index into `outcomes`; -1
            for tokens of none (blank lines, text between calls, the end-of-turn token).
        answers: To the chunk's own questions, from M_t.
        verdicts: For each outcome whether a content judge found it worth keeping, None where it gave no verdict or
            was not asked; () without a judge.
    """

    prompt_ids: tuple[int, ...]
    prompt_cuts: tuple[int, ...]
    completion: Completion
    outcomes: tuple[Outcome, ...]
    memory: Memory
    token_operations: tuple[int, ...] = ()
    answers: tuple[Answer, ...] = ()
    verdicts: tuple[bool | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Game:
    """One question as a game among operations: its score for every set of them that could have been written.

    Attributes:
        players: (step, operation) of each.
        scores: Of all 2^P coalitions; that of coalition C stands at Σ_{p in C} 2^p.
    """

    players: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Probes:
    """Scores of the global questions under other memories than M_T; what some credit rules need beyond the answers.

    They are scores of generated answers, or all of them likelihoods (`Likelihood.value`).

    Attributes:
        full: Of each question with all of its evidence, where `without` is of another kind than the answers' scores;
            () if not asked.
        empty: Of each question, answered from the empty memory; () if not asked.
        states: Of each question after each operation of each step; () if not asked.
        without: Of each question without each item of its evidence; () if not asked.
        games: One for each question; () if not asked.
    """

    full: tuple[float, ...] = ()
    empty: tuple[float, ...] = ()
    states: tuple[tuple[tuple[float, ...], ...], ...] = ()
    without: tuple[tuple[float, ...], ...] = ()
    games: tuple[Game, ...] = ()


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One rollout of one stream: its steps, and the answers to the global questions from M_T."""

    stream: Stream
    rollout: int
    steps: tuple[Step, ...]
    answers: tuple[Answer, ...] = ()
    probes: Probes = dataclasses.field(default_factory=Probes)


def random_key(*parts: int | str | bytes) -> tuple[int, int]:
    """A random key that depends on these parts alone: the same on every machine and after every restart."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def to_json(value: Any) -> Any:
    """Turns nouns into what `json.dumps` takes: dataclasses to dicts, enums to values, tuples to lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_json(item) for item in value]
    return value
