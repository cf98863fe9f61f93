"""Everything a language model is told, in one place: the manager's and the reader's prompts.

A prompt is a list of chat messages whose parts are ordered from what most requests share to what fewest do:
instructions and worked examples (all requests), the chunk (the rollouts of a stream), the memory (one rollout).
Knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from finemem_jax.episode import Action, MemoryItem, Message, Operation

MANAGER_SYSTEM = """\
You keep the memory of an assistant, who must later answer questions from it alone. Read the new text and write what \
to change in the memory, one JSON call per line: memory_insert a new fact, memory_update a fact that has changed, \
memory_delete a fact that no longer holds, or skip when there is nothing to remember."""

# What the manager is shown, and what it should have written. The last one has an empty memory: a small model copies
# what stands nearest, and an UPDATE of an item that does not exist is its commonest mistake.
MANAGER_EXAMPLES = (
    (
        "[Day 6] Omar: What rain today!\n"
        "[Day 6] Priya: I left Lisbon, I live in Porto now. The audit is due on Friday.",
        ((1, "Priya lives in Lisbon."), (2, "Omar has a cat called Biscuit.")),
        (
            Operation(Action.UPDATE, "Priya lives in Porto.", 1),
            Operation(Action.INSERT, "The audit is due on Friday."),
        ),
    ),
    (
        "[Day 2] Diary of Nadia: It rained all day. I waited for the bus for ages. In the evening I practised the "
        'flute, as I do every day. The message "the door is stuck" got label 14.',
        (),
        (
            Operation(Action.INSERT, "Nadia plays the flute."),
            Operation(Action.INSERT, 'The message "the door is stuck" has label 14.'),
        ),
    ),
)

READER_SYSTEM = """\
You answer questions about notes. Reply with the exact words from the notes that answer the question, and \
nothing else."""

# No example answers "unknown": shown one such, a 135M reader answers it to nearly everything (BUILD_NOTES.md).
READER_EXAMPLES = (
    (("What a day.", "Priya: I live in Porto now."), "In which city does Priya live?", "Porto"),
    (
        ('The message "the door is stuck" has label 14.', "The audit is due on Friday."),
        'Which label did the message "the door is stuck" get?',
        "14",
    ),
)


def manager(
    chunk: str,
    items: Sequence[MemoryItem],
    num_hidden: int,
    num_examples: int,
    render: Callable[[Operation], str],
    system: str = MANAGER_SYSTEM,
) -> list[Message]:
    """The manager's prompt for one chunk.

    Args:
        chunk: c_t.
        items: The memory items that are shown.
        num_hidden: How many older ones are not; the prompt says so.
        num_examples: Worked examples, 0 to 2; the last so many of `MANAGER_EXAMPLES`.
        render: Writes an operation in the manager's wire format.
    """
    messages = [Message("system", (system,))]
    for text, shown, calls in MANAGER_EXAMPLES[len(MANAGER_EXAMPLES) - num_examples :]:
        memory = [MemoryItem(item_id, content, 0) for item_id, content in shown]
        messages.append(Message("user", (_chunk_part(text), _memory_part(memory, 0))))
        messages.append(Message("assistant", ("\n".join(map(render, calls)),)))
    return [*messages, Message("user", (_chunk_part(chunk), _memory_part(items, num_hidden)))]


def memory_line(item: MemoryItem) -> str:
    """How one item is shown: as JSON, so that a newline in its text cannot pass for another item."""
    return json.dumps({"id": item.item_id, "content": item.text}, ensure_ascii=False)


def _chunk_part(chunk):
    return f"New text:\n{chunk}\n\n"


def _memory_part(items, num_hidden):
    lines = [memory_line(item) for item in items] or ["(empty)"]
    if num_hidden:
        lines.insert(0, f"({num_hidden} older items are not shown)")
    return "Memory:\n" + "\n".join(lines)


def reader(evidence: Sequence[str], question: str, num_examples: int, system: str = READER_SYSTEM) -> list[Message]:
    """The reader's prompt for one question.

    Args:
        evidence: Texts of the retrieved memory items, best first.
        question: q_j.
        num_examples: Worked examples, 0 to 2.
    """
    messages = [Message("system", (system,))]
    for notes, asked, answer in READER_EXAMPLES[:num_examples]:
        messages += [Message("user", (_question_part(notes, asked),)), Message("assistant", (answer,))]
    return [*messages, Message("user", (_question_part(evidence, question),))]


def _question_part(evidence, question):
    notes = "\n".join(f"- {' '.join(text.split())}" for text in evidence) or "(none)"
    return f"Notes:\n{notes}\nQuestion: {question}"
