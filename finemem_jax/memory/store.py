"""Saves memories by name in a SQLite file: a kill loses nothing that was saved, and no update is lost."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

from finemem_jax.runtime.database import Database
from finemem_jax.types import Memory, MemoryItem

# Versions count all that was ever saved in the file: no number comes twice, not even after its memory was removed.
_TABLES = """
CREATE TABLE IF NOT EXISTS memories (name TEXT PRIMARY KEY, next_id INTEGER NOT NULL, state TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS items (
    name TEXT NOT NULL, item_id INTEGER NOT NULL, text TEXT NOT NULL, source_step INTEGER NOT NULL,
    source_operation INTEGER NOT NULL, memory_type TEXT NOT NULL, PRIMARY KEY (name, item_id)
);
CREATE TABLE IF NOT EXISTS versions (version INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE);
"""
_PRAGMAS = (
    "synchronous=FULL",  # A power cut loses nothing that was saved.
    "secure_delete=ON",  # What is forgotten is overwritten, not only marked as free.
)
# As a path: memories that are gone when the store is closed.
IN_PROCESS = pathlib.Path(":memory:")


class Conflict(Exception):
    """A memory is no longer the version that it was when it was read; read it again."""


class Saved(NamedTuple):
    """A memory as it stands on file.

    Attributes:
        state: What was saved with it; plain JSON.
        version: Changes with everything that is saved under the name; 0 if nothing is.
    """

    memory: Memory
    state: dict[str, Any]
    version: int


class Store:
    """A file of memories by name. A context manager. Threads may share one; each process opens its own."""

    def __init__(self, path: pathlib.Path):
        """Opens the file, or makes it.

        Raises:
            ValueError: it is none of ours, or cannot be written.
        """
        self._file = Database(path, _TABLES, holds="memories", pragmas=_PRAGMAS)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def load(self, name: str) -> tuple[Memory, dict[str, Any]]:
        """Returns a memory and the state saved with it; the empty memory and {} for an unknown name."""
        memory, state, _ = self.read(name)
        return memory, state

    def read(self, name: str) -> Saved:
        """Returns what is saved under a name, all of one moment; the empty memory for an unknown one."""
        with self._file.transaction("BEGIN"):
            found = self._file.execute("SELECT next_id, state FROM memories WHERE name = ?", (name,)).fetchone()
            rows, version = self._rows(name), self._version(name)
        if found is None:
            return Saved(Memory(), {}, version)
        return Saved(Memory(tuple(MemoryItem(*row) for row in rows), found[0]), json.loads(found[1]), version)

    def version(self, name: str) -> int:
        """The version of what is saved under a name; 0 if nothing is."""
        with self._file.transaction("BEGIN"):
            return self._version(name)

    def names(self) -> list[str]:
        """All names that a memory is saved under, in order."""
        with self._file.transaction("BEGIN"):
            return [name for (name,) in self._file.execute("SELECT name FROM memories ORDER BY name")]

    def save(self, name: str, memory: Memory, state: dict[str, Any], version: int | None = None) -> int:
        """Puts a memory in the place of the one of that name, with a state that is plain JSON; all or nothing.

        Args:
            version: Only if what stands there is still this one.

        Returns:
            The version that it is now.

        Raises:
            Conflict: it is no longer that version; nothing was changed.
            OSError: it cannot be written; the message names the file.
        """
        # Once looked at, the file must stay as it is: whoever wants to write waits from here on.
        with self._file.transaction():
            self._check(name, version)
            held = {row[0]: row for row in self._rows(name)}
            now = {
                item.item_id: (item.item_id, item.text, item.source_step, item.source_operation, item.memory_type)
                for item in memory.items
            }
            gone = [(name, item_id) for item_id in held if item_id not in now]
            changed = [(name, *row) for item_id, row in now.items() if held.get(item_id) != row]
            self._file.executemany("DELETE FROM items WHERE name = ? AND item_id = ?", gone)
            self._file.executemany("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?, ?)", changed)
            self._file.execute(
                "INSERT OR REPLACE INTO memories VALUES (?, ?, ?)", (name, memory.next_id, json.dumps(state))
            )
            self._file.execute("INSERT OR REPLACE INTO versions (name) VALUES (?)", (name,))
            return self._version(name)

    def remove(self, name: str, version: int | None = None) -> None:
        """Forgets a memory and its name.

        Args, Raises:
            As of `save`.
        """
        with self._file.transaction():
            self._check(name, version)
            for table in ("items", "memories", "versions"):
                self._file.execute(f"DELETE FROM {table} WHERE name = ?", (name,))

    def _rows(self, name: str) -> list[tuple[Any, ...]]:
        return self._file.execute(
            "SELECT item_id, text, source_step, source_operation, memory_type FROM items WHERE name = ? "
            "ORDER BY item_id",
            (name,),
        ).fetchall()

    def _version(self, name: str) -> int:
        found = self._file.execute("SELECT version FROM versions WHERE name = ?", (name,)).fetchone()
        return found[0] if found else 0

    def _check(self, name: str, version: int | None) -> None:
        if version is not None and version != self._version(name):
            raise Conflict(f"The memory {name!r} is no longer version {version}; read it again.")
