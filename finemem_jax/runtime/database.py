"""Opens SQLite files that threads and processes share, and reads and writes them in transactions."""

from __future__ import annotations

import contextlib
import pathlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence

# How long one process waits for another that is writing (s).
_BUSY_SECONDS = 60.0


class Database:
    """A SQLite file in WAL mode: several may read while one writes. Threads may share one; each process opens its own.

    Attributes:
        lock: Held during every transaction; whoever reads outside of one holds it too.
        execute, executemany: Those of `sqlite3.Connection`.
    """

    def __init__(self, path: pathlib.Path, schema: str, *, holds: str, pragmas: Sequence[str] = ()):
        """Opens the file, or makes it.

        Args:
            schema: Statements that make the tables where they are missing, or fail where the file has others.
            holds: What the file is for, e.g. "memories"; for messages.
            pragmas: Further settings of the connection.

        Raises:
            ValueError: the file holds something else, or cannot be written.
        """
        self._path, self._holds = path, holds
        self.lock = threading.RLock()
        with contextlib.ExitStack() as opening:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                # isolation_level=None: transactions begin and end where `transaction` says.
                file = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
                opening.callback(file.close)
                for pragma in ("journal_mode=WAL", *pragmas):
                    file.execute(f"PRAGMA {pragma}")
                file.executescript(schema)
            except (OSError, sqlite3.Error) as error:
                raise ValueError(
                    f"{path} cannot be used as a file of {holds} ({error}); move it away, or name another one."
                ) from error
            opening.pop_all()
        self._file, self.execute, self.executemany = file, file.execute, file.executemany

    @contextlib.contextmanager
    def transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
        """What is read is of one moment; what is written is written whole, or not at all.

        Args:
            begin: "BEGIN IMMEDIATE" lets nobody else write from here on; "BEGIN" is enough to read.

        Raises:
            OSError: the file cannot be read or written; the message names it.
        """
        with self.lock:
            try:
                self._file.execute(begin)
                try:
                    yield
                    self._file.execute("COMMIT")
                except BaseException:
                    if self._file.in_transaction:  # A full disk has ended it already.
                        self._file.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise OSError(
                    f"{self._path}, a file of {self._holds}, cannot be read or written ({error}); see that the disk "
                    "has room and nobody holds the file. Then the same command goes on."
                ) from error

    def close(self) -> None:
        """Closes the file."""
        with self.lock:
            self._file.close()
