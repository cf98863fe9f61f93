"""Serves a `MemoryAgent` as tools over the Model Context Protocol."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Annotated, Any

from finemem_jax.serving.agent import MemoryAgent
from finemem_jax.types import Malformed, MemoryItem, Outcome, Status

NAME = "finemem_jax"


_PATH = "/mcp"


_SHORTEST_TOKEN = 16


# What clients that stay connected are given to leave when the server ends (s).
_GOODBYE_SECONDS = 2


_INSTRUCTIONS = (
    "A long-term memory that outlives this conversation. Call `observe` with whatever may matter later, as it comes "
    "up: a trained manager decides what to store, update or delete. Call `ask` before you answer a question that may "
    "rest on something said earlier."
)


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


class Loading:
    """A memory agent that is loaded in the background: a client that waits for the model's weights may give up."""

    def __init__(self, load: Callable[[], MemoryAgent], failed: Callable[[BaseException], None]):
        """Args:
        failed: Called if it cannot be loaded.
        """
        self._load, self._failed = load, failed
        self._thread = threading.Thread(target=self._run, name="loading", daemon=True)
        self._agent: Future[MemoryAgent] = Future()

    def begin(self) -> None:
        """Begins, unless it has begun."""
        if self._thread.ident is None:
            self._thread.start()

    def agent(self) -> MemoryAgent:
        """The agent, as soon as it is there."""
        return self._agent.result()

    def close(self) -> None:
        """Closes the agent, if there is one."""
        if self._agent.done() and self._agent.exception() is None:
            self._agent.result().close()

    def _run(self):
        try:
            self._agent.set_result(self._load())
        except BaseException as error:  # The main thread says what it is.
            self._agent.set_exception(error)
            self._failed(error)


