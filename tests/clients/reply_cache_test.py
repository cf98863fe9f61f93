"""Tests of finemem_jax/clients/reply_cache.py: what was asked once is not asked again, and the file stays small."""

import dataclasses
import random
import sqlite3
import subprocess
import sys
import threading

import pytest

from finemem_jax.clients import reply_cache
from finemem_jax.clients.reply_cache import Cached, ReplyCache, key_of
from finemem_jax.runtime import workers
from finemem_jax.types import Chat, Message

CHAT = Chat((Message("system", ("Be brief.",)), Message("user", ("Where?", "Now"))), 5, 0.1, 1)
LARGE = 10**9


@pytest.fixture
def file(tmp_path):
    opened = ReplyCache(tmp_path / "folder" / "answers.sqlite", LARGE)
    yield opened
    opened.close()


def question(i):
    return dataclasses.replace(CHAT, messages=(Message("user", (f"question {i}",)),))


class Asked:
    """A worker that says what it is asked in capitals, and notes it."""

    def __init__(self):
        self.chats = []
        self._worker = workers.Batched(self._answer)
        self.submit, self.collect, self.cancel = self._worker.submit, self._worker.collect, self._worker.cancel

    def _answer(self, chats):
        self.chats += chats
        return [chat.messages[-1].parts[0].upper() for chat in chats]


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(CHAT, max_new_tokens=6),
        dataclasses.replace(CHAT, temperature=0.0),
        dataclasses.replace(CHAT, seed=2),
        dataclasses.replace(CHAT, messages=CHAT.messages[1:]),
        dataclasses.replace(CHAT, messages=(CHAT.messages[0], Message("assistant", ("Where?", "Now")))),
        # Another division of the same text may have other tokens.
        dataclasses.replace(CHAT, messages=(CHAT.messages[0], Message("user", ("Where?Now",)))),
        dataclasses.replace(CHAT, messages=(Message("system", ("Be brief.", "user", "Where?", "Now")),)),
    ],
)
def test_all_that_decides_a_reply_is_in_its_key(other):
    assert key_of("m", CHAT) == key_of("m", dataclasses.replace(CHAT))
    assert key_of("m", CHAT) != key_of("m", other)
    assert key_of("m", CHAT) != key_of("n", CHAT)


def test_a_key_is_the_same_everywhere():
    # Files outlive programs: should this fail, they are all forgotten.
    assert key_of("m", CHAT).hex() == "f8309107378d4f8741dd1cebf4ca1035"


@pytest.mark.parametrize("text", ["Oslo", "", " a\nb\0c ", "é 漢字 🎉", "\ud800 alone", "x" * 100_000])
def test_what_is_put_can_be_got(file, text):
    file.put({b"k": text})
    assert file.get(b"k") == text and file.get(b"other") is None


def test_the_first_reply_stays(file):
    file.put({b"k": "first", b"l": "other"})
    file.put({b"k": "second"})
    assert (file.get(b"k"), len(file)) == ("first", 2)


def test_it_is_there_after_it_was_closed(tmp_path):
    for i in range(3):
        file = ReplyCache(tmp_path / "a.sqlite", LARGE)
        assert len(file) == i
        file.put({b"%d" % i: "x"})
        file.close()


def test_a_worker_is_asked_what_is_not_on_file(file):
    asked = Asked()
    cached = Cached(asked, file, "m")
    assert workers.run_all(cached, [question(0), question(1)]) == ["QUESTION 0", "QUESTION 1"]
    assert (cached.hits, cached.misses) == (0, 2)
    # What is on file does not wait for what is not.
    request_ids = [cached.submit(question(i)) for i in (2, 1)]
    assert cached.collect() == [(request_ids[1], "QUESTION 1")]
    assert cached.collect() == [(request_ids[0], "QUESTION 2")]
    assert cached.collect() == [] and asked.chats == [question(0), question(1), question(2)]
    # And a second run asks nothing, but another model does.
    again, other = Cached(asked, file, "m"), Cached(asked, file, "n")
    assert workers.run_all(again, [question(2), question(0)]) == ["QUESTION 2", "QUESTION 0"]
    assert (again.hits, again.misses, len(asked.chats)) == (2, 0, 3)
    workers.run_all(other, [question(0)])
    assert len(asked.chats) == 4


