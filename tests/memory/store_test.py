"""Tests of finemem_jax/memory/store.py: what was saved is there again, whole, after a kill and beside other writers."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading

import pytest

from finemem_jax.memory import store as store_lib
from finemem_jax.memory.store import Conflict, Saved, Store
from finemem_jax.types import Memory, MemoryItem

MEMORY = Memory((MemoryItem(1, "Ada – Oslo", 0), MemoryItem(3, "x", 2, 1, "semantic")), 7)


def test_what_was_saved_is_there_again(tmp_path):
    with Store(tmp_path / "deep" / "m.sqlite") as store:
        assert store.load("a") == (Memory(), {})
        store.save("a", MEMORY, {"offset": 5, "of": ["é"]})
        store.save("b", Memory(next_id=2), {})
    with Store(tmp_path / "deep" / "m.sqlite") as store:
        assert store.load("a") == (MEMORY, {"offset": 5, "of": ["é"]})
        assert store.load("b") == (Memory(next_id=2), {})


def test_saving_again_replaces(tmp_path):
    with Store(tmp_path / "m.sqlite") as store:
        store.save("a", MEMORY, {"n": 1})
        later = Memory((MemoryItem(3, "y", 4, 0, "semantic"), MemoryItem(7, "new", 4, 1)), 8)
        store.save("a", later, {"n": 2})
        assert store.load("a") == (later, {"n": 2})


def test_what_cannot_be_saved_changes_nothing(tmp_path):
    with Store(tmp_path / "m.sqlite") as store:
        store.save("a", MEMORY, {})
        with pytest.raises(TypeError):
            store.save("a", Memory(), {"n": object()})
        assert store.load("a") == (MEMORY, {})


def test_only_the_version_that_was_read_is_replaced(tmp_path):
    with Store(tmp_path / "m.sqlite") as store, Store(tmp_path / "m.sqlite") as other:
        assert store.read("a") == Saved(Memory(), {}, 0)
        first = store.save("a", MEMORY, {}, 0)
        assert other.read("a") == Saved(MEMORY, {}, first) and other.version("a") == first > 0
        second = other.save("a", Memory(), {"n": 2}, first)
        for change in (lambda: store.save("a", MEMORY, {}, first), lambda: store.remove("a", first)):
            with pytest.raises(Conflict, match="'a' is no longer version"):
                change()
        assert store.read("a") == Saved(Memory(), {"n": 2}, second)
        store.save("a", MEMORY, {})
        assert store.version("a") > second


def test_a_name_that_was_removed_has_no_old_version_again(tmp_path):
    with Store(tmp_path / "m.sqlite") as store:
        versions = [store.save("a", MEMORY, {}), store.save("b", MEMORY, {})]
        assert store.names() == ["a", "b"]
        store.remove("b", versions[1])
        assert store.names() == ["a"] and store.read("b") == Saved(Memory(), {}, 0)
        store.remove("b")
        assert store.save("b", MEMORY, {}, 0) not in versions


def test_memories_in_process_are_each_stores_own():
    with Store(store_lib.IN_PROCESS) as store, Store(store_lib.IN_PROCESS) as other:
        store.save("a", MEMORY, {})
        assert (store.names(), other.names()) == (["a"], [])


def test_a_closed_store_says_so(tmp_path):
    with Store(tmp_path / "m.sqlite") as store:
        pass
    with pytest.raises(OSError, match="m.sqlite.* cannot be read or written .*closed"):
        store.names()


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "m.sqlite"
    path.write_text("not a database, but long enough to be looked at as one" * 50)
    with pytest.raises(ValueError, match=r"m.sqlite cannot be used as a file of memories .*name another one"):
        Store(path)


def test_a_kill_leaves_the_last_memory_whole(tmp_path):
    """Every memory that is saved holds n items that say n; whatever is found after kill -9 must agree with itself."""
    program = textwrap.dedent(
        """
        import pathlib, sys
        from finemem_jax.types import Memory, MemoryItem
        from finemem_jax.memory.store import Store
        with Store(pathlib.Path(sys.argv[1])) as store:
            n = store.load("a")[1].get("n", 0)
            while True:
                n += 1
                items = tuple(MemoryItem(i, f"says {n}", n) for i in range(1, n % 50 + 2))
                store.save("a", Memory(items, n + 60), {"n": n})
                print(n, flush=True)
        """
    )
    path = tmp_path / "m.sqlite"
    last = 0
    for round_ in range(3):
        process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(20 + 7 * round_)][-1]
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        with Store(path) as store:
            memory, state = store.load("a")
        n = state["n"]
        assert n >= said > last and {item.text for item in memory.items} == {f"says {n}"}
        assert len(memory.items) == n % 50 + 1 and memory.next_id == n + 60
        last = said


def test_several_writers_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "m.sqlite"
    Store(path).__exit__()
    failed = []

    def write(name):
        try:
            with Store(path) as store:
                for n in range(40):
                    store.save(name, Memory((MemoryItem(1, f"{name} {n}", n),), 2), {"n": n})
                    assert store.load(name)[0].items[0].text == f"{name} {n}"
        except (AssertionError, sqlite3.Error) as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(f"user {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    with Store(path) as store:
        assert [store.load(f"user {i}")[1]["n"] for i in range(4)] == [39] * 4