class Tokens:
    """Which user a bearer token belongs to. Only digests are kept."""

    def __init__(self, path: pathlib.Path):
        """Reads a file with a token, a space and a user's name on each line; lines that begin with # do not count.

        Raises:
            ValueError: it cannot be read, or a line is not like that.
        """
        self._users: dict[bytes, str] = {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--tokens={path} cannot be read ({error}); name a text file.") from error
        for number, line in enumerate(lines, 1):
            token, _, user = line.strip().partition(" ")
            if not token or token.startswith("#"):
                continue
            # The line itself is a secret, and not shown.
            if len(token) < _SHORTEST_TOKEN or not user.strip():
                raise ValueError(
                    f"--tokens={path}: line {number} must hold a token of {_SHORTEST_TOKEN} characters or more, a "
                    "space, and a user's name."
                )
            if _digest(token) in self._users:
                raise ValueError(
                    f"--tokens={path}: the token of line {number} stands there twice; give it to one user."
                )
            self._users[_digest(token)] = user.strip()
        if not self._users:
            raise ValueError(f"--tokens={path} holds no tokens; write lines of a token, a space, and a user's name.")

    def user(self, token: str) -> str | None:
        """Whose token this is; None for nobody's."""
        return self._users.get(_digest(token))


def _digest(token):
    # What is compared are digests, so that the time it takes tells nothing about tokens.
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def server(loading: Loading, user: str = "default", tokens: Tokens | None = None) -> Any:
    """The MCP server, for whichever transport.

    Args:
        user: Whose memory it is, for all requests.
        tokens: Instead, it is that of the request's bearer token.

    Returns:
        An `mcp.server.MCPServer`.

    Raises:
        ImportError: the package mcp is missing or too old; the message says how to install it.
    """
    with _needs_mcp():
        from mcp.server import MCPServer
        from mcp.server.auth.provider import AccessToken
        from mcp.server.auth.settings import AuthSettings
        from mcp.server.mcpserver import Context
        from mcp.server.mcpserver.exceptions import ToolError
        from mcp_types import ToolAnnotations
        from pydantic import Field

    @contextlib.asynccontextmanager
    async def lifespan(_):
        # Not before: from here on, what loading prints does not get between the messages of the protocol.
        loading.begin()
        yield {}

    class Verifier:
        async def verify_token(self, token):
            owner = tokens and tokens.user(token)
            return AccessToken(token=token, client_id=owner, subject=owner, scopes=[]) if owner else None

    secured: dict[str, Any] = {}
    if tokens is not None:
        # The address is never used: tokens are given out by hand, and no server for that is announced.
        auth = AuthSettings.model_validate({"issuer_url": "http://localhost", "resource_server_url": None})
        secured = {"auth": auth, "token_verifier": Verifier()}
    made = MCPServer(NAME, instructions=_INSTRUCTIONS, log_level="WARNING", lifespan=lifespan, **secured)

    def whose(context):
        return user if tokens is None else context.request_context.request.user.access_token.subject

    @contextlib.contextmanager
    def told():
        """What a call may run into is told to whoever made it; anything else is a fault of ours."""
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            raise ToolError(str(error)) from error

    @made.tool(annotations=ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False))
    def observe(
        text: Annotated[str, Field(description="What was said or read, in its own words; of any length.")],
        context: Context,
    ) -> Observation:
        """Give the memory something to read: a message, a document, notes.

        A manager trained for it decides what is worth keeping, and adds, rewrites or deletes memory items accordingly.
        Pass the text itself rather than a summary, with names and dates instead of "he" and "yesterday". Returns what
        was done to the memory. Takes seconds to minutes for long texts.
        """
        with told():
            seen = loading.agent().observe(text, whose(context))
        done, refused = _told(seen.outcomes)
        return Observation(done, refused, seen.chunks, seen.items, seen.tokens)

    @made.tool(annotations=ToolAnnotations(read_only_hint=True, open_world_hint=False))
    def ask(
        question: Annotated[str, Field(description="One question that can be understood without the conversation.")],
        context: Context,
    ) -> Answer:
        """Ask the memory a question, and get a short answer with the memory items that it was drawn from.

        Use it before answering anything that may depend on earlier conversations or documents. Items are found by the
        words of the question, so name who or what it is about. If no item is returned, nothing is known about it,
        whatever the answer says.
        """
        with told():
            reply = loading.agent().ask(question, whose(context))
        return Answer(reply.answer, _items(reply.evidence))

    @made.tool(annotations=ToolAnnotations(read_only_hint=True, open_world_hint=False))
    def list_memory(
        context: Context,
        offset: Annotated[int, Field(ge=0, description="How many items to pass over, from the oldest on.")] = 0,
        limit: Annotated[int, Field(ge=1, le=1000, description="How many items to return at most.")] = 100,
    ) -> Listing:
        """List what the memory holds, oldest first, with the ids that `forget` takes."""
        with told():
            held = loading.agent().memory(whose(context))
        return Listing(_items(held[offset : offset + limit]), len(held))

    @made.tool(annotations=ToolAnnotations(read_only_hint=False, destructive_hint=True, open_world_hint=False))
    def forget(
        context: Context,
        item_ids: Annotated[list[int], Field(description="Ids of items, as `list_memory` shows them.")] = [],  # noqa: B006
        everything: Annotated[bool, Field(description="Remove all items; leave item_ids empty then.")] = False,
    ) -> Forgotten:
        """Remove items from the memory for good. Use it only when the user asks for something to be forgotten."""
        with told():
            if everything == bool(item_ids):
                raise ValueError("Give either the ids of items, or everything=true.")
            return Forgotten(loading.agent().forget(whose(context), None if everything else item_ids))

    return made


@contextlib.contextmanager
def _needs_mcp():
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"Serving needs the package mcp, version 2 or newer ({error}); install it with: pip install "
            "'finemem_jax[mcp]'"
        ) from error


def _items(items: Sequence[MemoryItem]) -> list[Item]:
    return [Item(item.item_id, item.text) for item in items]


def _told(outcomes: Sequence[Outcome]) -> tuple[list[str], list[str]]:
    """Operations in words: those that were done, and those that were refused."""
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


class _Stdio:
    def __init__(self, made):
        self._made = made

    def run(self):
        self._made.run("stdio")

    def stop(self):
        """How long to wait for its end (s): not at all, because only its client can end it."""
        return 0.0


class _Http:
    def __init__(self, made, loading, host, port):
        """Raises:
        ValueError: it cannot listen there.
        """
        import uvicorn

        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family)
        except OSError as error:
            raise ValueError(f"--host={host} --port={port} cannot be listened to ({error}); choose others.") from error
        loading.begin()
        # Without sessions: each request proves whose it is, and a server that was started again goes on.
        app = made.streamable_http_app(streamable_http_path=_PATH, stateless_http=True, host=host)
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GOODBYE_SECONDS)
        self._server = uvicorn.Server(settings)
        self._address = f"[{host}]" if ":" in host else host

    def run(self):
        port = self._socket.getsockname()[1]
        print(f"serving on http://{self._address}:{port}{_PATH}", file=sys.stderr, flush=True)
        self._server.run([self._socket])

    def stop(self):
        """Asks it to end; returns how long to wait for that (s)."""
        self._server.should_exit = True
        return _GOODBYE_SECONDS + 1.0
