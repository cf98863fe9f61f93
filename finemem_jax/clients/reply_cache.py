"""Replies that need not be asked for again: a file of what models have said, shared by runs and processes.

A reply belongs to a model and a chat (messages, length, temperature and seed); whoever asks the same again gets it
without asking. SQLite in WAL mode: several processes may read and write at once, and what was stored before a kill is
there after it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import time
from collections.abc import Mapping

from finemem_jax.runtime.database import Database
from finemem_jax.runtime.workers import Worker
from finemem_jax.types import Chat

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, text BLOB NOT NULL, used REAL NOT NULL);
CREATE INDEX IF NOT EXISTS by_use ON replies (used);
SELECT key, text, used FROM replies LIMIT 1;
"""
# What a crash of the machine takes are the last replies only; a crash of the process takes none.
_PRAGMAS = ("synchronous=NORMAL",)
# A file that has reached its limit is emptied to this part of it, so that this is not done for every reply.
_KEPT = 0.9
# Uses are noted so many at a time: a write for every read would make reading slow.
_NOTED_TOGETHER = 1000


def key_of(model: str, chat: Chat) -> bytes:
    """What a reply is stored under."""
    messages = [[message.role, *message.parts] for message in chat.messages]
    text = json.dumps([model, messages, chat.max_new_tokens, chat.temperature, chat.seed])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class ReplyCache:
    """The file. Threads may share one of these; each process opens its own."""

    def __init__(self, path: pathlib.Path, max_bytes: int):
        """Args:
        max_bytes: The least recently used replies go when the file would hold more. It does not shrink: what is free
            in it is used again.

        Raises:
            ValueError: there is something else under that name, or it cannot be written.
        """
        self._max_bytes = max_bytes
        self._used: set[bytes] = set()
        self._file = Database(path, _SCHEMA, holds="replies", pragmas=_PRAGMAS)

    def get(self, key: bytes) -> str | None:
        """The reply under a key, if there is one."""
        with self._file.lock:
            found = self._file.execute("SELECT text FROM replies WHERE key = ?", (key,)).fetchone()
            if found is None:
                return None
            self._used.add(key)
            if len(self._used) >= _NOTED_TOGETHER:
                self._note_uses()
        return found[0].decode("utf-8", "surrogatepass")

    def put(self, replies: Mapping[bytes, str]) -> None:
        """Stores replies; what is under a key already stays. They are on file when this returns.

        Raises:
            OSError: they cannot be written; the message names the file.
        """
        now = time.time()
        rows = [(key, text.encode("utf-8", "surrogatepass"), now) for key, text in replies.items()]
        with self._file.transaction():
            self._file.executemany("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", rows)
            if self._bytes() > self._max_bytes:
                self._make_room()

    def __len__(self) -> int:
        with self._file.lock:
            return self._file.execute("SELECT count(*) FROM replies").fetchone()[0]

    def close(self) -> None:
        """Notes what was used, and closes the file."""
        with self._file.lock:
            # Only uses may be lost here, which say what to forget first.
            with contextlib.suppress(OSError):
                self._note_uses()
            self._file.close()

    def _note_uses(self):
        used, self._used = self._used, set()
        with self._file.transaction():
            self._file.executemany("UPDATE replies SET used = ? WHERE key = ?", [(time.time(), key) for key in used])

    def _bytes(self):
        """What is in use of the file."""
        size, pages, free = (
            self._file.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "page_count", "freelist_count")
        )
        return size * (pages - free)

    def _make_room(self):
        used, self._used = self._used, set()
        self._file.executemany("UPDATE replies SET used = ? WHERE key = ?", [(time.time(), key) for key in used])
        share = 1 - _KEPT * self._max_bytes / self._bytes()
        oldest = "SELECT key FROM replies ORDER BY used LIMIT ?"
        while (count := len(self)) and self._bytes() > _KEPT * self._max_bytes:
            self._file.execute(f"DELETE FROM replies WHERE key IN ({oldest})", (max(int(share * count), 1),))


class Cached:
    """A worker that asks another only what is not on file, and stores what that one replies.

    Attributes:
        hits, misses: How many chats were on file, and how many were not.
    """

    def __init__(self, worker: Worker[Chat, str], answers: ReplyCache, model: str, stores: bool = True):
        """Args:
        model: Name of who replies, with all that decides what is replied.
        stores: Whether replies are stored when they are collected; False where the worker is given `keep`.
        """
        self.hits = self.misses = 0
        self._worker, self._answers, self._model, self._stores = worker, answers, model, stores
        self._last_id = 0
        self._ready: dict[int, str] = {}
        # What the worker has been given, by its request_ids, and the other way round.
        self._asked: dict[int, tuple[int, bytes]] = {}
        self._asked_as: dict[int, int] = {}

    def submit(self, chat: Chat) -> int:
        self._last_id += 1
        key = key_of(self._model, chat)
        reply = self._answers.get(key)
        if reply is not None:
            self.hits += 1
            self._ready[self._last_id] = reply
        else:
            self.misses += 1
            asked = self._worker.submit(chat)
            self._asked[asked], self._asked_as[self._last_id] = (self._last_id, key), asked
        return self._last_id

    def collect(self, wait: bool = True) -> list[tuple[int, str]]:
        if self._asked:
            replies = self._worker.collect(wait and not self._ready)
            if replies and self._stores:
                self._answers.put({self._asked[asked][1]: reply for asked, reply in replies})
            for asked, reply in replies:
                request_id, _ = self._asked.pop(asked)
                del self._asked_as[request_id]
                self._ready[request_id] = reply
        ready, self._ready = self._ready, {}
        return list(ready.items())

    def cancel(self, request_id: int) -> bool:
        if request_id in self._asked_as:
            asked = self._asked_as.pop(request_id)
            del self._asked[asked]
            return self._worker.cancel(asked)
        return self._ready.pop(request_id, None) is not None


def keep(answers: ReplyCache, model: str, chat: Chat, reply: str) -> None:
    """Stores a reply; for who has it before it is collected (`endpoint.Endpoint`)."""
    answers.put({key_of(model, chat): reply})
