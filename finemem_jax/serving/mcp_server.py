"""Serves a `MemoryAgent` over the Model Context Protocol: loading, bearer tokens and transports.

`mcp_tools` has the tools.
"""

import contextlib
import hashlib
import pathlib
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from typing import Any, Protocol

from finemem_jax.serving.agent import MemoryAgent

NAME = "finemem_jax"
_PATH = "/mcp"
_SHORTEST_TOKEN = 16
# How long clients that stay connected have to leave when the server ends.
_GOODBYE_SECONDS = 2
_INSTRUCTIONS = (
    "A long-term memory that outlives this conversation. Call `observe` with whatever may matter later, as it comes "
    "up: a trained manager decides what to store, update or delete. Call `ask` before you answer a question that may "
    "rest on something said earlier."
)


class Loading:
    """Loads a memory agent in the background: a client that waits for the model's weights may give up."""

    def __init__(self, load: Callable[[], MemoryAgent], failed: Callable[[BaseException], None]):
        """Prepares loading; `begin` begins it.

        Args:
            failed: Called if the agent cannot be loaded.
        """
        self._load, self._failed = load, failed
        self._thread = threading.Thread(target=self._run, name="loading", daemon=True)
        self._agent: Future[MemoryAgent] = Future()

    def begin(self) -> None:
        """Begins loading, unless it has begun."""
        if self._thread.ident is None:
            self._thread.start()

    def agent(self) -> MemoryAgent:
        """Returns the agent, as soon as it is there."""
        return self._agent.result()

    def close(self) -> None:
        """Closes the agent, if there is one."""
        if self._agent.done() and self._agent.exception() is None:
            self._agent.result().close()

    def _run(self) -> None:
        try:
            self._agent.set_result(self._load())
        except BaseException as error:  # The main thread says what it is.
            self._agent.set_exception(error)
            self._failed(error)


class Tokens:
    """Tells which user a bearer token belongs to. Only digests are kept."""

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
            # Messages do not show the line, which is a secret.
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
        """Returns whose token this is; None for nobody's."""
        return self._users.get(_digest(token))


def _digest(token: str) -> bytes:
    # Digests are compared, so that the time it takes tells nothing about tokens.
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def server(loading: Loading, user: str = "default", tokens: Tokens | None = None) -> Any:
    """Makes the MCP server, for whichever transport.

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

        from finemem_jax.serving.mcp_tools import Tools

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[dict[str, Any]]:
        # Not before: what loading prints would get between the first messages of the protocol.
        loading.begin()
        yield {}

    class Verifier:
        async def verify_token(self, token: str) -> AccessToken | None:
            owner = tokens and tokens.user(token)
            return AccessToken(token=token, client_id=owner, subject=owner, scopes=[]) if owner else None

    secured: dict[str, Any] = {}
    if tokens is not None:
        # The address is never used: tokens are given out by hand, and no server for that is announced.
        auth = AuthSettings.model_validate({"issuer_url": "http://localhost", "resource_server_url": None})
        secured = {"auth": auth, "token_verifier": Verifier()}

    def user_of(context: Any) -> str:
        return user if tokens is None else context.request_context.request.user.access_token.subject

    made = MCPServer(NAME, instructions=_INSTRUCTIONS, log_level="WARNING", lifespan=lifespan, **secured)
    Tools(loading.agent, user_of).register(made)
    return made


@contextlib.contextmanager
def _needs_mcp() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"Serving needs the package mcp, version 2 or newer ({error}); install it with: pip install "
            "'finemem_jax[mcp]'"
        ) from error


class Transport(Protocol):
    """Carries messages between a server and its clients."""

    def run(self) -> None:
        """Serves until the end."""

    def stop(self) -> float:
        """Asks it to end; returns how long to wait for that, in seconds."""
        ...


class Stdio:
    """Serves one client over standard input and output."""

    def __init__(self, made: Any):
        self._made = made

    def run(self) -> None:
        self._made.run("stdio")

    def stop(self) -> float:
        return 0.0  # Only its client can end it.


class Http:
    """Serves any number of clients over HTTP."""

    def __init__(self, made: Any, loading: Loading, *, host: str, port: int):
        """Begins to listen, and to load.

        Raises:
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

    def run(self) -> None:
        port = self._socket.getsockname()[1]
        print(f"serving on http://{self._address}:{port}{_PATH}", file=sys.stderr, flush=True)
        self._server.run([self._socket])

    def stop(self) -> float:
        self._server.should_exit = True
        return _GOODBYE_SECONDS + 1.0
