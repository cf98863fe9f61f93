"""Tests of finemem_jax/clients/endpoint.py against servers that fail on purpose: nothing is lost, or made up."""

import collections
import datetime
import email.utils
import os
import signal
import subprocess
import sys
import time

import pytest

from fault_server import FAULTS, FaultServer, ask_all, chat, reply_to
from finemem_jax.clients import endpoint, reply_cache
from finemem_jax.clients.endpoint import Endpoint, EndpointError
from finemem_jax.config.sections import Server
from finemem_jax.runtime import workers

KEY = "sk-9f3e-very-secret/4477"


def options(*servers, **more):
    urls = ",".join(server.url for server in servers)
    return Server(urls=urls, model="a-model", **{"call_seconds": 0.5} | more)


# --------------------------------------------------------------------------------------
# What is sent, and how much of it at a time
# --------------------------------------------------------------------------------------


def test_what_a_server_gets(monkeypatch):
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    more = {"key_variable": "MY_KEY", "extra": '{"top_p": 0.5}'}
    with FaultServer() as server, Endpoint(options(server, **more)) as client:
        request_id = client.submit(chat("Where?", temperature=0.1, seed=3))
        assert client.collect() == [(request_id, reply_to("Where?"))]
        assert client.collect() == []
        stats, later = client.take_stats(), client.take_stats()
    assert server.bodies == [
        {
            "model": "a-model",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}],
            "max_tokens": 5,
            "temperature": 0.1,
            "seed": 3,
            "top_p": 0.5,
        }
    ]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert (stats.answered, stats.tries, stats.faults) == (1, 1, {})
    assert (stats.prompt_tokens, stats.new_tokens) == (5, 2) and stats.call_seconds > 0
    assert later == endpoint.EndpointStats()


