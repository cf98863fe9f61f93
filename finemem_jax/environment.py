"""What a manager sees and what its words do: chunk and memory to prompt, completion to the next memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from finemem_jax import memory as memory_lib
from finemem_jax import operations, prompts, tokenizer
from finemem_jax.episode import Chunk, Memory, Outcome, Stream
from finemem_jax.tokenizer import EncodedChat, Tokenizer


@dataclasses.dataclass(frozen=True)
class Environment:
    """The rules of the game, the same for every stream.

    Attributes:
        tokenizer: The manager's.
        num_examples: Worked examples in its prompt.
        view_tokens: Tokens of memory it is shown, newest items first.
        chunk_tokens: Longest chunk, in tokens.
        long_chunk: What happens to a longer one: "split" into several, or "refuse".
        repair_json: Whether json-repair may mend lines that strict parsing refuses.
    """

    tokenizer: Tokenizer
    num_examples: int
    view_tokens: int
    chunk_tokens: int
    long_chunk: str
    repair_json: bool

    def observe(self, chunk: Chunk, memory: Memory) -> EncodedChat:
        """The manager's prompt for a chunk, given M_{t-1}."""
        shown = self._view(memory)
        hidden = len(memory.items) - len(shown)
        messages = prompts.manager(chunk.text, shown, hidden, self.num_examples, operations.render)
        return tokenizer.encode_chat(self.tokenizer, messages)

    def act(self, memory: Memory, completion_ids: Sequence[int], step: int) -> tuple[Memory, tuple[Outcome, ...]]:
        """M_t = 𝒯(M_{t-1}, P_t). Total: whatever the manager wrote, this returns."""
        text = self.tokenizer.decode(tokenizer.strip_end(self.tokenizer, completion_ids))
        return memory_lib.apply(memory, operations.parse(text, self.repair_json), step)

    def count_tokens(self, text: str) -> int:
        """Length of a text in the manager's tokens; what r_comp is measured in."""
        return len(self.tokenizer.encode(text))

    def memory_tokens(self, memory: Memory) -> int:
        """tokens(M): the items' texts, without ids and punctuation around them."""
        return sum(self.count_tokens(item.text) for item in memory.items)

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

        def moved(question):
            steps = []
            for step in question.gold_steps:
                candidates = range(first_piece[step], ends[step])
                holding = [i for i in candidates if _holds(pieces[i].text, question)]
                steps += holding[:1] or candidates
            return dataclasses.replace(question, gold_steps=tuple(dict.fromkeys(steps)))

        # Gold steps count chunks, and the chunks have just been renumbered.
        chunks = tuple(dataclasses.replace(p, questions=tuple(map(moved, p.questions))) for p in pieces)
        return dataclasses.replace(stream, chunks=chunks, questions=tuple(map(moved, stream.questions)))

    def _split(self, chunk):
        """Cuts between words so that every piece fits; a single word longer than the budget is cut inside."""
        texts, rest = [], _words_with_space(chunk.text)
        while rest:
            count = self._largest(lambda n, words=rest: "".join(words[:n]), len(rest))
            if count == 0:
                word, rest = rest[0], rest[1:]
                cut = max(1, self._largest(lambda n, word=word: word[:n], len(word)))
                texts.append(word[:cut])
                rest = [word[cut:], *rest] if word[cut:] else rest
            else:
                texts.append("".join(rest[:count]))
                rest = rest[count:]
        texts = [text.strip() for text in texts if text.strip()] or [""]
        questions: list[list] = [[] for _ in texts]
        for question in chunk.questions:
            home = next((i for i, text in enumerate(texts) if _holds(text, question)), len(texts) - 1)
            questions[home].append(question)
        return [Chunk(text, tuple(asked)) for text, asked in zip(texts, questions, strict=True)]

    def _largest(self, text_of, most):
        """The largest n for which text_of(n) fits, by bisection: encoding every prefix would take quadratic time."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.count_tokens(text_of(middle)) <= self.chunk_tokens:
                low = middle
            else:
                high = middle - 1
        return low

    def _view(self, memory):
        """The newest items that fit the budget, oldest first."""
        shown, left = [], self.view_tokens
        for item in reversed(memory.items):
            left -= self.count_tokens(prompts.memory_line(item)) + 1
            if left < 0:
                break
            shown.append(item)
        return shown[::-1]


def _holds(text, question):
    return any(answer.lower() in text.lower() for answer in question.answers)


def _words_with_space(text):
    """Words, each with the white space that follows it, so that joining them gives the text back."""
    words, start = [], 0
    for end in range(1, len(text) + 1):
        if end == len(text) or (text[end - 1].isspace() and not text[end].isspace()):
            words.append(text[start:end])
            start = end
    return words
