"""Tests of finemem_jax/serving/mcp_server.py: real clients, real processes; nobody sees another's memory."""

import asyncio
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from finemem_jax.memory.store import Store

# What follows needs it.
pytest.importorskip("mcp.server.mcpserver", reason="the package mcp, version 2 or newer, is not installed")
import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from finemem_jax.serving import mcp_server

TESTS = pathlib.Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
SCRIPTED = str(TESTS / "scripted_agent.py")
NAMES = [f"user {i}" for i in range(8)]
TOKENS = {user: f"token-of-{user.replace(' ', '-')}-0123456789" for user in [*NAMES, "ada", "bob"]}


def start(store, *flags, program=(SCRIPTED,)):
    """A server in a process of its own."""
    command = [sys.executable, *program, "--model=", f"--store={store}", *flags]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, **pipes)


@contextlib.contextmanager
def serving(store, *flags):
    """A server over HTTP, and its address."""
    process = start(store, "--transport=http", "--port=0", *flags)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert line.startswith("serving on "), line + process.stderr.read()
        yield process, line.removeprefix("serving on ").strip()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text("\n".join(["# token user", "", *(f"{token} {user}" for user, token in TOKENS.items())]))
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tokens):
    """The address of a server with tokens, and its store."""
    store = tmp_path_factory.mktemp("shared") / "m"
    with serving(store, f"--tokens={tokens}") as (_, url):
        yield url, store


@contextlib.asynccontextmanager
async def connected(url, token="", **options):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx2.AsyncClient(headers=headers, timeout=60) as http:
        async with Client(streamable_http_client(url, http_client=http), **options) as client:
            yield client


async def call(client, name, **arguments):
    """What a tool returns; raises ValueError with what it says if it fails."""
    result = await client.call_tool(name, arguments)
    if result.is_error:
        raise ValueError(result.content[0].text)
    return result.structured_content


async def listed(client):
    return [item["text"] for item in (await call(client, "list_memory", limit=1000))["items"]]


# --------------------------------------------------------------------------------------
# Over standard input and output
# --------------------------------------------------------------------------------------

NOISY = """
import os
from experiments import smoke
def get_config():
    print("not of the protocol")
    os.write(1, b"nor this\\n")
    config = smoke.get_config()
    config.reader.kind = "model"
    return config
"""


def test_a_model_over_stdio(tmp_path):
    (tmp_path / "noisy.py").write_text(NOISY)
    arguments = [f"--model={tmp_path / 'noisy.py'}", f"--store={tmp_path / 'm.sqlite'}", "--user=ada", "--set=seed=5"]
    parameters = StdioServerParameters(
        command=sys.executable, args=["-m", "finemem_jax.serve", *arguments], env=dict(ENVIRONMENT), cwd=TESTS.parent
    )

    async def life():
        async with Client(parameters, read_timeout_seconds=120) as client:
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            assert set(tools) == {"observe", "ask", "list_memory", "forget"}
            assert all(len(tool.description) > 50 for tool in tools.values())
            assert tools["forget"].annotations.destructive_hint and tools["ask"].annotations.read_only_hint
            seen = await call(client, "observe", text="Ship 0 came into the harbour with tea.")
            assert seen["chunks"] == 1 and len(seen["done"]) == 1 == seen["items"] and seen["refused"]
            reply = await call(client, "ask", question=seen["done"][0])
            held = await call(client, "list_memory")
            assert reply["evidence"] == held["items"] and isinstance(reply["answer"], str)
            return held["items"][0]["text"]

    text = asyncio.run(life())
    with Store(tmp_path / "m.sqlite") as store:
        assert store.names() == ["ada"] and store.load("ada")[0].items[0].text == text


def test_a_memory_outlives_the_server(tmp_path):
    async def life(n, mode):
        parameters = StdioServerParameters(
            command=sys.executable, args=[SCRIPTED, "--model=", f"--store={tmp_path / 'm'}"], env=dict(ENVIRONMENT)
        )
        async with Client(parameters, mode=mode) as client:
            await call(client, "observe", text=f"Fact {n}.")
            return await listed(client)

    assert asyncio.run(life(1, "auto")) == ["Fact 1."]
    assert asyncio.run(life(2, "legacy")) == ["Fact 1.", "Fact 2."]


@pytest.mark.parametrize(("transport", "number"), [("stdio", signal.SIGTERM), ("http", signal.SIGINT)])
def test_it_ends_when_it_is_told_to(tmp_path, transport, number):
    process = start(tmp_path / "m", f"--transport={transport}", "--port=0")
    assert process.stderr is not None
    if transport == "http":
        process.stderr.readline()
    else:
        # Until it has begun: signals before that are Python's own.
        while not (tmp_path / "m").exists():
            assert process.poll() is None
            time.sleep(0.01)
    process.send_signal(number)
    # Its standard input stays open.
    assert process.wait(30) == 0
    assert process.communicate() == ("", "")


# --------------------------------------------------------------------------------------
# Over HTTP
# --------------------------------------------------------------------------------------