def test_what_another_has_stored_is_not_stored_again(file):
    cached = Cached(Asked(), file, "m", stores=False)
    assert workers.run_all(cached, [question(0)]) == ["QUESTION 0"] and len(file) == 0
    file.keep("m", question(0), "Kept")
    assert workers.run_all(cached, [question(0)]) == ["Kept"]


def test_taking_back(file):
    asked = Asked()
    cached = Cached(asked, file, "m")
    workers.run_all(cached, [question(0)])
    known, unknown, other = (cached.submit(question(i)) for i in (0, 1, 2))
    assert cached.cancel(known) and cached.cancel(unknown) and not cached.cancel(unknown)
    assert cached.collect(wait=False) == []
    assert cached.collect() == [(other, "QUESTION 2")]
    assert not cached.cancel(other) and question(1) not in asked.chats


def test_the_file_stays_small_and_keeps_what_is_used(tmp_path):
    limit = 400_000
    path = tmp_path / "a.sqlite"
    file, rng = ReplyCache(path, limit), random.Random(0)
    for i in range(3000):
        file.put({b"%d" % i: rng.randbytes(rng.randrange(600)).hex()})
        assert i < 7 or file.get(b"7") is not None, "what is asked for again and again stays"
    assert 400 < len(file) < 1000
    file.close()
    assert path.stat().st_size < 1.2 * limit
    # The newest are there, the oldest are not.
    file = ReplyCache(path, limit)
    assert file.get(b"2999") is not None and file.get(b"8") is None
    # A reply above the limit is no reason to fail.
    file.put({b"large": "x" * limit})
    file.put({b"small": "x"})
    assert file.get(b"small") == "x" and file.get(b"large") is None
    file.close()


def test_uses_are_noted_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(reply_cache, "_NOTED_TOGETHER", 3)
    file = ReplyCache(tmp_path / "a.sqlite", LARGE)
    file.put({b"%d" % i: "x" for i in range(5)})

    def order():
        with sqlite3.connect(tmp_path / "a.sqlite") as other:
            return [key for (key,) in other.execute("SELECT key FROM replies ORDER BY used, key")]

    assert file.get(b"0") and file.get(b"1")
    assert order()[0] == b"0"
    file.get(b"2")
    assert order()[:2] == [b"3", b"4"]
    file.get(b"3")
    file.close()
    assert order()[0] == b"4"


WRITER = """
import pathlib, sys
from finemem_jax.clients.reply_cache import ReplyCache
path, name, count = pathlib.Path(sys.argv[1]), sys.argv[2].encode(), int(sys.argv[3])
file = ReplyCache(path, 10**9)
for i in range(count):
    file.put({b"%s %d" % (name, i): f"{i}", b"shared %d" % i: f"{i}"})
    assert file.get(b"shared %d" % i) == f"{i}"
"""


def test_several_processes_write_at_once(tmp_path):
    path, count = tmp_path / "a.sqlite", 300
    command = [sys.executable, "-c", WRITER, str(path)]
    processes = [subprocess.Popen([*command, name, str(count)]) for name in ("a", "b", "c")]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    file = ReplyCache(path, LARGE)
    assert len(file) == 4 * count and file.get(b"b 299") == "299"
    file.close()


def test_threads_share_one(file):
    def write(name):
        for i in range(200):
            file.put({f"{name} {i}".encode(): f"{i}"})
            file.get(b"a 0")

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(file) == 800


def test_something_else_under_that_name(tmp_path):
    (tmp_path / "text").write_text("These are no answers. " * 200)
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE replies (name TEXT)")
    other.close()
    (tmp_path / "folder").mkdir()
    for name in ("text", "other", "folder", "text/inside"):
        with pytest.raises(ValueError, match=f"{name}.*name another"):
            ReplyCache(tmp_path / name, LARGE)
    assert (tmp_path / "text").read_text().startswith("These")


def test_no_room_is_said(tmp_path):
    path = tmp_path / "a.sqlite"
    file = ReplyCache(path, LARGE)
    file.put({b"k": "kept"})
    # SQLite's own limit fails as a full disk does.
    file._file.execute("PRAGMA max_page_count = 10")
    with pytest.raises(OSError, match=r"a.sqlite.* cannot be read or written .*full.*same command"):
        file.put({b"%d" % i: "x" * 5000 for i in range(20)})
    # All or nothing, and what was there is.
    assert (file.get(b"k"), file.get(b"0"), len(file)) == ("kept", None, 1)
    file.close()
