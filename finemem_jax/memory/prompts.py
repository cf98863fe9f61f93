"""Everything a language model is told, in one place: the manager's, the reader's and the content judge's prompts.

A prompt is a list of chat messages whose parts are ordered from what most requests share to what fewest do:
instructions and worked examples (all requests), the chunk (the rollouts of a stream), the memory (one rollout).
Knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finemem_jax.types import CORE, EPISODIC, MEMORY_TYPES, SEMANTIC, Action, MemoryItem, Message, Operation

MANAGER_SYSTEM = """\
You keep the memory of an assistant, who must later answer questions from it alone. Read the new text and write what \
to change in the memory, one JSON call per line: memory_insert a new fact, memory_update a fact that has changed, \
memory_delete a fact that no longer holds, or skip when there is nothing to remember."""

# The same for wires whose own section says how calls are written.
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

TYPED_EXAMPLES = (
    (
        MANAGER_EXAMPLES[0][0],
        (
            (1, CORE, "Omar and Priya are colleagues."),
            (2, SEMANTIC, "Priya lives in Lisbon."),
            (3, SEMANTIC, "Omar has a cat called Biscuit."),
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


def manager(
    chunk: str,
    items: Sequence[MemoryItem],
    num_hidden: int,
    num_examples: int,
    render: Callable[[Operation], str],
    system: str = MANAGER_SYSTEM,
    hidden: str = "older items",
) -> list[Message]:
    """The prompt for one chunk of the manager of a flat memory.

    Args:
        chunk: c_t.
        items: The memory items that are shown.
        num_hidden: How many others are not; the prompt says so.
        hidden: What these are called.
        num_examples: Worked examples, 0 to 2; the last so many of `MANAGER_EXAMPLES`.
        render: Writes an operation in the manager's dialect.
        system: What `manager_system` gives for that dialect.
    """
    messages = [Message("system", (system,))]
    for text, shown, calls in MANAGER_EXAMPLES[len(MANAGER_EXAMPLES) - num_examples :]:
        memory = [MemoryItem(item_id, content, 0) for item_id, content in shown]
        messages.append(Message("user", (_chunk_part(text), _memory_part(memory, 0))))
        messages.append(Message("assistant", ("\n".join(map(render, calls)),)))
    return [*messages, Message("user", (_chunk_part(chunk), _memory_part(items, num_hidden, hidden)))]


def typed_manager(
    chunk: str,
    items: Sequence[MemoryItem],
    num_hidden: Mapping[str, int],
    num_examples: int,
    render: Callable[[Operation], str],
    system: str,
    hidden: str = "older items",
) -> list[Message]:
    """The prompt for one chunk of the manager of a typed memory: `manager`, with items under the names of their types.

    Args:
        items: The memory items that are shown, of all types.
        num_hidden: How many others of each type are not; a type that is absent hides none.
        hidden: What these are called.
        num_examples: Worked examples, 0 to 2; the last so many of `TYPED_EXAMPLES`.
    """
    messages = [Message("system", (system,))]
    for text, shown, calls in TYPED_EXAMPLES[len(TYPED_EXAMPLES) - num_examples :]:
        memory = [MemoryItem(item_id, content, 0, 0, memory_type) for item_id, memory_type, content in shown]
        messages.append(Message("user", (_chunk_part(text), _typed_memory_part(memory, {}))))
        messages.append(Message("assistant", ("\n".join(map(render, calls)),)))
    return [*messages, Message("user", (_chunk_part(chunk), _typed_memory_part(items, num_hidden, hidden)))]


def memory_limit(budget_tokens: int, eviction: str) -> str:
    """Tells a manager how long its memory may be, and what goes when it is longer (`memory.EVICTIONS`)."""
    which = {"oldest": "oldest items", "stale": "items that were written longest ago"}[eviction]
    return f"The memory holds at most {budget_tokens} tokens; when there are more, the {which} are dropped."


def manager_system(layout: str, wire: str, tools: Sequence[Mapping[str, Any]], task: str = "", limit: str = "") -> str:
    """The manager's system message: its task, and how its calls are written.

    Args:
        layout: "flat" or "typed".
        wire: "json_lines", "hermes" or "qwen_agent"; the last two list the tools in their own form.
        tools: The layout's calls, in the OpenAI form.
        task: In place of our own words; for JSON lines of a flat memory it must say how calls are written, too.
        limit: What `memory_limit` says, if there is one.
    """
    if not task and layout == "flat":
        task = MANAGER_SYSTEM if wire == "json_lines" else FLAT_TASK
    task = task or TYPED_TASK
    if limit:
        task += f"\n{limit}"
    if wire == "json_lines":
        return task if layout == "flat" else f"{task}\n\n{_TYPED_JSON_LINES}"
    section = {"hermes": _hermes_section, "qwen_agent": _qwen_agent_section}[wire]
    return f"{task}\n\n{section(tools)}"


def _hermes_section(tools):
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


def _qwen_agent_section(tools):
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
    """How one item is shown: as JSON, so that a newline in its text cannot pass for another item."""
    if item.memory_type == CORE:
        shown: dict[str, Any] = {"content": item.text}
    else:
        shown = {"memory_id" if item.memory_type else "id": item.item_id, "content": item.text}
    return json.dumps(shown, ensure_ascii=False)


def _chunk_part(chunk):
    return f"New text:\n{chunk}\n\n"


def _memory_part(items, num_hidden, hidden="older items"):
    return "Memory:\n" + "\n".join(_memory_lines(items, num_hidden, hidden))


def _typed_memory_part(items, num_hidden, hidden="older items"):
    sections = []
    for memory_type in MEMORY_TYPES:
        of_type = [item for item in items if item.memory_type == memory_type]
        sections += [f"{memory_type}_memory:", *_memory_lines(of_type, num_hidden.get(memory_type, 0), hidden)]
    return "Memory:\n" + "\n".join(sections)


def _memory_lines(items, num_hidden, hidden):
    lines = [memory_line(item) for item in items] or ["(empty)"]
    if num_hidden:
        lines.insert(0, f"({num_hidden} {hidden} are not shown)")
    return lines


# --------------------------------------------------------------------------------------
# Content judge (Mem-alpha's r4)
# --------------------------------------------------------------------------------------


# --------------------------------------------------------------------------------------
# Recurrent memory
# --------------------------------------------------------------------------------------


# --------------------------------------------------------------------------------------
# Judge of answers
# --------------------------------------------------------------------------------------


# --------------------------------------------------------------------------------------
# Chunk questions
# --------------------------------------------------------------------------------------
