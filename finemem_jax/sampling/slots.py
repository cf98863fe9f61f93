"""Decides which request gets which slot, and what its cache need not compute again.

Books only: nothing here computes. Beside the slots, a store keeps group prefixes whose slots have been given on. What
`Slots.admit` plans, `sampler` carries out.
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
    """A slot that works on a request.

    Attributes:
        drawn: Token ids, their log-probs and raw log-probs so far.
        matcher: Follows the request's constraint; None for none.
    """

    request_id: int
    request: Request
    drawn: tuple[list[int], list[float], list[float]] = dataclasses.field(default_factory=lambda: ([], [], []))
    matcher: Matcher | None = None


@dataclasses.dataclass
class Admission:
    """A request on its way into a slot.

    Attributes:
        suffix: The prompt after the shared prefix.
        cached: How many of these tokens the slot's cache has, once `source` is copied.
        source: (cache, row) to copy from; None where the slot itself has them, or nothing has.
        stage: Admissions of a stage need nothing of one another, only of earlier stages.
        duplicate_of: Slot of an admission with the same prompt, which this one is a copy of; nothing is left to
            compute.
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
    """The rows of slots and store that one data shard has; rows are counted within the shard."""

    def __init__(self, first: dict[str, int], rows: dict[str, int], positions: dict[str, int]):
        """Begins with all rows empty. Each argument is by SLOTS and STORE.

        Args:
            first: Number of its first row among all.
            rows: How many it has.
            positions: Of each row.
        """
        self.first = first
        self.cached = {name: PrefixCache(count, positions[name]) for name, count in rows.items()}
        self.free = set(range(rows[SLOTS]))
        self.new_admission()

    def new_admission(self) -> None:
        """Forgets in which order the last admissions were carried out."""
        self._by_prompt: dict[tuple[int, ...], tuple[int, int]] = {}  # Slot and stage.
        self._ready: dict[tuple[str, int], int] = {}  # From which stage on a row has what is put there.

    def match(self, suffix: tuple[int, ...]) -> int:
        """How many tokens of a prompt are here already."""
        if suffix in self._by_prompt:
            return len(suffix)
        return max(rows.match(suffix[:-1])[1] for rows in self.cached.values())

    def place(self, request_id: int, request: Request, suffix: tuple[int, ...]) -> Admission:
        """Gives a request a slot, and notes what the rows will have."""
        if suffix in self._by_prompt:
            original, stage = self._by_prompt[suffix]
            slot, original = self.cached[SLOTS].oldest(self.free), self.first[SLOTS] + original
            admission = Admission(self.first[SLOTS] + slot, request_id, request, suffix, cached=len(suffix))
            admission.source, admission.stage, admission.duplicate_of = (SLOTS, original), stage + 1, original
        else:
            slot, admission = self._with_longest_prefix(request_id, request, suffix)
            self._by_prompt[suffix] = slot, admission.stage
            self._save(admission)
        self.free.remove(slot)
        self.cached[SLOTS].insert(slot, suffix)
        self._ready[SLOTS, slot] = admission.stage + 1
        return admission

    def _with_longest_prefix(self, request_id: int, request: Request, suffix: tuple[int, ...]) -> tuple[int, Admission]:
        """A slot, and an admission that begins with as much of its prompt as some row has."""
        # All but the last token: the first draw needs its state, which no cache has.
        found = {name: rows.match(suffix[:-1]) for name, rows in self.cached.items()}
        name = max((STORE, SLOTS), key=lambda name: found[name][1])
        row, length = found[name]
        in_place = length > 0 and name == SLOTS and row in self.free
        slot = row if in_place else self.cached[SLOTS].oldest(self.free)
        admission = Admission(self.first[SLOTS] + slot, request_id, request, suffix, length)
        if length and not in_place:
            admission.source, admission.stage = (name, self.first[name] + row), self._ready.get((name, row), 0)
        return slot, admission

    def _save(self, admission: Admission) -> None:
        """Keeps its group prefix in the store, if it is not there and some row is not filled by other admissions."""
        group_prefix, store = admission.request.group_prefix, self.cached[STORE]
        rows = [row for row in range(len(store)) if (STORE, row) not in self._ready]
        if group_prefix and rows and store.match(group_prefix)[1] < min(len(group_prefix), store.positions):
            row = store.oldest(rows)
            store.insert(row, group_prefix)
            admission.saved, self._ready[STORE, row] = self.first[STORE] + row, admission.stage + 1


