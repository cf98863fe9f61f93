"""Notes which rows of a cache begin with which tokens, so that these need not be computed again.

Every row is a path in the radix tree of all prefixes (as in RadixAttention, https://arxiv.org/abs/2312.07104). A row
keeps its whole path, so that a look-up is one comparison of arrays, and it finds what two prompts have in common
wherever they part.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

# Fills the places after a row's tokens; no token has this id.
_NONE = -1


class PrefixCache:
    """The tokens that rows have, and how long ago each row was of use. All under one set of weights."""

    def __init__(self, num_rows: int, positions: int):
        self._ids = np.full((num_rows, positions), _NONE, np.int64)
        self._used = np.zeros(num_rows, np.int64)
        self._clock = 0

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def positions(self) -> int:
        """Tokens that go into a row."""
        return self._ids.shape[1]

    def match(self, ids: Sequence[int]) -> tuple[int, int]:
        """Finds the row whose beginning has most of these tokens in common, and how many; (0, 0) if none has any.

        Among equals, the row used last.
        """
        wanted = np.asarray(ids[: self.positions], np.int64)
        if not len(self) or not len(wanted):
            return 0, 0
        same = self._ids[:, : len(wanted)] == wanted
        lengths = np.where(same.all(1), len(wanted), same.argmin(1))
        row = int(np.lexsort((self._used, lengths))[-1])
        if not lengths[row]:
            return 0, 0
        self._touch(row)
        return row, int(lengths[row])

    def insert(self, row: int, ids: Sequence[int], start: int = 0) -> None:
        """Notes that a row now has these tokens from `start` on, and nothing after them; or as many as go in."""
        end = min(start + len(ids), self.positions)
        self._ids[row, start:end] = ids[: end - start]
        self._ids[row, end:] = _NONE
        self._touch(row)

    def oldest(self, rows: Collection[int] | None = None) -> int:
        """Finds the row, among some or all, that has been of no use for longest; empty rows come first."""
        candidates = list(range(len(self)) if rows is None else rows)
        return min(candidates, key=lambda row: (self._ids[row, 0] != _NONE, self._used[row], row))

    def lengthen(self, positions: int) -> None:
        """Gives all rows more positions."""
        more = positions - self.positions
        self._ids = np.pad(self._ids, ((0, 0), (0, more)), constant_values=_NONE)

    def clear(self) -> None:
        """Forgets all rows."""
        self._ids[:] = _NONE

    def _touch(self, row: int) -> None:
        self._clock += 1
        self._used[row] = self._clock