def test_no_key_no_header(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FaultServer() as server, Endpoint(options(server)) as client:
        ask_all(client, 1)
    assert "authorization" not in server.headers[0]


def test_texts_that_have_no_utf8_form():
    with FaultServer() as server, Endpoint(options(server)) as client:
        ask_all(client, 1)
        client.submit(chat("half \ud83d a pair, and 漢字 🎉"))
        assert client.collect()[0][1] == reply_to("half ? a pair, and 漢字 🎉")


def test_so_many_are_asked_at_a_time():
    with FaultServer(latency=0.02) as server, Endpoint(options(server, concurrency=5)) as client:
        ask_all(client, 40)
        assert server.most_in_flight == 5


def test_requests_keep_to_their_pace():
    # 1,200 a minute are one in 50 ms.
    with FaultServer() as server, Endpoint(options(server, requests_per_minute=1200)) as client:
        ask_all(client, 6)
    gaps = [b - a for a, b in zip(server.moments, server.moments[1:], strict=False)]
    assert sum(gaps) > 0.2  # A first one that comes late makes it less than 0.25.


def test_tokens_keep_to_their_pace():
    tokens = endpoint._estimated_tokens(chat("x" * 300))
    assert tokens == 5 + 309 / 3
    # Each takes 100 ms of a budget of ten times as many a second.
    with FaultServer() as server, Endpoint(options(server, tokens_per_minute=600 * tokens)) as client:
        workers.run_all(client, [chat("x" * 299 + str(i)) for i in range(4)])
    assert server.moments[-1] - server.moments[0] > 0.2


def test_replies_are_collected_while_others_are_asked():
    with FaultServer(latency=0.05) as server, Endpoint(options(server, concurrency=1)) as client:
        request_ids = [client.submit(chat(text)) for text in "abc"]
        assert client.collect(wait=False) == []
        assert client.collect() == [(request_ids[0], reply_to("a"))]
        # The other two need nobody to wait for them.
        time.sleep(0.5)
        assert dict(client.collect(wait=False)) == {request_ids[1]: reply_to("b"), request_ids[2]: reply_to("c")}


def test_what_is_taken_back_is_not_asked():
    with FaultServer(latency=0.05) as server, Endpoint(options(server, concurrency=1)) as client:
        request_ids = [client.submit(chat(text)) for text in "abcd"]
        assert client.cancel(request_ids[2]) and not client.cancel(request_ids[2])
        assert client.cancel(request_ids[0])
        replies = {}
        while found := client.collect():
            replies |= found
        assert replies == {request_ids[1]: reply_to("b"), request_ids[3]: reply_to("d")}
        assert "c" not in server.asked and not client.cancel(request_ids[1])


def test_closing_gives_up_what_is_asked():
    with FaultServer(latency=120) as server:
        client = Endpoint(options(server, call_seconds=100))
        client.submit(chat("a"))
        began = time.monotonic()
        client.close()
        client.close()
        assert time.monotonic() - began < 60
        assert client.collect() == []


# --------------------------------------------------------------------------------------
# Faults
# --------------------------------------------------------------------------------------


def test_2000_questions_through_all_faults():
    """What it costs in time is benchmarks/faults.py's to say."""
    with FaultServer(0.3, seed=1, latency=0.01) as server, Endpoint(options(server, concurrency=16)) as client:
        assert ask_all(client, 2000) == [reply_to(f"question {i}") for i in range(2000)]
        stats = client.take_stats()
    # One that timed out may never have come to the server.
    assert stats.answered == 2000 and server.asked.total() <= stats.tries
    # Each kind of fault was met.
    assert set(server.met) == {"", *FAULTS} and stats.tries > 1.2 * 2000
    assert {"timeout", "connection", "429", "500", "502", "malformed"} == set(stats.faults)


def test_a_reply_that_comes_twice_answers_nothing_else():
    """Over a connection that is used again, the second copy is taken for the next reply: why none is, by default."""
    wrong = {}
    for keep_alive in (False, True):
        with FaultServer(1.0, faults=("twice",)) as server:
            with Endpoint(options(server, concurrency=4, keep_alive=keep_alive)) as client:
                replies = ask_all(client, 200)
        wrong[keep_alive] = sum(reply != reply_to(f"question {i}") for i, reply in enumerate(replies))
    assert wrong[False] == 0
    # Should this ever fail, connections may be kept.
    assert wrong[True] > 0


@pytest.mark.parametrize("fault", ["timeout", "reset", "429", "500", "502", "half", "html", "json", "shape"])
def test_a_server_that_is_down_for_good(fault, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FaultServer(1.0, faults=(fault,)) as server:
        with Endpoint(options(server, call_seconds=0.1, total_seconds=0.6)) as client:
            client.submit(chat("Where?"))
            with pytest.raises(EndpointError) as caught:
                client.collect()
            # Given up, not forgotten: nothing else is pending.
            assert client.collect() == []
            stats = client.take_stats()
    message = str(caught.value)
    assert server.url in message and f"{stats.tries} tr" in message and "'a-model'" in message
    assert KEY not in message and stats.answered == 0
    if fault.isdecimal():
        assert f"answered {fault}" in message and "Bearer (key)" in message
    if fault == "html":
        assert "Welcome to nginx" in message


def test_nobody_listens():
    with Endpoint(Server(urls="http://127.0.0.1:9/v1", model="m", total_seconds=0.2)) as client:
        client.submit(chat("Where?"))
        with pytest.raises(EndpointError, match=r"127.0.0.1:9.*Connect.*the same command goes on"):
            client.collect()


@pytest.mark.parametrize(("status", "remedy"), [("401", "OPENAI_API_KEY"), ("404", "/v1"), ("400", "Asking again")])
def test_what_another_try_cannot_change(status, remedy):
    with FaultServer(1.0, faults=(status,)) as server, Endpoint(options(server)) as client:
        client.submit(chat("Where?"))
        with pytest.raises(EndpointError, match=f"answered {status}.*{remedy}"):
            client.collect()
        assert server.asked.total() == 1


def test_who_waits_can_be_called_away():
    """Ctrl-C and SIGTERM are looked for while servers are silent; what was asked goes on."""
    with FaultServer(latency=1.2) as server, Endpoint(options(server, call_seconds=20.0)) as client:

        def stop():
            raise KeyboardInterrupt

        client.submit(chat("question 0"))
        client.poll = stop
        with pytest.raises(KeyboardInterrupt):
            client.collect()
        client.poll = lambda: True
        assert client.collect() == []
        client.poll = lambda: None
        assert len(client.collect()) == 1 and server.asked.total() == 1


def test_one_that_cannot_be_answered_leaves_the_others():
    with FaultServer(latency=0.02) as server, Endpoint(options(server)) as client:
        server.refuses = "question 3"
        request_ids = {client.submit(chat(f"question {i}")): i for i in range(6)}
        replies, errors = {}, 0
        # The refusal may come last; with nothing left to come, `collect` returns at once.
        for _ in range(100):
            if len(replies) + errors == 6:
                break
            try:
                replies |= {request_ids[request_id]: reply for request_id, reply in client.collect()}
            except EndpointError:
                errors += 1
        assert errors == 1 and replies == {i: reply_to(f"question {i}") for i in range(6) if i != 3}


def test_retry_after_is_honoured():
    with FaultServer(1.0, faults=("429",), retry_after="1") as server, Endpoint(options(server)) as client:
        client.submit(chat("Where?"))
        time.sleep(0.5)
        server.share = 0.0
        assert client.collect()[0][1] == reply_to("Where?")
    assert server.asked["Where?"] == 2
    assert 1.0 <= server.moments[1] - server.moments[0] < 2.5


def test_retry_after_as_servers_write_it():
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)
    assert 28 < endpoint._retry_after(email.utils.format_datetime(soon, usegmt=True)) <= 30
    values = {"7": 7, "0.5": 0.5, "-3": 0, "inf": 0, "nan": 0, "": 0, "soon": 0, "Sun, 06 Nov 1994 08:49:37 GMT": 0}
    assert {value: endpoint._retry_after(value) for value in values} == values


def test_another_server_takes_over():
    with FaultServer(latency=0.005) as good, FaultServer() as bad:
        bad.down = True
        with Endpoint(options(bad, good, concurrency=8)) as client:
            assert ask_all(client, 300) == [reply_to(f"question {i}") for i in range(300)]
            # It was left alone soon.
            assert 1 <= bad.asked.total() < 30
            bad.down = False
            deadline = time.monotonic() + 20
            before = bad.asked.total()
            while bad.asked.total() < before + 20 and time.monotonic() < deadline:
                ask_all(client, 50)
            assert bad.asked.total() >= before + 20, "a server that is well again gets its share"


def test_the_time_of_a_chat_begins_with_its_own_turn():
    """Many chats wait much longer than one may take."""
    with FaultServer(latency=0.1) as server:
        with Endpoint(options(server, concurrency=1, total_seconds=1)) as client:
            ask_all(client, 20)


# --------------------------------------------------------------------------------------
# Keys, settings, kills
# --------------------------------------------------------------------------------------


def test_no_reply_shows_the_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FaultServer() as server, Endpoint(options(server)) as client:
        client.submit(chat(f"say {KEY}"))
        assert client.collect()[0][1] == "answer to say (key)"
        # Also where the quotation ends in the middle of it.
        assert KEY[:6] not in client._quoted("x" * (endpoint._QUOTED - 6) + KEY)


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ("", "needs a URL"),
        ("localhost:8000", "no URL of a server"),
        ("ftp://localhost/v1", "no URL of a server"),
        ("http://[::1/v1", "no URL"),
        ("http://user:sk-9f3e@localhost/v1", "at 'localhost' holds a password.*OPENAI_API_KEY"),
        (f"http://user:{KEY}@localhost/v1?x", "'localhost/v1' is no URL"),
        (f"http://localhost/v1?key={KEY}", "at 'localhost' holds a password"),
    ],
)
def test_urls_that_cannot_be(urls, message):
    with pytest.raises(ValueError, match=message) as caught:
        Endpoint(Server(urls=urls, model="m"))
    assert "sk-" not in str(caught.value)


