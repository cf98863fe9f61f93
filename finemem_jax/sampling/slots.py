"""The slots that requests are served in: who has which, what its cache holds, and where a new prompt had best begin.

Books only: nothing here computes. Beside the slots, a store keeps group prefixes whose slots have been given on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from finemem_jax.sampling import decode
from finemem_jax.sampling.prefix_cache import PrefixCache
from finemem_jax.types import Matcher, Request

SLOTS, STORE = "slots", "store"


@dataclasses.dataclass
class Slot:
    """Which request a slot works on; ids, log-probs and raw log-probs that it has drawn; what it must keep to."""

    request_id: int
    request: Request
    drawn: tuple[list[int], list[float], list[float]] = dataclasses.field(default_factory=lambda: ([], [], []))
    matcher: Matcher | None = None


@dataclasses.dataclass
class Admission:
    """A request on its way into a slot.

    Attributes:
        own: The prompt after the shared prefix.
        held: How many of these tokens the slot holds, once `source` is copied.
        source: (cache, row) to copy from; None where the slot itself has them, or nothing has.
        stage: Entries of a stage need nothing of one another, only of earlier stages.
        original: Slot of an entry with the same prompt, which this one is a copy of; nothing is left to compute.
        saved: Row of the store that its group prefix is kept in from then on; None if it is there, or there is none.
    """

    slot: int
    request_id: int
    request: Request
    suffix: tuple[int, ...]
    cached: int = 0
    source: tuple[str, int] | None = None
    stage: int = 0
    duplicate_of: int | None = None
    saved: int | None = None


class _Shard:
    """The rows of slots and store that one share of the devices has; rows are counted within the share."""

    def __init__(self, first: dict[str, int], rows: dict[str, int], positions: dict[str, int]):
        """Args:
        first: Number of its first row among all.
        rows: How many it has.
        positions: Of each row.
        """
        self.first = first
        self.cached = {name: PrefixCache(count, positions[name]) for name, count in rows.items()}
        self.free = set(range(rows[SLOTS]))
        self.new_admission()

    def new_admission(self):
        """Forgets in which order the last entries were carried out."""
        self._by_prompt: dict[tuple[int, ...], tuple[int, int]] = {}  # Slot and stage.
        self._ready: dict[tuple[str, int], int] = {}  # From which stage on a row has what is put there.

    def match(self, own):
        """How much of a prompt is here already."""
        return len(own) if own in self._by_prompt else max(rows.match(own[:-1])[1] for rows in self.cached.values())

    def place(self, request_id, request, own) -> Admission:
        """Gives a request a slot, and notes what the rows will hold."""
        if own in self._by_prompt:
            original, stage = self._by_prompt[own]
            slot, first = self.cached[SLOTS].oldest(self.free), self.first[SLOTS]
            entry = Admission(
                first + slot, request_id, request, own, len(own), (SLOTS, first + original), stage + 1, first + original
            )
        else:
            slot, entry = self._begin(request_id, request, own)
            self._by_prompt[own] = slot, entry.stage
            self._save(entry)
        self.free.remove(slot)
        self.cached[SLOTS].insert(slot, own)
        self._ready[SLOTS, slot] = entry.stage + 1
        return entry

    def _begin(self, request_id, request, own):
        """A slot and an entry that begins with as much of its prompt as some row holds."""
        # All but the last token: the first draw needs its state, which no cache has.
        found = {name: rows.match(own[:-1]) for name, rows in self.cached.items()}
        name = max((STORE, SLOTS), key=lambda name: found[name][1])
        row, length = found[name]
        if length and name == SLOTS and row in self.free:
            return row, Admission(self.first[SLOTS] + row, request_id, request, own, length)
        slot = self.cached[SLOTS].oldest(self.free)
        entry = Admission(self.first[SLOTS] + slot, request_id, request, own, length)
        if length:
            entry.source, entry.stage = (name, self.first[name] + row), self._ready.get((name, row), 0)
        return slot, entry

    def _save(self, entry):
        """Keeps an entry's group prefix in the store, if it is not there and some row is not filled by others."""
        group_prefix, store = entry.request.group_prefix, self.cached[STORE]
        rows = [row for row in range(len(store)) if (STORE, row) not in self._ready]
        if group_prefix and rows and store.match(group_prefix)[1] < min(len(group_prefix), store.positions):
            row = store.oldest(rows)
            store.insert(row, group_prefix)
            entry.saved, self._ready[STORE, row] = self.first[STORE] + row, entry.stage + 1


