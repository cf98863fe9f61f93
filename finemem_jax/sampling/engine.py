"""Holds one model on its devices, ready to generate: weights, caches, and a small fixed set of compiled programs.

Sizes as in `decode`. Knows nothing of requests; `sampler` decides what is computed, and when.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from finemem_jax.config import sections
from finemem_jax.models import kv_cache, logical_axes
from finemem_jax.models.attention import Array
from finemem_jax.models.decoder import Params
from finemem_jax.models.kv_cache import Context, LayerCache, NewTokens, Packed
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.runtime import compilation
from finemem_jax.runtime.compilation import Call
from finemem_jax.sampling import decode as decode_lib
from finemem_jax.sampling.decode import Copies, PromptEnds, Rules, SlotState, Spec, Targets
from finemem_jax.sampling.token_sampling import Sample

# Prefill is compiled for one row of each data shard or at most so many, and for these fractions of a chunk.
_MOST_ROWS = 4
_CHUNK_DIVISORS = (4, 1)
# A cache, or what is known of it before it has memory.
_CacheLike = list[LayerCache] | list[tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]


class SharedPrefix(NamedTuple):
    """Keys and values of what all rows begin with, and how many positions of them are valid."""

    cache: _CacheLike
    length: np.int32


def row_buckets(slots: int) -> list[int]:
    """How many of some slots are prefilled together: one or a few.

    Their rows are copied out of the cache and back. More of them at once would take more memory, and no less time.
    """
    return sorted({1, min(_MOST_ROWS, -(-slots // 4))})


def targets_in(shape: tuple[int, int]) -> int:
    """How many targets `Engine.teacher_force` has room for, beside tokens of this shape."""
    together = decode_lib.TARGETS_TOGETHER
    return -(-shape[0] * shape[1] // together) * together


class Engine:
    """Compiles and calls the programs of `decode` for one model.

    Attributes:
        num_slots: N; as asked for, or a few more, so that every data shard has as many.
        prefill_chunk: Tokens of a prompt computed together (chunked prefill).
        weights: As they are decoded with (`kv_cache.layout`); None while there are none.
        device_seconds: Time so far spent on calls to the device and on waiting for them, compiling included (s).
    """

    def __init__(self, config: DecoderConfig, end_ids: Sequence[int], settings: sections.Sampler):
        """Takes no weights yet; `load` does.

        Args:
            end_ids: Tokens that end a completion.
        """
        self.num_slots, self.prefill_chunk = settings.num_slots, settings.prefill_tokens
        self.device_seconds = 0.0
        self.weights: Any = None
        self._config, self._settings = config, settings
        self._end_ids = np.asarray(end_ids, np.int32)
        # Shorter prefixes are padded to this length, so that all have one program.
        self._least_prefix = 0
        # Copies of the slots' rows that are prefilled, by their number; between two calls they mean nothing.
        self._scratch: dict[int, list[LayerCache]] = {}
        self._mesh: Mesh | None = None
        self._device: SingleDeviceSharding | None = None

    # ---------------------------------------------------------------------------------- weights

    def load(self, params: Params) -> None:
        """Takes weights: a copy, in the layout of decoding; or the arrays themselves.

        Raises:
            ValueError: these arrays are of another dtype than the caches.
        """
        settings = self._settings
        place = jax.tree.leaves(params)[0].sharding
        mesh = place.mesh if isinstance(place, NamedSharding) else None
        self._mesh = mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None
        shards = 1 if self._mesh is None else logical_axes.size(self._mesh, logical_axes.ROWS)
        self.num_slots = -(-self.num_slots // shards) * shards
        if settings.in_place:
            dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
            if dtypes != {settings.dtype}:
                raise ValueError(
                    f"Weights of {', '.join(sorted(dtypes))} cannot be decoded with in place in {settings.dtype}; set "
                    "sampler.dtype to model.param_dtype, or sampler.in_place=False."
                )
            weights = kv_cache.in_place(params)
        else:
            weights = kv_cache.layout(self._config, params, settings.dtype, int8=settings.int8)
        if self._mesh is None:
            # Of one kind also where the trainer has a mesh of one device: else programs would be compiled for either.
            self._device = SingleDeviceSharding(*place.device_set)
            weights = jax.device_put(weights, self._device)
        elif not settings.in_place:
            where = kv_cache.shardings(self._config, self._mesh, whole=settings.whole_weights, int8=settings.int8)
            weights = jax.device_put(weights, where)
        self.weights = weights

    def drop(self) -> None:
        """Gives the weights up, and what was computed with them."""
        self.weights = None
        self._scratch.clear()

    # ---------------------------------------------------------------------------------- shapes

    @property
    def data_shards(self) -> int:
        """In how many parts devices split the slots."""
        return kv_cache.data_shards(self._mesh, self.num_slots)

    @property
    def row_buckets(self) -> list[int]:
        """Numbers of rows of each data shard that are prefilled together."""
        return row_buckets(self.num_slots // self.data_shards)

    @property
    def length_buckets(self) -> list[int]:
        """Numbers of tokens per row that are prefilled together."""
        return sorted({max(self.prefill_chunk // divisor, 1) for divisor in _CHUNK_DIVISORS})

    def positions(self, length: int) -> int:
        """The length of cache that so many tokens get: 1, 2, 3, 4, 6, 8, 12, … chunks; none for none."""
        if not length:
            return 0
        chunks = -(-length // self.prefill_chunk)
        power = 1 << (chunks.bit_length() - 1)
        return self.prefill_chunk * next(n for n in (power, power + power // 2, 2 * power) if n >= chunks)

    def sizes(self, positions: int) -> list[int]:
        """The lengths that slots may have where none needs more: from half of it on, so that few are compiled for."""
        found = [self.positions(-(-positions // 2))]
        while found[-1] < positions:
            found.append(self.positions(found[-1] + 1))
        return found

    def _shape(self, rows: int, positions: int) -> _CacheLike:
        """What `empty` returns, without its memory."""
        cache = jax.eval_shape(lambda: kv_cache.empty(self._config, rows, positions, dtype=self._settings.dtype))
        if self._mesh is None:
            places = jax.tree.map(lambda _: self._device, cache)
        else:
            places = kv_cache.cache_shardings(self._mesh, cache)
        return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), cache, places)

    def _states(self, rows: int) -> jax.ShapeDtypeStruct:
        """The last hidden states of rows that have been prefilled, without their memory."""
        shape = rows, self._config.embed_dim
        place: Sharding | None = self._device
        if self._mesh is not None:
            place = logical_axes.place(self._mesh, shape, kv_cache.STATES)
        return jax.ShapeDtypeStruct(shape, self._settings.dtype, sharding=place)

    # ---------------------------------------------------------------------------------- compiling ahead

    def warm_up(
        self, prefix_length: int, positions: Sequence[int], *, stored: tuple[int, int], say: Callable[[int, int], None]
    ) -> None:
        """Compiles all programs for caches of these sizes. Shorter prefixes will be padded to this length.

        Args:
            positions: Of the slots, from the fewest to the most; they may be lengthened from any to any.
            stored: Rows and positions of the store.
            say: Called with the number of programs that are ready and the number of all, before each and at the end.
        """
        prefix, calls = self._prefix_calls(self.positions(prefix_length), prefix_length)
        state, store = decode_lib.idle(self.num_slots), self._shape(*stored)
        sizes = [self._shape(self.num_slots, size) for size in positions]
        rules = Rules(np.int32(0), self._end_ids)
        calls += [self._empty(*stored)]
        calls += [self._empty(self.num_slots, size) for size in positions]
        calls += [self._decode(prefix, slots, state, rules=rules) for slots in sizes]
        for rows in (self.data_shards * rows for rows in self.row_buckets):
            nothing, copies = np.zeros(rows, np.int32), self._shape(rows, positions[-1])
            calls.append(self._empty(rows, positions[-1]))
            calls += [self._copy(*pair, []) for slots in sizes for pair in ((copies, slots), (slots, copies))]
            for length in self.length_buckets:
                new = NewTokens(np.zeros((rows, length), np.int32), nothing, nothing)
                calls.append(self._prefill(prefix, copies, new))
            ends = PromptEnds._make((self._states(rows), np.zeros(self.num_slots, np.int32)))
            calls.append(self._draw_first(prefix, ends, state))
        for slots in sizes:
            calls += [self._copy(*pair, []) for pair in ((slots, store), (store, slots), (slots, None))]
        calls += [self._lengthen(shorter, longer) for shorter, longer in itertools.combinations(sizes, 2)]
        compilation.prepare_all(calls, say)

    def warm_up_teacher(
        self, prefix_length: int, shapes: Sequence[tuple[int, int]], say: Callable[[int, int], None]
    ) -> None:
        """Compiles `teacher_force` for rows and tokens of these shapes; see `warm_up`."""
        prefix, calls = self._prefix_calls(max(self._least_prefix, self.positions(prefix_length)), prefix_length)
        for rows, length in shapes:
            tokens, some = np.zeros((rows, length), np.int32), np.zeros(targets_in((rows, length)), np.int32)
            targets = Targets(some, some, some, np.int32(0))
            calls.append(self._teacher_force(prefix, Packed(tokens, tokens, tokens), targets))
        compilation.prepare_all(calls, say)

    def _prefix_calls(self, positions: int, length: int) -> tuple[SharedPrefix, list[Call]]:
        """Makes shared prefixes so many positions long; returns one without its memory, and the calls it takes."""
        self._least_prefix = positions
        prefix = SharedPrefix(self._shape(1, positions), np.int32(length))
        calls = [self._empty(1, positions), self._empty(1, 0)]
        return prefix, calls + ([self._prefix_chunk(prefix.cache, (0,), 0)] if length else [])

    # ---------------------------------------------------------------------------------- what it computes

    def empty(self, rows: int, positions: int) -> list[LayerCache]:
        """Returns a cache of zeros, where it belongs on the devices."""
        cache = self._run(self._empty(rows, positions))
        return cache if self._mesh is not None else jax.device_put(cache, self._device)

    def shared_prefix(self, ids: Sequence[int]) -> SharedPrefix:
        """Computes a shared prefix, chunk by chunk."""
        cache = self.empty(1, max(self.positions(len(ids)), self._least_prefix))
        for start in range(0, len(ids), self.prefill_chunk):
            _, cache = self._run(self._prefix_chunk(cache, ids, start))
        return SharedPrefix(cache, np.int32(len(ids)))

    def prefill(
        self,
        prefix: SharedPrefix,
        cache: list[LayerCache],
        new: NewTokens,
        *,
        slot_of_row: Mapping[int, int],
        positions: int,
    ) -> tuple[jax.Array, list[LayerCache]]:
        """Computes `decode_lib.prefill` of some slots of a cache.

        Args:
            new: Rows and tokens per row must be of the buckets.
            slot_of_row: Which slot's each row of tokens is, of those that are not padding. The first rows are of the
                first data shard's slots, and so on, as many of each.
            positions: Of the copies that are computed with: as many as a slot may ever have, so that one program serves
                slots of all lengths.
        """
        count = len(new.ids)
        rows = self._scratch.pop(count, None)
        if rows is None or rows[0][1].shape[2] != positions:
            rows = self.empty(count, positions)
        rows = self.copy(rows, cache, [(slot, row) for row, slot in slot_of_row.items()])
        hidden, rows = self._run(self._prefill(prefix, rows, new))
        cache = self.copy(cache, rows, list(slot_of_row.items()))
        self._scratch[count] = rows
        return hidden, cache

    def draw_first(
        self, prefix: SharedPrefix, ends: PromptEnds, state: SlotState, *, allowed: Array | None = None
    ) -> Sample:
        """Computes `decode_lib.draw_first` of slots whose prompts have just been prefilled, as NumPy arrays."""
        return self._fetch(self._run(self._draw_first(prefix, ends, state, allowed=allowed)))

    def decode(
        self,
        prefix: SharedPrefix,
        cache: list[LayerCache],
        state: SlotState,
        *,
        leave_at: int = 0,
        allowed: Array | None = None,
    ) -> tuple[list[LayerCache], SlotState, Sample]:
        """Computes `decode_lib.decode`; state and what was drawn as NumPy arrays. Of what is `allowed`, one step."""
        rules = Rules(np.int32(leave_at), self._end_ids, allowed)
        cache, *rest = self._run(self._decode(prefix, cache, state, rules=rules))
        return cache, *self._fetch(rest)

    def teacher_force(self, prefix: SharedPrefix, packed: Packed, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
        """Computes `decode_lib.teacher_forced`, as NumPy arrays."""
        return self._fetch(self._run(self._teacher_force(prefix, packed, targets)))

    def copy(
        self, target: list[LayerCache], source: list[LayerCache] | None, pairs: Sequence[tuple[int, int]]
    ) -> list[LayerCache]:
        """Copies rows, one after the other.

        Args:
            source: None for `target` itself.
            pairs: (row of source, row of target), at most as many as slots, and each pair of one data shard.
        """
        return self._run(self._copy(target, source, pairs))

    def lengthen(self, cache: list[LayerCache], positions: int) -> list[LayerCache]:
        """Returns the same rows in a cache with more positions."""
        return self._run(self._lengthen(cache, self.empty(len(cache[0][0]), positions)))

    # ---------------------------------------------------------------------------------- calls

    def _run(self, call: Call) -> Any:
        began = time.perf_counter()
        result = compilation.call(*call.arguments, **call.statics)
        self.device_seconds += time.perf_counter() - began
        return result

    def _fetch(self, arrays: Any) -> Any:
        """Waits for arrays, and returns them as NumPy's own."""
        began = time.perf_counter()
        fetched = jax.tree.map(np.array, arrays)
        self.device_seconds += time.perf_counter() - began
        return fetched

    def _call(self, function: Any, prefix: SharedPrefix, *arguments: Any, num_steps: int = 0) -> Call:
        context = Context._make((self.weights, *prefix))
        return Call((function, context, *arguments), {"spec": Spec(self._config, self._mesh, num_steps)})

    def _empty(self, rows: int, positions: int) -> Call:
        sizes = {"config": self._config, "rows": rows, "positions": positions, "dtype": self._settings.dtype}
        return Call((decode_lib.empty,), {**sizes, "mesh": self._mesh})

    def _prefill(self, prefix: SharedPrefix, rows: _CacheLike, new: NewTokens) -> Call:
        return self._call(decode_lib.prefill, prefix, rows, new)

    def _prefix_chunk(self, cache: _CacheLike, ids: Sequence[int], start: int) -> Call:
        """A chunk of a shared prefix, which is one row without anything before it."""
        chunk = ids[start : start + self.prefill_chunk]
        tokens, one = np.zeros((1, self.prefill_chunk), np.int32), np.ones(1, np.int32)
        tokens[0, : len(chunk)] = chunk
        nothing = SharedPrefix(self.empty(1, 0), np.int32(0))
        return self._prefill(nothing, cache, NewTokens(tokens, start * one, len(chunk) * one))

    def _draw_first(
        self, prefix: SharedPrefix, ends: PromptEnds, state: SlotState, *, allowed: Array | None = None
    ) -> Call:
        # The first draw's position is the prompt's last token, so that it never meets a later draw's key.
        state = state._replace(filled=state.filled - 1)
        return self._call(decode_lib.draw_first, prefix, ends, state, allowed)

    def _decode(self, prefix: SharedPrefix, cache: _CacheLike, state: SlotState, *, rules: Rules) -> Call:
        num_steps = 1 if rules.allowed is not None else self._settings.steps_per_call
        return self._call(decode_lib.decode, prefix, cache, state, rules, num_steps=num_steps)

    def _teacher_force(self, prefix: SharedPrefix, packed: Packed, targets: Targets) -> Call:
        return self._call(decode_lib.teacher_forced, prefix, packed, targets, self._end_ids)

    def _copy(self, target: _CacheLike, source: _CacheLike | None, pairs: Sequence[tuple[int, int]]) -> Call:
        # Rows are counted within a data shard, which has its part of these arrays.
        shards = self.data_shards
        rows, targets = np.zeros((2, shards, self.num_slots // shards), np.int32)
        counts = np.zeros(shards, np.int32)
        of_source, of_target = (len(cache[0][0]) // shards for cache in (source or target, target))
        for row, to in pairs:
            shard = to // of_target
            rows[shard, counts[shard]], targets[shard, counts[shard]] = row % of_source, to % of_target
            counts[shard] += 1
        copies = Copies(targets.reshape(-1), rows.reshape(-1), counts)
        if source is None:
            return Call((decode_lib.copy_within, target, copies), {"mesh": self._mesh})
        return Call((decode_lib.copy_rows, target, source, copies), {"mesh": self._mesh})

    def _lengthen(self, cache: _CacheLike, longer: _CacheLike) -> Call:
        rows = len(cache[0][0])
        shards = kv_cache.data_shards(self._mesh, rows)
        places = np.tile(np.arange(rows // shards, dtype=np.int32), shards)
        copies = Copies(places, places, np.full(shards, rows // shards, np.int32))
        return Call((decode_lib.copy_rows, longer, cache, copies), {"mesh": self._mesh})
