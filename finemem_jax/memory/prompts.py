"""Writes the manager's prompts: its task, how calls are written, worked examples, the chunk and the memory.

A prompt is a list of chat messages whose parts are ordered from what most requests share to what fewest do:
instructions and worked examples (all requests), the chunk (the rollouts of a stream), the memory (one rollout).
Knows nothing of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from finemem_jax.memory import operations
from finemem_jax.memory.operations import Dialect
from finemem_jax.types import CORE, EPISODIC, MEMORY_TYPES, SEMANTIC, Action, MemoryItem, Message, Operation

MANAGER_SYSTEM = """\
You keep the memory of an assistant, who must later answer questions from it alone. Read the new text and write what \
to change in the memory, one JSON call per line: memory_insert a new fact, memory_update a fact that has changed, \
memory_delete a fact that no longer holds, or skip when there is nothing to remember."""

# The same for tool-call formats whose own section says how calls are written.
FLAT_TASK = """\
You keep the memory of an assistant, who must later answer questions from it alone. Read the new text and change the \
memory by function calls: memory_insert a new fact, memory_update a fact that has changed, memory_delete a fact that \
no longer holds, or skip when there is nothing to remember. This is your only reply to this text, so make all calls \
now."""

TYPED_TASK = """\
You keep the memory of an assistant, who must later answer questions from it alone. Read the new text and change the \
memory by function calls. The memory has three parts:
- core_memory is one short text: who the user is, what a book has told so far, or what each label means. Updating it \
replaces all of it.
- semantic_memory holds facts, one in each item: what is true, what a word means, how something is done, which label \
a sample got.
- episodic_memory holds events, one in each item: what somebody did or said, always with its time.
Insert what is new, update what has changed, delete what no longer holds. This is your only reply to this text, so \
make all calls now. When there is nothing to remember, reply Done."""

_TYPED_JSON_LINES = """\
Write one JSON call per line:
{"name": "new_memory_insert", "arguments": {"memory_type": "semantic_memory", "content": "..."}}
{"name": "memory_update", "arguments": {"memory_type": "core_memory", "new_content": "..."}}
{"name": "memory_update", "arguments": {"memory_type": "semantic_memory", "new_content": "...", "memory_id": 1}}
{"name": "memory_delete", "arguments": {"memory_type": "episodic_memory", "memory_id": 1}}"""

# A chunk, the memory items that the manager is shown, and what it should have written.
Example = tuple[str, tuple[MemoryItem, ...], tuple[Operation, ...]]

# The worked examples. The last one has an empty memory: a small model copies
# what stands nearest, and an UPDATE of an item that does not exist is its commonest mistake.
MANAGER_EXAMPLES: tuple[Example, ...] = (
    (
        "[Day 6] Omar: What rain today!\n"
        "[Day 6] Priya: I left Lisbon, I live in Porto now. The audit is due on Friday.",
        (MemoryItem(1, "Priya lives in Lisbon.", 0), MemoryItem(2, "Omar has a cat called Biscuit.", 0)),
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

TYPED_EXAMPLES: tuple[Example, ...] = (
    (
        MANAGER_EXAMPLES[0][0],
        (
            MemoryItem(1, "Omar and Priya are colleagues.", 0, 0, CORE),
            MemoryItem(2, "Priya lives in Lisbon.", 0, 1, SEMANTIC),
            MemoryItem(3, "Omar has a cat called Biscuit.", 0, 2, SEMANTIC),
        ),
        (
            Operation(Action.UPDATE, "Priya lives in Porto.", 2, SEMANTIC),
            Operation(Action.INSERT, "The audit is due on Friday.", None, SEMANTIC),
            Operation(Action.INSERT, "On day 6 Priya said that she had moved from Lisbon to Porto.", None, EPISODIC),
        ),
    ),
    (
        MANAGER_EXAMPLES[1][0],
        (),
        (
            Operation(Action.UPDATE, "Nadia keeps a diary. Messages get numbers as labels.", None, CORE),
            Operation(Action.INSERT, "Nadia plays the flute.", None, SEMANTIC),
            Operation(Action.INSERT, 'The message "the door is stuck" has label 14.', None, SEMANTIC),
            Operation(Action.INSERT, "On day 2 Nadia waited for the bus for ages.", None, EPISODIC),
        ),
    ),
)


@dataclasses.dataclass(frozen=True)
class ManagerPrompt:
    """What all prompts of one manager have in common.

    Attributes:
        dialect: Layout of the memory, and how calls are written.
        num_examples: Worked examples, 0 to 2: the last so many of `MANAGER_EXAMPLES`, or of `TYPED_EXAMPLES`.
        task: What the manager is told to do, in place of our own words if not empty; for JSON lines of a flat memory it
            must say how calls are written, too.
        limit: What `memory_limit` says, if there is one.
        hidden_name: What the items are called that are not shown.
    """

    dialect: Dialect = operations.DEFAULT
    num_examples: int = 0
    task: str = ""
    limit: str = ""
    hidden_name: str = "older items"

    def messages(self, chunk: str, items: Sequence[MemoryItem], num_hidden: Mapping[str, int]) -> list[Message]:
        """Returns the prompt for one chunk.

        Args:
            items: The memory items that are shown.
            num_hidden: How many others of each memory type are not; the prompt says so. A type that is absent hides
                none.
        """
        messages = [Message("system", (self.system,))]
        examples = TYPED_EXAMPLES if self.dialect.layout == "typed" else MANAGER_EXAMPLES
        for text, shown, calls in examples[len(examples) - self.num_examples :]:
            written = "\n".join(operations.render(call, self.dialect) for call in calls)
            messages += [self._user(text, shown, {}), Message("assistant", (written,))]
        return [*messages, self._user(chunk, items, num_hidden)]

    @functools.cached_property
    def system(self) -> str:
        """The system message: the manager's task, and how its calls are written."""
        flat, lines = self.dialect.layout == "flat", self.dialect.tool_call_format == "json_lines"
        ours = (MANAGER_SYSTEM if lines else FLAT_TASK) if flat else TYPED_TASK
        task = (self.task or ours) + (f"\n{self.limit}" if self.limit else "")
        if lines:
            return task if flat else f"{task}\n\n{_TYPED_JSON_LINES}"
        section = {"hermes": _hermes_section, "qwen_agent": _qwen_agent_section}[self.dialect.tool_call_format]
        return f"{task}\n\n{section(operations.tools(self.dialect.layout))}"

    def _user(self, chunk: str, items: Sequence[MemoryItem], num_hidden: Mapping[str, int]) -> Message:
        lines = ["Memory:"]
        for memory_type in MEMORY_TYPES if self.dialect.layout == "typed" else ("",):
            lines += [f"{memory_type}_memory:"] if memory_type else []
            if count := num_hidden.get(memory_type, 0):
                lines.append(f"({count} {self.hidden_name} are not shown)")
            lines += [memory_line(item) for item in items if item.memory_type == memory_type] or ["(empty)"]
        return Message("user", (chunk_part(chunk), "\n".join(lines)))


