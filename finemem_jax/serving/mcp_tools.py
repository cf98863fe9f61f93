"""Defines the tools of the memory server: what another model can do with its memory, and what it is told about that.

Needs the packages mcp and pydantic. Annotations are not postponed: mcp makes the tools' schemas of them.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import Field

from finemem_jax.serving.agent import MemoryAgent
from finemem_jax.types import Malformed, MemoryItem, Outcome, Status


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing that the memory holds."""

    id: int
    text: str


@dataclasses.dataclass(frozen=True)
class Observation:
    """What became of a text: what was done to the memory, what the manager wrote in vain and why, and sizes."""

    done: list[str]
    refused: list[str]
    chunks: int
    items: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer, and the items that it was drawn from, best first."""

    answer: str
    evidence: list[Item]


@dataclasses.dataclass(frozen=True)
class Listing:
    """Some items of the memory, oldest first, and how many there are in all."""

    items: list[Item]
    total: int


@dataclasses.dataclass(frozen=True)
class Forgotten:
    """How many items were removed."""

    removed: int


class Tools:
    """Calls an agent for whoever sent a request. Docstrings of the tools are what the other model reads."""

    def __init__(self, agent: Callable[[], MemoryAgent], user_of: Callable[[Context[Any, Any]], str]):
        """Takes what the tools need.

        Args:
            agent: Returns the agent, as soon as it is loaded.
            user_of: Returns whose memory a request is about.
        """
        self._agent, self._user_of = agent, user_of

    def register(self, server: MCPServer[Any]) -> None:
        """Makes a server offer the tools."""
        reads = ToolAnnotations(read_only_hint=True, open_world_hint=False)
        adds = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False)
        removes = ToolAnnotations(read_only_hint=False, destructive_hint=True, open_world_hint=False)
        server.add_tool(self.observe, annotations=adds)
        server.add_tool(self.ask, annotations=reads)
        server.add_tool(self.list_memory, annotations=reads)
        server.add_tool(self.forget, annotations=removes)

    def observe(
        self,
        text: Annotated[str, Field(description="What was said or read, in its own words; of any length.")],
        context: Context[Any, Any],
    ) -> Observation:
        """Give the memory something to read: a message, a document, notes.

        A manager trained for it decides what is worth keeping, and adds, rewrites or deletes memory items accordingly.
        Pass the text itself rather than a summary, with names and dates instead of "he" and "yesterday". Returns what
        was done to the memory. Takes seconds to minutes for long texts.
        """
        with _told():
            seen = self._agent().observe(text, self._user_of(context))
        done, refused = _in_words(seen.outcomes)
        return Observation(done, refused, seen.chunks, seen.items, seen.tokens)

    def ask(
        self,
        question: Annotated[str, Field(description="One question that can be understood without the conversation.")],
        context: Context[Any, Any],
    ) -> Answer:
        """Ask the memory a question, and get a short answer with the memory items that it was drawn from.

        Use it before answering anything that may depend on earlier conversations or documents. Items are found by the
        words of the question, so name who or what it is about. If no item is returned, nothing is known about it,
        whatever the answer says.
        """
        with _told():
            reply = self._agent().ask(question, self._user_of(context))
        return Answer(reply.answer, _items(reply.evidence))

    def list_memory(
        self,
        context: Context[Any, Any],
        offset: Annotated[int, Field(ge=0, description="How many items to pass over, from the oldest on.")] = 0,
        limit: Annotated[int, Field(ge=1, le=1000, description="How many items to return at most.")] = 100,
    ) -> Listing:
        """List what the memory holds, oldest first, with the ids that `forget` takes."""
        with _told():
            held = self._agent().memory(self._user_of(context))
        return Listing(_items(held[offset : offset + limit]), len(held))

    def forget(
        self,
        context: Context[Any, Any],
        item_ids: Annotated[list[int], Field(description="Ids of items, as `list_memory` shows them.")] = [],  # noqa: B006
        everything: Annotated[bool, Field(description="Remove all items; leave item_ids empty then.")] = False,
    ) -> Forgotten:
        """Remove items from the memory for good. Use it only when the user asks for something to be forgotten."""
        with _told():
            if everything == bool(item_ids):
                raise ValueError("Give either the ids of items, or everything=true.")
            return Forgotten(self._agent().forget(self._user_of(context), None if everything else item_ids))


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Tells whoever made a call why it failed; any other exception is a fault of ours."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        raise ToolError(str(error)) from error


def _items(items: Sequence[MemoryItem]) -> list[Item]:
    return [Item(item.item_id, item.text) for item in items]


def _in_words(outcomes: Sequence[Outcome]) -> tuple[list[str], list[str]]:
    """Puts operations in words: those that were done, and those that were refused."""
    done, refused = [], []
    for outcome in outcomes:
        operation = outcome.operation
        if isinstance(operation, Malformed):
            refused.append(f"{operation.reason}: {operation.text}")
            continue
        said = operation.action.name.lower()
        item_id = outcome.item_id if outcome.valid else operation.item_id
        said += f" [{item_id}]" if item_id is not None else ""
        said += f": {operation.content}" if operation.content else ""
        if outcome.valid:
            done.append(said)
        else:
            refused.append(f"{_REASONS[outcome.status]}: {said}")
    return done, refused


_REASONS = {Status.DUPLICATE: "nothing new", Status.UNKNOWN_ID: "no such item"}