class Slots:
    """Slots and store over one shared prefix.

    Attributes:
        caches: Keys and values of SLOTS and STORE, on the device.
        state: What decoding knows of the slots; the host's own arrays.
        occupants: What each slot works on; None for a free one.
    """

    def __init__(self, prefix_ids: tuple[int, ...], prefix: Any, caches: dict[str, Any], *, data_shards: int = 1):
        """Begins with all slots free.

        Args:
            prefix_ids, prefix: The shared prefix's tokens, and what the device has of it.
            data_shards: In how many equal parts devices have the rows; nothing is copied from one to another.
        """
        rows = {name: len(cache[0][0]) // data_shards for name, cache in caches.items()}
        self.caches = caches
        positions = {name: self._positions(name) for name in caches}
        self.state = decode.idle(data_shards * rows[SLOTS])
        self.occupants: list[Slot | None] = [None] * (data_shards * rows[SLOTS])
        self._shards = [_Shard({name: i * n for name, n in rows.items()}, rows, positions) for i in range(data_shards)]
        self.take_over(prefix_ids, prefix)

    def take_over(self, prefix_ids: tuple[int, ...], prefix: Any) -> None:
        """Puts another shared prefix before all rows, which makes what they have worthless."""
        self.prefix_ids, self.prefix = prefix_ids, prefix
        for shard in self._shards:
            for rows in shard.cached.values():
                rows.clear()

    @property
    def positions(self) -> int:
        """Of each slot."""
        return self._positions(SLOTS)

    def _positions(self, name: str) -> int:
        return self.caches[name][0][1].shape[2]

    def lengthen(self, cache: Any) -> None:
        """Takes longer slots, which have what they had."""
        self.caches[SLOTS] = cache
        for shard in self._shards:
            shard.cached[SLOTS].lengthen(self.positions)

    def allowed(self, vocab_size: int) -> np.ndarray | None:
        """Which tokens the slots may draw next (`token_sampling.sample`); None if all of them may draw all."""
        matchers = {slot: taken.matcher for slot, taken in enumerate(self.occupants) if taken and taken.matcher}
        if not matchers:
            return None
        words = np.full((len(self.occupants), -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        for slot, matcher in matchers.items():
            words[slot] = matcher.mask()
        return words

    @property
    def num_free(self) -> int:
        """How many slots work on nothing."""
        return sum(len(shard.free) for shard in self._shards)

    def admit(self, requests: Sequence[tuple[int, Request]]) -> list[Admission]:
        """Gives each request, with its request_id, a slot; there must be enough. The result must then be carried out.

        Args:
            requests: Their prompts begin with the shared prefix.
        """
        for shard in self._shards:
            shard.new_admission()
        admissions = []
        for request_id, request in requests:
            suffix = request.prompt_ids[len(self.prefix_ids) :]
            # The shard that has most of the prompt; among equals, the one with most room.
            shard = max(
                (shard for shard in self._shards if shard.free),
                key=lambda shard: (shard.match(suffix), len(shard.free)),
            )
            admissions.append(shard.place(request_id, request, suffix))
            self._occupy(admissions[-1])
        return admissions

    def _occupy(self, admission: Admission) -> None:
        slot, request = admission.slot, admission.request
        matcher = request.constraint.start() if request.constraint else None
        self.occupants[slot] = Slot(admission.request_id, request, matcher=matcher)
        self.state.filled[slot] = len(admission.suffix)
        self.state.sampling.temperature[slot] = request.temperature
        self.state.sampling.top_k[slot] = request.top_k
        self.state.sampling.top_p[slot] = request.top_p
        self.state.key[slot] = request.key

    def leave(self, slot: int) -> Slot:
        """Frees a slot. Its tokens stay, and another prompt may begin with them."""
        left = self.occupants[slot]
        assert left is not None, "nothing occupies this slot"
        shard = self._shards[slot * len(self._shards) // len(self.occupants)]
        local = slot - shard.first[SLOTS]
        # The last token drawn is in no cache.
        start = len(left.request.prompt_ids) - len(self.prefix_ids)
        shard.cached[SLOTS].insert(local, left.drawn[0][:-1], start=start)
        shard.free.add(local)
        self.occupants[slot] = None
        self.state.remaining[slot] = 0
        # A distribution that is cut costs all rows, so that idle ones must not ask for it.
        self.state.sampling.top_k[slot], self.state.sampling.top_p[slot] = 0, 1
        return left
