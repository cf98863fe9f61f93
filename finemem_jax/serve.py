"""Serves a trained manager as a memory for other models: tools over the Model Context Protocol.

    python -m finemem_jax.serve --model=PATH --store=FILE [--user=NAME]
    python -m finemem_jax.serve --model=PATH --store=FILE --transport=http [--host=…] [--port=…] [--tokens=FILE]

Over stdio there is one user, `--user`, and over HTTP too: an unproven name in a request would keep nobody out. With
--tokens there are many: each line of that file is a bearer token, a space, and the name of its user. A request belongs
to the user of its token, and without a valid one it is refused; nobody can name another's memory. Only with tokens does
the server listen to other machines than its own; whoever does that puts a proxy with TLS before it.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from finemem_jax.serving.agent import MemoryAgent
from finemem_jax.serving.mcp_server import Http, Loading, Stdio, Tokens, Transport, server


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until the client leaves (stdio), Ctrl-C or SIGTERM; ends the process."""
    options = _parse(arguments)
    ended = threading.Event()
    told: list[int] = []
    failures: list[BaseException] = []

    def failed(error: BaseException) -> None:
        failures.append(error)
        ended.set()

    def stop(number: int, _: object) -> None:
        if told:  # The second signal does not wait for what is being computed.
            os._exit(128 + number)
        told.append(number)
        ended.set()

    try:
        tokens = _check(options)
        loading = Loading(lambda: _load(options), failed)
        made = server(loading, options.user, tokens)
        is_stdio = options.transport == "stdio"
        transport = Stdio(made) if is_stdio else Http(made, loading, host=options.host, port=options.port)
    except (ValueError, ImportError) as error:
        sys.exit(f"finemem_jax: {error}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    # A daemon thread: one that waits for standard input cannot be ended, and must not keep the process alive.
    running = threading.Thread(target=_run, args=(transport, ended.set, failed), name="transport", daemon=True)
    running.start()
    ended.wait()
    loading.close()
    running.join(transport.stop())
    for error in failures[:1]:
        print(f"finemem_jax: {error}", file=sys.stderr, flush=True)
    # All that was acknowledged is on file; threads that still load or read end with the process.
    os._exit(1 if failures else 0)


def _run(transport: Transport, ended: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
    try:
        transport.run()
    except BaseException as error:  # The main thread says what it is.
        failed(error)
    ended()


def _load(options: argparse.Namespace) -> MemoryAgent:
    # JAX, which is not imported yet, reads it when it is.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/finemem_jax/compiled"))
    return MemoryAgent.load(options.model, options.store, **_settings(options.set))


def _settings(assignments: Sequence[str]) -> dict[str, Any]:
    """Settings by name, each as what its default is."""
    from finemem_jax import config as config_lib

    named = (assignment.partition("=") for assignment in assignments)
    return config_lib.from_texts({name: text for name, _, text in named})


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m finemem_jax.serve", description="Serves a trained memory manager over MCP."
    )
    parser.add_argument(
        "--model", required=True, help="A run's workdir, an exported folder, an experiment's file, or \"\"."
    )
    parser.add_argument("--store", required=True, help="The file of memories; made where there is none.")
    parser.add_argument("--transport", choices=("stdio", "http"), default="stdio")
    parser.add_argument("--user", help='Whose memory it is, without --tokens; "default".')
    parser.add_argument("--host", default="127.0.0.1", help="Where to listen, over HTTP.")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free.")
    parser.add_argument("--tokens", help="Users over HTTP: a file with a bearer token and a user's name on each line.")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="A setting instead of that of training."
    )
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> Tokens | None:
    """Refuses what cannot go together, before anything is loaded; returns the tokens."""
    _settings(options.set)
    if options.tokens and (options.transport == "stdio" or options.user):
        raise ValueError("--tokens says who the users are over HTTP; leave out --user, and say --transport=http.")
    options.user = options.user or "default"
    if options.transport == "http" and not options.tokens and not _is_local(options.host):
        raise ValueError(
            f"--host={options.host} would let other machines read the memory; give users tokens (--tokens=FILE), or "
            "leave out --host."
        )
    return Tokens(pathlib.Path(options.tokens).expanduser()) if options.tokens else None


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    main()