def memory_limit(budget_tokens: int, eviction: str) -> str:
    """Tells a manager how long its memory may be, and what goes when it is longer (`transition.EVICTIONS`)."""
    which = {"oldest": "oldest items", "stale": "items that were written longest ago"}[eviction]
    return f"The memory holds at most {budget_tokens} tokens; when there are more, the {which} are dropped."


def _hermes_section(tools: Sequence[Mapping[str, Any]]) -> str:
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return f"""\
# Tools

Your functions are listed here, one JSON signature a line:
<tools>
{signatures}
</tools>

Call one by writing its name and arguments as a JSON object in <tool_call></tool_call> tags, each call in its own tags:
<tool_call>
{{"name": <name of the function>, "arguments": <object of its arguments>}}
</tool_call>"""


def _qwen_agent_section(tools: Sequence[Mapping[str, Any]]) -> str:
    functions = [tool["function"] for tool in tools]
    descriptions = "\n\n".join(
        f"### {f['name']}\n\n{f['name']}: {f['description']} Parameters: "
        f"{json.dumps(f['parameters'], ensure_ascii=False)} Its input is one JSON object."
        for f in functions
    )
    names = ", ".join(f["name"] for f in functions)
    # These markers are what such models were trained to write between text and calls.
    function, arguments, result = (f"\u273f{word}\u273f" for word in ("FUNCTION", "ARGS", "RESULT"))
    return f"""\
# Tools

## Your tools:

{descriptions}

## To call tools, as many as you need, put these commands into your reply:

{function}: name of the first tool, out of [{names}]
{arguments}: input of the first tool
{function}: name of the second tool
{arguments}: input of the second tool
...
{result}: results, which you do not write"""


def memory_line(item: MemoryItem) -> str:
    """Shows one item: as JSON, so that a newline in its text cannot pass for another item."""
    if item.memory_type == CORE:
        shown: dict[str, Any] = {"content": item.text}
    else:
        shown = {"memory_id" if item.memory_type else "id": item.item_id, "content": item.text}
    return json.dumps(shown, ensure_ascii=False)


def chunk_part(chunk: str) -> str:
    """Shows the text that is to be read; what shares a chunk shares this part of its prompt."""
    return f"New text:\n{chunk}\n\n"
