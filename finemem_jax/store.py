"""Memories on file, in SQLite: what was saved survives a kill, and half of it is never seen."""

from __future__ import annotations

import json
import pathlib
import sqlite3
from typing import Any

from finemem_jax.episode import Memory, MemoryItem

_TABLES = """
CREATE TABLE IF NOT EXISTS memories (name TEXT PRIMARY KEY, next_id INTEGER NOT NULL, state TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS items (
    name TEXT NOT NULL, item_id INTEGER NOT NULL, text TEXT NOT NULL, source_step INTEGER NOT NULL,
    source_operation INTEGER NOT NULL, memory_type TEXT NOT NULL, PRIMARY KEY (name, item_id)
);
"""
_BUSY_SECONDS = 30.0


class Store:
    """A file of memories by name. A context manager."""

    def __init__(self, path: pathlib.Path):
        """Opens the file, or makes it.

        Raises:
            ValueError: it is none of ours, or cannot be written.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=FULL")  # A power cut loses nothing that was saved.
            self._file.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"{path} cannot be used as a file of memories ({error}); name another one.") from error

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def load(self, name: str) -> tuple[Memory, dict[str, Any]]:
        """Returns a memory and the state saved with it; the empty memory and {} for an unknown name."""
        self._file.execute("BEGIN")  # Both queries see the same moment.
        try:
            found = self._file.execute("SELECT next_id, state FROM memories WHERE name = ?", (name,)).fetchone()
            rows = self._file.execute(
                "SELECT item_id, text, source_step, source_operation, memory_type FROM items WHERE name = ? "
                "ORDER BY item_id",
                (name,),
            ).fetchall()
        finally:
            self._file.execute("COMMIT")
        if found is None:
            return Memory(), {}
        return Memory(tuple(MemoryItem(*row) for row in rows), found[0]), json.loads(found[1])

    def save(self, name: str, memory: Memory, state: dict[str, Any]) -> None:
        """Puts a memory in the place of the one of that name, with a state that is plain JSON; all or nothing."""
        held = {row[0]: row for row in self._file.execute(
            "SELECT item_id, text, source_step, source_operation, memory_type FROM items WHERE name = ?", (name,)
        )}  # fmt: skip
        now = {
            item.item_id: (item.item_id, item.text, item.source_step, item.source_operation, item.memory_type)
            for item in memory.items
        }
        gone = [(name, item_id) for item_id in held if item_id not in now]
        changed = [(name, *row) for item_id, row in now.items() if held.get(item_id) != row]
        self._file.execute("BEGIN IMMEDIATE")
        try:
            self._file.executemany("DELETE FROM items WHERE name = ? AND item_id = ?", gone)
            self._file.executemany("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?, ?)", changed)
            self._file.execute(
                "INSERT OR REPLACE INTO memories VALUES (?, ?, ?)", (name, memory.next_id, json.dumps(state))
            )
        except BaseException:
            self._file.execute("ROLLBACK")
            raise
        self._file.execute("COMMIT")