def test_one_user_needs_no_token(tmp_path):
    async def life(url):
        async with connected(url) as client:
            await call(client, "observe", text="A fact.")
            return await listed(client)

    with serving(tmp_path / "m", "--user=eve") as (_, url):
        assert asyncio.run(life(url)) == ["A fact."]
    with Store(tmp_path / "m") as store:
        assert store.names() == ["eve"]


def test_the_tools(shared):
    async def life():
        async with connected(shared[0], TOKENS["ada"]) as client:
            seen = [await call(client, "observe", text=f"Fact {n}.") for n in range(5)]
            assert seen[-1] == {"done": ["insert [5]: Fact 4."], "refused": [], "chunks": 1, "items": 5, "tokens": 35}
            assert (await call(client, "observe", text="Fact 4."))["refused"] == ["nothing new: insert: Fact 4."]
            some = await call(client, "list_memory", offset=1, limit=2)
            assert some == {"items": [{"id": 2, "text": "Fact 1."}, {"id": 3, "text": "Fact 2."}], "total": 5}
            reply = await call(client, "ask", question="What is 3?")
            assert reply == {"answer": "Fact 3.", "evidence": [{"id": 4, "text": "Fact 3."}]}
            assert await call(client, "forget", item_ids=[1, 2]) == {"removed": 2}
            for wrong, message in [
                ({}, "Give either the ids"),
                ({"item_ids": [3], "everything": True}, "Give either the ids"),
                ({"item_ids": [1]}, r"There are no items \[1\]"),
            ]:
                with pytest.raises(ValueError, match=message):
                    await call(client, "forget", **wrong)
            with pytest.raises(ValueError, match="The text must hold words"):
                await call(client, "observe", text=" ")
            assert await call(client, "forget", everything=True) == {"removed": 3}
            assert await listed(client) == []

    asyncio.run(life())


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_a_memory_is_its_users(shared, mode):
    (url, store), first, second = shared, TOKENS["ada"], TOKENS["bob"]

    async def life():
        async with connected(url, first, mode=mode) as one, connected(url, second, mode=mode) as other:
            await call(one, "observe", text="The safe opens with 1234.")
            assert await listed(other) == []
            assert (await call(other, "ask", question="What opens the safe?"))["evidence"] == []
            with pytest.raises(ValueError, match="There are no items"):
                await call(other, "forget", item_ids=[1])
            assert await call(other, "forget", everything=True) == {"removed": 0}
            # Naming another user is of no use.
            result = await other.call_tool("list_memory", {"user": "ada", "context": "ada"})
            assert not (result.structured_content or {}).get("items")
            assert await listed(one) == ["The safe opens with 1234."]
            await call(one, "forget", everything=True)
        async with httpx2.AsyncClient() as http:
            for headers in ({}, {"Authorization": "Bearer token-of-user-9-0123456789"}, {"Authorization": first}):
                assert (await http.post(url, json={}, headers=headers)).status_code == 401

    asyncio.run(life())
    with Store(store) as held:
        assert not {"ada", "bob", "default"} & set(held.names())


def test_a_thousand_calls_of_eight_clients(shared):
    """Each observes 100 facts of its own, and asks 25 questions; as fast as it can."""

    url, store = shared

    async def life(user):
        async with connected(url, TOKENS[user]) as client:
            for n in range(100):
                seen = await call(client, "observe", text=f"Fact {n} of {user}.")
                assert seen["items"] == n + 1
                if n % 4 == 0:
                    reply = await call(client, "ask", question=f"fact {n}")
                    assert reply["evidence"] and all(item["text"].endswith(f"of {user}.") for item in reply["evidence"])

    async def lives():
        await asyncio.gather(*map(life, NAMES))

    asyncio.run(lives())
    with Store(store) as held:
        for user in NAMES:
            assert [item.text for item in held.load(user)[0].items] == [f"Fact {n} of {user}." for n in range(100)]


def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path, tokens):
    done = dict.fromkeys(NAMES, 0)

    async def life(url, user, process):
        async with connected(url, TOKENS[user]) as client:
            for n in range(10_000):
                await call(client, "observe", text=f"Fact {n} of {user}.")
                done[user] = n + 1
                if sum(done.values()) >= 80:
                    process.kill()

    async def lives(url, process):
        # What clients make of a server that has gone is their own affair.
        await asyncio.gather(*(life(url, user, process) for user in NAMES), return_exceptions=True)

    with serving(tmp_path / "m", f"--tokens={tokens}") as (process, url):
        asyncio.run(lives(url, process))
        assert process.wait(10) == -signal.SIGKILL
    with Store(tmp_path / "m") as store:
        for user, count in done.items():
            held = [item.text for item in store.load(user)[0].items]
            assert held == [f"Fact {n} of {user}." for n in range(len(held))] and count <= len(held) <= count + 1


# --------------------------------------------------------------------------------------
# What cannot be
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no tokens"),
        ("short ada", "line 1 must hold a token of 16 characters or more"),
        ("0123456789abcdef", "line 1 must hold"),
        ("0123456789abcdef ada\n0123456789abcdef bob", "the token of line 2 stands there twice"),
    ],
)
def test_bad_tokens(tmp_path, text, message):
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        mcp_server.Tokens(tmp_path / "tokens")
    assert "abcdef" not in str(caught.value).removeprefix(f"--tokens={tmp_path}")  # Which holds the test's name.