def test_keys_that_cannot_be(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\nX-Other: header")
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds characters") as caught:
        Endpoint(Server(urls="http://localhost/v1", model="m"))
    assert "sk-" not in str(caught.value)


KILLED = """
import pathlib, sys
sys.path[:0] = ["tests"]
from finemem_jax.clients import endpoint, reply_cache as answers
from finemem_jax.config.sections import Server
import fault_server
url, path, count = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
file = answers.ReplyCache(path, 10**9)
keep = lambda chat, reply: file.keep("m", chat, reply)
with endpoint.Endpoint(Server(urls=url, model="m", concurrency=8), keep) as client:
    worker = answers.Cached(client, file, "m", stores=False)
    print(*fault_server.ask_all(worker, count), sep="\\n")
print("misses", worker.misses)
"""


def test_kill_9_in_the_middle(tmp_path):
    """What has been answered is on file, however the program ends: only what was in the air is asked again."""
    count, path = 2000, tmp_path / "answers.sqlite"
    with FaultServer(latency=0.005) as server:
        command = [sys.executable, "-c", KILLED, server.url, str(path), str(count)]
        kills = 0
        for wanted in (300, 1200):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            deadline = time.monotonic() + 60
            while server.answered.total() < wanted and time.monotonic() < deadline:
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            kills += 1
        stored = len(file := reply_cache.ReplyCache(path, 10**9))
        file.close()
        # A reply may be on its way when the program ends; there are at most as many as are asked at a time.
        assert server.answered.total() - 8 * kills <= stored < count
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    *replies, misses = done.stdout.splitlines()
    assert replies == [reply_to(f"question {i}") for i in range(count)]
    assert misses == f"misses {count - stored}"
    again = collections.Counter(server.answered.values())
    assert set(again) <= {1, 2, 3} and server.answered.total() <= count + 8 * kills
