"""The slots that requests are served in: who has which, what its cache holds, and where a new prompt had best begin.

Books only: nothing here computes. Beside the slots, a store keeps branches whose slots have been given on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from finemem_jax import decoding
from finemem_jax.episode import Request
from finemem_jax.prefixes import Prefixes

SLOTS, STORE = "slots", "store"


@dataclasses.dataclass
class Occupant:
    """Which request a slot works on, and the ids, log-probs and raw log-probs that it has drawn."""

    ticket: int
    request: Request
    drawn: tuple[list[int], list[float], list[float]] = dataclasses.field(default_factory=lambda: ([], [], []))


@dataclasses.dataclass
class Entry:
    """A request on its way into a slot.

    Attributes:
        own: The prompt after the trunk.
        held: How many of these tokens the slot holds, once `source` is copied.
        source: (cache, row) to copy from; None where the slot itself has them, or nothing has.
        stage: Entries of a stage need nothing of one another, only of earlier stages.
        twin: Slot of an entry with the same prompt, which this one is a copy of; nothing is left to compute.
        saved: Row of the store that its branch is kept in from then on; None if it is there, or there is none.
    """

    slot: int
    ticket: int
    request: Request
    own: tuple[int, ...]
    held: int = 0
    source: tuple[str, int] | None = None
    stage: int = 0
    twin: int | None = None
    saved: int | None = None


class Slots:
    """Slots and store over one trunk.

    Attributes:
        caches: Keys and values of SLOTS and STORE, on the device.
        state: What decoding knows of the slots; the host's own arrays.
    """

    def __init__(self, trunk_ids: tuple[int, ...], trunk: Any, positions: int, caches: dict[str, Any]):
        rows = {name: len(cache[0][0]) for name, cache in caches.items()}
        self.positions, self.caches = positions, caches
        self.state = decoding.idle(rows[SLOTS])
        self.occupants: list[Occupant | None] = [None] * rows[SLOTS]
        self._held = {name: Prefixes(count, positions) for name, count in rows.items()}
        self.take_over(trunk_ids, trunk)

    def take_over(self, trunk_ids: tuple[int, ...], trunk: Any) -> None:
        """Puts another trunk before all rows, which makes what they hold worthless."""
        self.trunk_ids, self.trunk = trunk_ids, trunk
        for rows in self._held.values():
            rows.clear()

    def lengthen(self, positions: int, caches: dict[str, Any]) -> None:
        """Takes longer caches, which hold what the old ones held."""
        self.positions, self.caches = positions, caches
        for rows in self._held.values():
            rows.lengthen(positions)

    @property
    def free(self) -> list[int]:
        """Slots that nobody has."""
        return [slot for slot, owner in enumerate(self.occupants) if owner is None]

    def admit(self, requests: Sequence[tuple[int, Request]]) -> list[Entry]:
        """Gives each request, with its ticket, a slot; there must be enough. The entries must then be carried out.

        Args:
            requests: Their prompts begin with the trunk.
        """
        entries: list[Entry] = []
        by_prompt: dict[tuple[int, ...], Entry] = {}
        # From which stage on a row has what these entries put there, by (cache, row).
        ready: dict[tuple[str, int], int] = {}
        for ticket, request in requests:
            own = request.prompt_ids[len(self.trunk_ids) :]
            twin = by_prompt.get(own)
            if twin is not None:
                place = (SLOTS, twin.slot)
                entry = Entry(self._oldest(), ticket, request, own, len(own), place, twin.stage + 1, twin.slot)
            else:
                entry = by_prompt[own] = self._begin(ticket, request, own, ready)
                self._save(entry, ready)
            self._held[SLOTS].hold(entry.slot, own)
            ready[SLOTS, entry.slot] = entry.stage + 1
            self._enter(entry)
            entries.append(entry)
        return entries

    def _oldest(self):
        return self._held[SLOTS].oldest(self.free)

    def _begin(self, ticket, request, own, ready):
        """An entry that begins with as much of its prompt as some row holds."""
        # All but the last token: the first draw needs its state, which no cache has.
        found = {name: rows.longest(own[:-1]) for name, rows in self._held.items()}
        name = max((STORE, SLOTS), key=lambda name: found[name][1])
        row, length = found[name]
        if not length:
            return Entry(self._oldest(), ticket, request, own)
        if name == SLOTS and self.occupants[row] is None:
            return Entry(row, ticket, request, own, length)
        return Entry(self._oldest(), ticket, request, own, length, (name, row), ready.get((name, row), 0))

    def _save(self, entry, ready):
        """Has an entry's branch kept in the store, if it is not, and there is a row that these entries do not fill."""
        branch, store = entry.request.branch, self._held[STORE]
        rows = [row for row in range(len(store)) if (STORE, row) not in ready]
        if branch and rows and store.longest(branch)[1] < len(branch):
            entry.saved = store.oldest(rows)
            store.hold(entry.saved, branch)
            ready[STORE, entry.saved] = entry.stage + 1

    def _enter(self, entry):
        slot, request = entry.slot, entry.request
        self.occupants[slot] = Occupant(entry.ticket, request)
        self.state.filled[slot] = len(entry.own)
        self.state.sampling.temperature[slot] = request.temperature
        self.state.sampling.top_k[slot] = request.top_k
        self.state.sampling.top_p[slot] = request.top_p
        self.state.key[slot] = request.key

    def leave(self, slot: int) -> Occupant:
        """Frees a slot. Its tokens stay, and another prompt may begin with them."""
        owner = self.occupants[slot]
        assert owner is not None, "nobody has this slot"
        prompt = len(owner.request.prompt_ids) - len(self.trunk_ids)
        # The last token drawn is in no cache.
        self._held[SLOTS].hold(slot, owner.drawn[0][:-1], start=prompt)
        self.occupants[slot] = None
        self.state.remaining[slot] = 0
        # A distribution that is cut costs all rows, so that idle ones must not ask for it.
        self.state.sampling.top_k[slot], self.state.sampling.top_p[slot] = 0, 1
        return owner
