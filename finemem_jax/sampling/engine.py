"""One model on its devices, ready to generate: weights, shapes of caches, and a small fixed set of programs.

Sizes as in `decoding`. Knows nothing of requests; `sampler` decides what is computed, and when.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from finemem_jax.models import kv_cache, logical_axes
from finemem_jax.models.attention import Array
from finemem_jax.models.decoder import Params
from finemem_jax.models.kv_cache import LayerCache, Tree
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.runtime import compilation
from finemem_jax.runtime.compilation import Call
from finemem_jax.sampling import decode as decode_lib
from finemem_jax.sampling.decode import SlotState
from finemem_jax.sampling.token_sampling import Sample

# What prefill is compiled for: one row of each share or at most so many, and these parts of a piece.
_MOST_ROWS = 4
_PARTS = (4, 1)


class SharedPrefix(NamedTuple):
    """Keys and values of what all rows begin with, and how many positions of them are valid."""

    cache: list[LayerCache]
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
    """See the module.

    Attributes:
        num_slots: N; as asked for, or a few more, so that devices can share them out evenly.
        piece: Tokens of a prompt computed together.
        weights: As they are decoded with (`kv_cache.layout`); None while there are none.
        device_seconds: Time so far spent on calls to the device and on waiting for them, compiling included (s).
    """

    def __init__(
        self,
        config: DecoderConfig,
        end_ids: Sequence[int],
        *,
        num_slots: int,
        steps_per_call: int,
        piece: int,
        dtype: str,
        whole: bool,
        int8: bool = False,
        in_place: bool = False,
    ):
        self.num_slots, self.piece = num_slots, piece
        self.device_seconds = 0.0
        self._least_shared_prefix = 0
        self._config, self._end_ids = config, np.asarray(end_ids, np.int32)
        self._steps_per_call = steps_per_call
        self._dtype, self._whole, self._int8, self._in_place = dtype, whole, int8, in_place
        self.weights: Any = None
        # Copies of the slots' rows that are prefilled, by their number; between two calls they mean nothing.
        self._scratch: dict[int, list[LayerCache]] = {}
        self._mesh: Mesh | None = None
        self._device: SingleDeviceSharding | None = None

    def load(self, params: Params) -> None:
        """Takes weights: a copy, in the layout of decoding; or the arrays themselves.

        Raises:
            ValueError: these arrays are of another dtype than the caches.
        """
        place = jax.tree.leaves(params)[0].sharding
        mesh = place.mesh if isinstance(place, NamedSharding) else None
        self._mesh = mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None
        shares = 1 if self._mesh is None else logical_axes.size(self._mesh, logical_axes.ROWS)
        self.num_slots = -(-self.num_slots // shares) * shares
        if self._in_place:
            dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
            if dtypes != {self._dtype}:
                raise ValueError(
                    f"Weights of {', '.join(sorted(dtypes))} cannot be decoded with in place in {self._dtype}; set "
                    "sampler.dtype to model.param_dtype, or sampler.in_place=False."
                )
            weights = kv_cache.in_place(params)
        else:
            weights = kv_cache.layout(self._config, params, self._dtype, self._int8)
        if self._mesh is None:
            # Of one kind also where the trainer has a mesh of one device: else programs would be compiled for either.
            self._device = SingleDeviceSharding(*place.device_set)
            weights = jax.device_put(weights, self._device)
        elif not self._in_place:
            where = kv_cache.shardings(self._config, self._mesh, self._whole, self._int8)
            weights = jax.device_put(weights, where)
        self.weights = weights

    def drop(self) -> None:
        """Gives the weights up, and what was computed with them."""
        self.weights = None
        self._scratch.clear()

    # ---------------------------------------------------------------------------------- shapes

    @property
    def shares(self) -> int:
        """In how many parts devices share out the slots."""
        return kv_cache.shares(self._mesh, self.num_slots)

    @property
    def row_buckets(self) -> list[int]:
        """Numbers of rows of each share that are prefilled together."""
        return row_buckets(self.num_slots // self.shares)

    @property
    def length_buckets(self) -> list[int]:
        """Numbers of tokens per row that are prefilled together."""
        return sorted({max(self.piece // part, 1) for part in _PARTS})

    def positions(self, length: int) -> int:
        """The length of cache that so many tokens get: 1, 2, 3, 4, 6, 8, 12, … pieces; none for none."""
        if not length:
            return 0
        pieces = -(-length // self.piece)
        power = 1 << (pieces.bit_length() - 1)
        return self.piece * next(n for n in (power, power + power // 2, 2 * power) if n >= pieces)

    def sizes(self, positions: int) -> list[int]:
        """The lengths that slots may have where none needs more: from half of it on, so that few are compiled for."""
        found = [self.positions(-(-positions // 2))]
        while found[-1] < positions:
            found.append(self.positions(found[-1] + 1))
        return found

    def empty(self, rows: int, positions: int) -> list[LayerCache]:
        """A cache of zeros, where it belongs on the devices."""
        cache = self._run(self._empty(rows, positions))
        return cache if self._mesh is not None else jax.device_put(cache, self._device)

    def _empty(self, rows, positions):
        sizes = {"config": self._config, "rows": rows, "positions": positions, "dtype": self._dtype}
        return Call((decode_lib.empty,), {**sizes, "mesh": self._mesh})

    def _shape(self, rows, positions):
        """What `empty` returns, without its memory."""
        cache = jax.eval_shape(lambda: kv_cache.empty(self._config, rows, positions, self._dtype))
        if self._mesh is None:
            places = jax.tree.map(lambda _: self._device, cache)
        else:
            places = kv_cache.cache_shardings(self._mesh, cache)
        return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), cache, places)

    def warm_up(
        self,
        shared_prefix_length: int,
        positions: Sequence[int],
        stored: tuple[int, int],
        say: Callable[[int, int], None],
    ) -> None:
        """Compiles all programs for caches of these sizes. Shorter shared prefixes will be padded to this length.

        Args:
            positions: Of the slots, from the fewest to the most; they may be lengthened from any to any.
            stored: Rows and positions of the store.
            say: Called with the number of programs that are ready and the number of all, before each and at the end.
        """
        self._least_shared_prefix = self.positions(shared_prefix_length)
        shared_prefix = SharedPrefix(self._shape(1, self._least_shared_prefix), np.int32(shared_prefix_length))
        state, store = decode_lib.idle(self.num_slots), self._shape(*stored)
        sizes = [self._shape(self.num_slots, size) for size in positions]
        calls = [self._empty(*size) for size in ((1, self._least_shared_prefix), (1, 0), stored)]
        calls += [self._empty(self.num_slots, size) for size in positions]
        calls += [self._decode(shared_prefix, slots, state, 0) for slots in sizes]
        for rows in (self.shares * rows for rows in self.row_buckets):
            nothing, copies = np.zeros(rows, np.int32), self._shape(rows, positions[-1])
            calls.append(self._empty(rows, positions[-1]))
            calls += [self._copy(*pair, []) for slots in sizes for pair in ((copies, slots), (slots, copies))]
            for length in self.length_buckets:
                tokens = np.zeros((rows, length), np.int32)
                calls.append(self._prefill(shared_prefix, copies, tokens, nothing, nothing))
            hidden = jax.ShapeDtypeStruct((rows, self._config.embed_dim), self._dtype, sharding=self._states(rows))
            calls.append(self._first(shared_prefix, hidden, np.zeros(self.num_slots, np.int32), state))
        for slots in sizes:
            calls += [self._copy(*pair, []) for pair in ((slots, store), (store, slots), (slots, None))]
        calls += [self._lengthen(shorter, longer) for shorter, longer in itertools.combinations(sizes, 2)]
        if shared_prefix_length:
            calls.append(self._shared_prefix_piece(shared_prefix.cache, (0,), 0))
        compilation.prepare_all(calls, say)

    def _states(self, rows):
        """Where the last hidden states of rows live that have been prefilled."""
        if self._mesh is None:
            return self._device
        return logical_axes.place(self._mesh, (rows, self._config.embed_dim), kv_cache.STATES)

    # ---------------------------------------------------------------------------------- what it computes

    def shared_prefix(self, ids: Sequence[int]) -> SharedPrefix:
        """Computes a shared prefix."""
        cache = self.empty(1, max(self.positions(len(ids)), self._least_shared_prefix))
        for start in range(0, len(ids), self.piece):
            _, cache = self._run(self._shared_prefix_piece(cache, ids, start))
        return SharedPrefix(cache, np.int32(len(ids)))

    def prefill(
        self,
        shared_prefix: SharedPrefix,
        cache: list[LayerCache],
        positions: int,
        slots: Mapping[int, int],
        tokens: Array,
        lengths: Array,
        starts: Array,
    ) -> tuple[jax.Array, list[LayerCache]]:
        """`decode_lib.prefill` of some slots of a cache.

        Args:
            positions: Of the copies that are computed with: as many as a slot may ever have, so that one program serves
                slots of all lengths.
            slots: Which slot's each row of tokens is, of those that are not padding. The first rows are of the first
                share's slots, and so on, as many of each. Rows and tokens per row must be of the buckets.
        """
        count = len(tokens)
        rows = self._scratch.pop(count, None)
        if rows is None or rows[0][1].shape[2] != positions:
            rows = self.empty(count, positions)
        rows = self.copy(rows, cache, [(slot, row) for row, slot in slots.items()])
        hidden, rows = self._run(self._prefill(shared_prefix, rows, tokens, lengths, starts))
        cache = self.copy(cache, rows, list(slots.items()))
        self._scratch[count] = rows
        return hidden, cache

    def draw_first(
        self,
        shared_prefix: SharedPrefix,
        hidden: jax.Array,
        rows: Array,
        state: SlotState,
        allowed: Array | None = None,
    ) -> Sample:
        """`decode_lib.draw_first` of slots whose prompts have just been prefilled, as NumPy arrays."""
        return self._fetch(self._run(self._first(shared_prefix, hidden, rows, state, allowed)))

    def decode(
        self,
        shared_prefix: SharedPrefix,
        cache: list[LayerCache],
        state: SlotState,
        leave_at: int,
        allowed: Array | None = None,
    ) -> tuple[list[LayerCache], SlotState, Sample]:
        """`decode_lib.decode`; state and what was drawn as NumPy arrays. Of what is `allowed`, one step."""
        cache, *rest = self._run(self._decode(shared_prefix, cache, state, leave_at, allowed))
        return cache, *self._fetch(rest)

    def teacher_force(
        self,
        shared_prefix: SharedPrefix,
        tokens: Array,
        tree: Tree,
        rows: Array,
        places: Array,
        targets: Array,
        count: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """`decode_lib.teacher_forced`, as NumPy arrays."""
        return self._fetch(self._run(self._teacher_force(shared_prefix, tokens, tree, rows, places, targets, count)))

    def warm_up_teacher(
        self, shared_prefix_length: int, shapes: Sequence[tuple[int, int]], say: Callable[[int, int], None]
    ):
        """Compiles `teacher_force` for rows and tokens of these shapes; see `warm_up`."""
        self._least_shared_prefix = max(self._least_shared_prefix, self.positions(shared_prefix_length))
        shared_prefix = SharedPrefix(self._shape(1, self._least_shared_prefix), np.int32(shared_prefix_length))
        calls = [self._empty(1, self._least_shared_prefix), self._empty(1, 0)]
        for shape in shapes:
            tokens, some = np.zeros(shape, np.int32), np.zeros(targets_in(shape), np.int32)
            calls.append(self._teacher_force(shared_prefix, tokens, Tree(tokens, tokens), some, some, some, 0))
        if shared_prefix_length:
            calls.append(self._shared_prefix_piece(shared_prefix.cache, (0,), 0))
        compilation.prepare_all(calls, say)

    def copy(
        self, target: list[LayerCache], source: list[LayerCache] | None, pairs: Sequence[tuple[int, int]]
    ) -> list[LayerCache]:
        """Copies rows, one after the other.

        Args:
            source: None for `target` itself.
            pairs: (row of source, row of target), at most as many as slots, and each pair of one share.
        """
        return self._run(self._copy(target, source, pairs))

    def lengthen(self, cache: list[LayerCache], positions: int) -> list[LayerCache]:
        """The same rows in a cache with more positions."""
        return self._run(self._lengthen(cache, self.empty(len(cache[0][0]), positions)))

    # ---------------------------------------------------------------------------------- calls

    def _run(self, call):
        began = time.perf_counter()
        result = compilation.call(*call.arguments, **call.statics)
        self.device_seconds += time.perf_counter() - began
        return result

    def _fetch(self, arrays):
        """The arrays as NumPy's own, once they are computed."""
        began = time.perf_counter()
        fetched = jax.tree.map(np.array, arrays)
        self.device_seconds += time.perf_counter() - began
        return fetched

    def _prefill(self, shared_prefix, rows, tokens, lengths, starts):
        return Call(
            (
                decode_lib.prefill,
                self.weights,
                shared_prefix.cache,
                rows,
                tokens,
                lengths,
                shared_prefix.length,
                starts,
            ),
            {"config": self._config, "mesh": self._mesh},
        )

    def _shared_prefix_piece(self, cache, ids, start):
        piece = ids[start : start + self.piece]
        tokens = np.zeros((1, self.piece), np.int32)
        tokens[0, : len(piece)] = piece
        nothing, one = SharedPrefix(self.empty(1, 0), np.int32(0)), np.ones(1, np.int32)
        return self._prefill(nothing, cache, tokens, len(piece) * one, start * one)

    def _first(self, shared_prefix, hidden, rows, state, allowed=None):
        # The first draw's position is the prompt's last token, so that it never meets a later draw's key.
        state = state._replace(filled=state.filled - 1)
        arguments = (decode_lib.draw_first, self.weights, hidden, rows, state, shared_prefix.length, allowed)
        return Call(arguments, {"config": self._config})

    def _decode(self, shared_prefix, cache, state, leave_at, allowed=None):
        return Call(
            (decode_lib.decode, self.weights, shared_prefix.cache, cache, state, shared_prefix.length,
             np.int32(leave_at), self._end_ids, allowed),
            {"config": self._config, "num_steps": 1 if allowed is not None else self._steps_per_call,
             "mesh": self._mesh},
        )  # fmt: skip

    def _teacher_force(self, shared_prefix, tokens, tree, rows, places, targets, count):
        return Call(
            (decode_lib.teacher_forced, self.weights, shared_prefix.cache, tokens, tree, rows, places, targets,
             np.int32(count), shared_prefix.length, self._end_ids),
            {"config": self._config, "mesh": self._mesh},
        )  # fmt: skip

    def _copy(self, target, source, pairs):
        # Rows are counted within a share, which has its part of these arrays.
        rows, targets = np.zeros((2, self.shares, self.num_slots // self.shares), np.int32)
        counts = np.zeros(self.shares, np.int32)
        of_source, of_target = (len(cache[0][0]) // self.shares for cache in (source or target, target))
        for row, to in pairs:
            share = to // of_target
            rows[share, counts[share]], targets[share, counts[share]] = row % of_source, to % of_target
            counts[share] += 1
        places = targets.reshape(-1), rows.reshape(-1), counts
        if source is None:
            return Call((decode_lib.copy_within, target, *places), {"mesh": self._mesh})
        return Call((decode_lib.copy_rows, target, source, *places), {"mesh": self._mesh})

    def _lengthen(self, cache, longer):
        rows = len(cache[0][0])
        shares = kv_cache.shares(self._mesh, rows)
        places = np.tile(np.arange(rows // shares, dtype=np.int32), shares)
        counts = np.full(shares, rows // shares, np.int32)
        return Call((decode_lib.copy_rows, longer, cache, places, places, counts), {"mesh": self._mesh})
