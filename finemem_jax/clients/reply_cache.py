"""Keeps what models have said in a file, so that it need not be asked for again, shared by runs and processes.

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
from finemem_jax.runtime.workers import Pending, Worker
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
    """Makes the key that a reply is stored under."""
    messages = [[message.role, *message.parts] for message in chat.messages]
    text = json.dumps([model, messages, chat.max_new_tokens, chat.temperature, chat.seed])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class ReplyCache:
    """The file. Threads may share one of these; each process opens its own."""

    def __init__(self, path: pathlib.Path, max_bytes: int):
        """Opens the file, or makes it.

        Args:
            max_bytes: The least recently used replies go when the file would hold more. It does not shrink: what is
                free in it is used again.

        Raises:
            ValueError: there is something else under that name, or it cannot be written.
        """
        self._max_bytes = max_bytes
        self._used: set[bytes] = set()
        self._file = Database(path, _SCHEMA, holds="replies", pragmas=_PRAGMAS)

    def get(self, key: bytes) -> str | None:
        """Returns the reply under a key, if there is one."""
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

    def keep(self, model: str, chat: Chat, reply: str) -> None:
        """Stores one reply; for who has it before it is collected (`endpoint.Endpoint`). Raises as `put` does."""
        self.put({key_of(model, chat): reply})

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

    def _note_uses(self) -> None:
        used, self._used = self._used, set()
        with self._file.transaction():
            self._write_uses(used)

    def _write_uses(self, used: set[bytes]) -> None:
        self._file.executemany("UPDATE replies SET used = ? WHERE key = ?", [(time.time(), key) for key in used])

    def _bytes(self) -> int:
        """Counts the bytes of the file that are in use."""
        size, pages, free = (
            self._file.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "page_count", "freelist_count")
        )
        return size * (pages - free)

    def _make_room(self) -> None:
        self._write_uses(self._used)
        self._used = set()
        share = 1 - _KEPT * self._max_bytes / self._bytes()
        oldest = "SELECT key FROM replies ORDER BY used LIMIT ?"
        while (count := len(self)) and self._bytes() > _KEPT * self._max_bytes:
            self._file.execute(f"DELETE FROM replies WHERE key IN ({oldest})", (max(int(share * count), 1),))


class Cached:
    """A worker that asks another only what is not on file, and stores what that one replies.

    Attributes:
        hits, misses: How many chats were on file, and how many were not.
    """

    def __init__(self, worker: Worker[Chat, str], replies: ReplyCache, model: str, *, stores: bool = True):
        """Puts the file in front of the worker.

        Args:
            model: Name of who replies, with all that decides what is replied.
            stores: Whether replies are stored when they are collected; False where the worker stores them earlier
                itself (`endpoint.Endpoint`).
        """
        self.hits = self.misses = 0
        self._replies, self._model, self._stores = replies, model, stores
        self._last_id = 0
        # Our own request ids: of what has a reply, and of what the worker has been asked, with its id of that.
        self._ready: dict[int, str] = {}
        self._asked: dict[int, int] = {}
        self._pending: Pending[Chat, str, tuple[int, bytes]] = Pending(worker)

    def submit(self, chat: Chat) -> int:
        self._last_id += 1
        key = key_of(self._model, chat)
        reply = self._replies.get(key)
        if reply is not None:
            self.hits += 1
            self._ready[self._last_id] = reply
        else:
            self.misses += 1
            self._asked[self._last_id] = self._pending.submit(chat, (self._last_id, key))
        return self._last_id

    def collect(self, wait: bool = True) -> list[tuple[int, str]]:
        replied = self._pending.collect(wait and not self._ready)
        if replied and self._stores:
            self._replies.put({key: reply for (_, key), reply in replied})
        for (request_id, _), reply in replied:
            del self._asked[request_id]
            self._ready[request_id] = reply
        ready, self._ready = self._ready, {}
        return list(ready.items())

    def cancel(self, request_id: int) -> bool:
        if request_id in self._asked:
            return self._pending.cancel(self._asked.pop(request_id))
        return self._ready.pop(request_id, None) is not None