class Slots:
    """Slots and store over one shared prefix.

    Attributes:
        caches: Keys and values of SLOTS and STORE, on the device.
        state: What decoding knows of the slots; the host's own arrays.
        occupants: Who has which slot.
    """

    def __init__(self, shared_prefix_ids: tuple[int, ...], shared_prefix: Any, caches: dict[str, Any], shares: int = 1):
        """Args:
        shares: In how many equal parts devices have the rows; nothing is copied from one to another.
        """
        rows = {name: len(cache[0][0]) // shares for name, cache in caches.items()}
        self.caches = caches
        positions = {name: self._positions(name) for name in caches}
        self.state = decode.idle(shares * rows[SLOTS])
        self.occupants: list[Slot | None] = [None] * (shares * rows[SLOTS])
        self._shares = [_Shard({name: i * n for name, n in rows.items()}, rows, positions) for i in range(shares)]
        self.take_over(shared_prefix_ids, shared_prefix)

    def take_over(self, shared_prefix_ids: tuple[int, ...], shared_prefix: Any) -> None:
        """Puts another shared prefix before all rows, which makes what they hold worthless."""
        self.shared_prefix_ids, self.shared_prefix = shared_prefix_ids, shared_prefix
        for share in self._shares:
            for rows in share.cached.values():
                rows.clear()

    @property
    def positions(self) -> int:
        """Of each slot."""
        return self._positions(SLOTS)

    def _positions(self, name):
        return self.caches[name][0][1].shape[2]

    def lengthen(self, cache: Any) -> None:
        """Takes longer slots, which hold what they held."""
        self.caches[SLOTS] = cache
        for share in self._shares:
            share.cached[SLOTS].lengthen(self.positions)

    def allowed(self, vocab_size: int) -> np.ndarray | None:
        """Which tokens the slots may draw next (`drawing.draw`); None if all of them may draw all."""
        matchers = {slot: owner.matcher for slot, owner in enumerate(self.occupants) if owner and owner.matcher}
        if not matchers:
            return None
        words = np.full((len(self.occupants), -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        for slot, matcher in matchers.items():
            words[slot] = matcher.mask()
        return words

    @property
    def num_free(self) -> int:
        """How many slots nobody has."""
        return sum(len(share.free) for share in self._shares)

    def admit(self, requests: Sequence[tuple[int, Request]]) -> list[Admission]:
        """Gives each request, with its request_id, a slot; there must be enough. The entries must then be carried out.

        Args:
            requests: Their prompts begin with the shared prefix.
        """
        for share in self._shares:
            share.new_admission()
        entries = []
        for request_id, request in requests:
            own = request.prompt_ids[len(self.shared_prefix_ids) :]
            candidates = [share for share in self._shares if share.free]
            # With most of the prompt; among equals, the one with most room.
            share = max(candidates, key=lambda share: (share.match(own), len(share.free)))
            entries.append(share.place(request_id, request, own))
            self._enter(entries[-1])
        return entries

    def _enter(self, entry):
        slot, request = entry.slot, entry.request
        matcher = request.constraint.start() if request.constraint else None
        self.occupants[slot] = Slot(entry.request_id, request, matcher=matcher)
        self.state.filled[slot] = len(entry.suffix)
        self.state.sampling.temperature[slot] = request.temperature
        self.state.sampling.top_k[slot] = request.top_k
        self.state.sampling.top_p[slot] = request.top_p
        self.state.key[slot] = request.key

    def leave(self, slot: int) -> Slot:
        """Frees a slot. Its tokens stay, and another prompt may begin with them."""
        owner = self.occupants[slot]
        assert owner is not None, "nobody has this slot"
        share, local = self._shares[slot * len(self._shares) // len(self.occupants)], slot
        local -= share.first[SLOTS]
        prompt = len(owner.request.prompt_ids) - len(self.shared_prefix_ids)
        # The last token drawn is in no cache.
        share.cached[SLOTS].insert(local, owner.drawn[0][:-1], start=prompt)
        share.free.add(local)
        self.occupants[slot] = None
        self.state.remaining[slot] = 0
        # A distribution that is cut costs all rows, so that idle ones must not ask for it.
        self.state.sampling.top_k[slot], self.state.sampling.top_p[slot] = 0, 1
        return owner
