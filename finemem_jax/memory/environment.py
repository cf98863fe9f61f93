"""Turns chunk and memory into the manager's prompt, and its completion into the next memory."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence

from finemem_jax.memory import operations, prompts, transition
from finemem_jax.memory.operations import Dialect
from finemem_jax.models import tokenizer
from finemem_jax.models.tokenizer import EncodedChat, Tokenizer
from finemem_jax.types import (
    CORE,
    Action,
    Chunk,
    Malformed,
    Memory,
    MemoryItem,
    Message,
    Operation,
    Outcome,
    Question,
    Stream,
)

VIEWS = ("recent", "retrieved", "both")
# Finds the items of a memory that are most like a text, best first.
SearchFn = Callable[[str], Sequence[MemoryItem]]


@dataclasses.dataclass(frozen=True)
class Environment:
    """The rules of the game, the same for every stream.

    Attributes:
        tokenizer: The manager's.
        num_examples: Worked examples in its prompt.
        view_tokens: Tokens of memory it is shown: the core memory, then items by the rule of `view`.
        chunk_tokens: Longest chunk, in tokens.
        long_chunk: What happens to a longer one: "split" into several, or "refuse".
        repair_json: Whether json-repair may mend calls that strict parsing refuses.
        dialect: Layout of the memory, and how calls are written.
        view_items: At most so many items of each type are shown; 0 means no such limit.
        core_tokens: Longest core memory, in tokens; a longer update is shortened, and says so.
        view: Which items are shown: the newest ones ("recent"), those most like the chunk ("retrieved"), or half of
            each ("both"); the prompt says how many are not.
        budget_tokens: Longest memory, in tokens; 0 means no limit. After a step that exceeds it items go by the rule of
            `eviction` (`transition.evict`), which the manager is told.
        task: What the manager is told to do, in place of our own words, if not empty; how calls are written is not part
            of it, except in the flat layout's JSON lines.

    Raises:
        ValueError: the core memory would have no room but for the mark of shortening.
    """

    tokenizer: Tokenizer
    num_examples: int
    view_tokens: int
    chunk_tokens: int
    long_chunk: str
    repair_json: bool
    dialect: Dialect = operations.DEFAULT
    view_items: int = 0
    core_tokens: int = 512
    task: str = ""
    view: str = "recent"
    budget_tokens: int = 0
    eviction: str = "oldest"

    def __post_init__(self):
        if self.view not in VIEWS:
            raise ValueError(f"memory.view must be one of {', '.join(VIEWS)}, got {self.view!r}.")
        if self.eviction not in transition.EVICTIONS:
            raise ValueError(
                f"memory.eviction must be one of {', '.join(transition.EVICTIONS)}, got {self.eviction!r}."
            )
        if self.dialect.layout == "typed" and not self._core_fits(f"…{self._mark}"):
            raise ValueError(
                f"memory.core_tokens is {self.core_tokens} and memory.view_tokens is {self.view_tokens}: the mark of a "
                "shortened core memory alone takes more; raise the smaller one."
            )

    def observe(self, chunk: Chunk, memory: Memory, search: SearchFn | None = None) -> EncodedChat:
        """Returns the manager's prompt for a chunk, given M_{t-1}.

        Args:
            search: Searches that memory; views other than "recent" need it. Without it all is hidden that they would
                have found.
        """
        return tokenizer.encode_chat(self.tokenizer, self.messages(chunk, memory, search))

    def messages(self, chunk: Chunk, memory: Memory, search: SearchFn | None = None) -> list[Message]:
        """Returns the same in words."""
        found = search(chunk.text) if search is not None and self.view != "recent" else ()
        return self._prompt.messages(chunk.text, *self._view(memory, found))

    def act(
        self, memory: Memory, completion_ids: Sequence[int], step: int
    ) -> tuple[Memory, tuple[Outcome, ...], tuple[int, ...]]:
        """Applies a completion: M_t = 𝒯(M_{t-1}, P_t). Total: whatever the manager wrote, this returns.

        Returns:
            M_t; what became of each operation; and for each token of the completion the operation that it belongs to,
            an index into the outcomes: the one in whose span it starts, or -1 where it starts in none.
        """
        ids = tokenizer.strip_end(self.tokenizer, completion_ids)
        text = self.tokenizer.decode(ids)
        written = operations.parse(text, self.repair_json, self.dialect)
        after, outcomes = transition.apply(memory, [self._within_core(operation) for operation in written], step)
        if self.budget_tokens:
            after = transition.evict(after, self.budget_tokens, self._length, self.eviction)
        owners = _owners(tokenizer.character_starts(self.tokenizer, ids), operations.spans(text, self.dialect))
        return after, outcomes, (*owners, *[-1] * (len(completion_ids) - len(ids)))

    def count_tokens(self, text: str) -> int:
        """Returns the length of a text in the manager's tokens; what r_comp is measured in."""
        return len(self.tokenizer.encode(text))

    def memory_tokens(self, memory: Memory) -> int:
        """Returns tokens(M): the items' texts, without ids and punctuation around them."""
        return sum(self._length(item.text) for item in memory.items)

    def fit(self, stream: Stream) -> Stream:
        """Makes every chunk fit `chunk_tokens`.

        A split chunk's questions go to the piece that holds their answer, or to the last one.

        Raises:
            ValueError: a chunk is too long and `long_chunk` is "refuse".
        """
        if all(self.count_tokens(chunk.text) <= self.chunk_tokens for chunk in stream.chunks):
            return stream
        pieces: list[Chunk] = []
        first_piece: list[int] = []
        for index, chunk in enumerate(stream.chunks):
            first_piece.append(len(pieces))
            length = self.count_tokens(chunk.text)
            if length <= self.chunk_tokens:
                pieces.append(chunk)
            elif self.long_chunk == "refuse":
                raise ValueError(
                    f"Chunk {index} of stream {stream.stream_id!r} has {length} tokens, but manager.chunk_tokens is "
                    f"{self.chunk_tokens}; raise it, lower data.chunk_words, or set manager.long_chunk='split'."
                )
            else:
                pieces += self._split(chunk)
        ends = [*first_piece[1:], len(pieces)]

        def moved(question: Question) -> Question:
            steps: list[int] = []
            for step in question.gold_steps:
                candidates = range(first_piece[step], ends[step])
                holding = [i for i in candidates if _holds(pieces[i].text, question)]
                steps += holding[:1] or candidates
            return dataclasses.replace(question, gold_steps=tuple(dict.fromkeys(steps)))

        # Gold steps count chunks, and the chunks have just been renumbered.
        chunks = tuple(dataclasses.replace(p, questions=tuple(map(moved, p.questions))) for p in pieces)
        return dataclasses.replace(stream, chunks=chunks, questions=tuple(map(moved, stream.questions)))

    def _split(self, chunk: Chunk) -> list[Chunk]:
        """Cuts between words so that every piece fits; a single word longer than the budget is cut inside."""
        texts, rest = [], _words_with_space(chunk.text)
        while rest:
            count = _largest(lambda n, words=rest: self._chunk_fits("".join(words[:n])), len(rest), self.chunk_tokens)
            if count == 0:
                word, rest = rest[0], rest[1:]
                cut = max(1, _largest(lambda n, word=word: self._chunk_fits(word[:n]), len(word)))
                texts.append(word[:cut])
                rest = [word[cut:], *rest] if word[cut:] else rest
            else:
                texts.append("".join(rest[:count]))
                rest = rest[count:]
        texts = [text.strip() for text in texts if text.strip()] or [""]
        questions: list[list[Question]] = [[] for _ in texts]
        for question in chunk.questions:
            home = next((i for i, text in enumerate(texts) if _holds(text, question)), len(texts) - 1)
            questions[home].append(question)
        return [Chunk(text, tuple(asked)) for text, asked in zip(texts, questions, strict=True)]

    def _chunk_fits(self, text: str) -> bool:
        return self.count_tokens(text) <= self.chunk_tokens

    def _view(self, memory: Memory, found: Sequence[MemoryItem]) -> tuple[list[MemoryItem], collections.Counter[str]]:
        """Chooses the items shown, oldest first, and counts how many of each type are hidden.

        Of "recent" ones no newer one is hidden: "older items are not shown" would be wrong of a view with holes.
        """
        cores = [item for item in memory.items if item.memory_type == CORE]
        others = [item for item in memory.items if item.memory_type != CORE]
        left = self.view_tokens - sum(map(self._line_tokens, cores))
        count: collections.Counter[str] = collections.Counter()
        shown: dict[int, MemoryItem] = {}

        def show(items: Sequence[MemoryItem], room: int, stops: bool) -> int:
            """Shows what fits; where `stops`, until the first that does not. Returns the room that is left."""
            for item in items:
                if item.item_id in shown or (self.view_items and count[item.memory_type] == self.view_items):
                    continue
                length = self._line_tokens(item)
                if length > room:
                    if stops:
                        break
                    continue
                room -= length
                shown[item.item_id] = item
                count[item.memory_type] += 1
            return room

        found = [item for item in found if item.memory_type != CORE]
        newest = others[::-1]
        if self.view == "recent":
            show(newest, left, stops=True)
        elif self.view == "retrieved":
            show(found, left, stops=False)
        else:
            half = left // 2
            left = left - half + show(found, half, stops=False)
            left = show(newest, left, stops=True)
            show(found, left, stops=False)
        hidden = collections.Counter(item.memory_type for item in others)
        hidden.subtract(count)
        return [*cores, *sorted(shown.values(), key=lambda item: item.item_id)], hidden

    def _line_tokens(self, item: MemoryItem) -> int:
        return self._length(prompts.memory_line(item)) + 1  # The newline.

    @functools.cached_property
    def _length(self) -> Callable[[str], int]:
        # `count_tokens` of what a memory holds, which is looked at in every step.
        return functools.lru_cache(100_000)(self.count_tokens)

    @functools.cached_property
    def _prompt(self) -> prompts.ManagerPrompt:
        limit = prompts.memory_limit(self.budget_tokens, self.eviction) if self.budget_tokens else ""
        hidden_name = "older items" if self.view == "recent" else "other items"
        return prompts.ManagerPrompt(self.dialect, self.num_examples, self.task, limit, hidden_name)

    def _within_core(self, operation: Operation | Malformed) -> Operation | Malformed:
        """Shortens what is written into the core memory, by whole words where it can, and marks that it did."""
        if not (isinstance(operation, Operation) and operation.action is Action.UPDATE):
            return operation
        if operation.memory_type != CORE or self._core_fits(operation.content):
            return operation
        words = _words_with_space(operation.content)
        count = _largest(lambda n: self._core_fits(self._marked("".join(words[:n]))), len(words))
        kept = "".join(words[:count])
        if not count:  # One endless word.
            kept = words[0][: _largest(lambda n: self._core_fits(self._marked(words[0][:n])), len(words[0]))]
        return dataclasses.replace(operation, content=self._marked(kept))

    @property
    def _mark(self) -> str:
        return f"[shortened to {self.core_tokens} tokens]"

    def _marked(self, text: str) -> str:
        return f"{text.rstrip()} {self._mark}".strip()

    def _core_fits(self, text: str) -> bool:
        # The prompt shows it as JSON, which takes more tokens, and shows it in full.
        line = self._line_tokens(MemoryItem(1, text, 0, 0, CORE))
        return self.count_tokens(text) <= self.core_tokens and line <= self.view_tokens


def _largest(fits: Callable[[int], bool], most: int, likely: int | None = None) -> int:
    """Finds the largest n in [0, most] for which fits(n), by bisection: encoding every prefix takes quadratic time.

    Args:
        likely: About how large it may be at most. What lies far beyond is not looked at: that would be encoding the
            rest of a book for every piece of it.
    """
    low, high = 0, most if likely is None else min(most, likely)
    while high < most and fits(high):
        low, high = high, min(2 * high, most)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _owners(starts: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Finds for each token that starts at a character the span that it starts in, or -1."""
    firsts = [first for first, _ in spans]
    places = (bisect.bisect_right(firsts, start) - 1 for start in starts)
    return [i if i >= 0 and start < spans[i][1] else -1 for i, start in zip(places, starts, strict=True)]


def _holds(text: str, question: Question) -> bool:
    return any(answer.lower() in text.lower() for answer in question.answers)


def _words_with_space(text: str) -> list[str]:
    """Splits into words, each with the white space that follows it, so that joining them gives the text back."""
    words, start = [], 0
    for end in range(1, len(text) + 1):
        if end == len(text) or (text[end - 1].isspace() and not text[end].isspace()):
            words.append(text[start:end])
            start = end
    return words
