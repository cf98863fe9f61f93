"""The host side of generation: requests in, completions out, with shared prefixes computed once.

Requests are admitted to slots as these free up. Their prompts come as parts (`Request.cuts`): the trunk, which
all requests of a call share, is computed once per set of weights; a branch (a chunk, shared by the rollouts of
its stream) once per call; and identical prompts once each.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from finemem_jax import decoding
from finemem_jax.decoding import SlotState
from finemem_jax.drawing import Sampling
from finemem_jax.episode import Completion, Request
from finemem_jax.models import decoder
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig


@dataclasses.dataclass
class SamplerStats:
    """Counts since the last `Sampler.take_stats`."""

    requests: int = 0
    new_tokens: int = 0
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    slot_steps: int = 0
    seconds: float = 0.0


@dataclasses.dataclass
class _Occupant:
    """Which request a slot works on, and the ids, log-probs and raw log-probs that it has drawn."""

    index: int
    drawn: tuple[list[int], list[float], list[float]]


class Sampler:
    """Generates with one model. Not thread-safe."""

    def __init__(
        self,
        config: DecoderConfig,
        params: Params,
        end_ids: Sequence[int],
        *,
        num_slots: int,
        steps_per_call: int,
        length_multiple: int,
        dtype: str = "float32",
        policy_version: int = 0,
    ):
        """Args:
        num_slots: Rows decoded together.
        steps_per_call: Tokens drawn per row before the host looks for finished rows.
        length_multiple: Lengths are rounded up to multiples of this, so that few shapes are compiled.
        dtype: What weights and caches are held in, and products computed; "float32" or "bfloat16".
        """
        self.config = config
        self.stats = SamplerStats()
        self._end_ids = jnp.asarray(end_ids, jnp.int32)
        self._num_slots = num_slots
        self._steps_per_call = steps_per_call
        self._multiple = length_multiple
        self._dtype = dtype
        self.update(params, policy_version)

    def update(self, params: Params, policy_version: int) -> None:
        """Takes new weights, and forgets everything computed with the old ones."""
        self.policy_version = policy_version
        self._weights = _unstack(self.config, params, self._dtype)
        place = jax.tree.leaves(params)[0].sharding
        self._mesh = place.mesh if isinstance(place, NamedSharding) and place.mesh.size > 1 else None
        self._trunks: dict[tuple[int, ...], Any] = {}

    def release(self) -> None:
        """Drops the weights, and all computed with them, until the next `update`: a model's size of memory."""
        self._weights = None
        self._trunks = {}

    def take_stats(self) -> SamplerStats:
        """Returns the counts since the last call."""
        stats, self.stats = self.stats, SamplerStats()
        return stats

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completes every request; results stand in the order of the requests.

        Raises:
            ValueError: a request whose prompt and response exceed the model's length, or that leaves nothing to do.
        """
        began = time.perf_counter()
        results: list[Completion | None] = [None] * len(requests)
        for request in requests:
            self._check(request)
        by_trunk: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            by_trunk.setdefault(request.trunk, []).append(index)
        for trunk, indices in by_trunk.items():
            for index, completion in self._generate_on(trunk, [(i, requests[i]) for i in indices]):
                results[index] = completion
        self.stats.requests += len(requests)
        self.stats.prompt_tokens += sum(len(request.prompt_ids) for request in requests)
        self.stats.seconds += time.perf_counter() - began
        return results  # type: ignore[return-value]

    def _check(self, request):
        total = len(request.prompt_ids) + request.max_new_tokens
        if not request.leaf or request.max_new_tokens < 1:
            raise ValueError(
                "A request needs at least one new token and one prompt token after its last cut but one; "
                f"got max_new_tokens={request.max_new_tokens} and cuts {request.cuts}."
            )
        if total > self.config.max_length:
            raise ValueError(
                f"A request of {len(request.prompt_ids)} prompt tokens and {request.max_new_tokens} new ones "
                f"does not fit {self.config.name} ({self.config.max_length} tokens); lower "
                "rollout.max_new_tokens, data.chunk_words or memory.view_tokens."
            )

    # ---------------------------------------------------------------------------------- prefill

    def _trunk(self, ids):
        """Keys and values of the shared trunk, computed once per set of weights."""
        if ids not in self._trunks:
            length = len(ids)
            none = self._empty_cache(1, 0)
            cache = self._empty_cache(1, length)
            zero = jnp.zeros(1, jnp.int32)
            if length:
                tokens = jnp.asarray([ids], jnp.int32)
                lengths = jnp.asarray([length], jnp.int32)
                _, cache = decoding.prefill(self.config, self._weights, none, cache, tokens, lengths, zero[0], zero)
                self.stats.prefilled_tokens += length
            self._trunks[ids] = cache
        return self._trunks[ids], jnp.asarray(len(ids), jnp.int32)

    def _prefill(self, trunk, cache, rows, starts):
        """Appends token rows to cache rows; pads rows and lengths to their buckets."""
        trunk_cache, trunk_length = trunk
        length = self._bucket(max(len(row) for row in rows))
        tokens = np.zeros((len(starts), length), np.int32)
        lengths = np.ones(len(starts), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
            lengths[i] = len(row)
        self.stats.prefilled_tokens += int(lengths[: len(rows)].sum())
        return decoding.prefill(
            self.config, self._weights, trunk_cache, cache, tokens, lengths, trunk_length,
            np.asarray(starts, np.int32), self._mesh,
        )  # fmt: skip

    def _branches(self, trunk, branches):
        """Caches of the distinct branches, as rows of one cache no longer than these; row i belongs to branches[i]."""
        rows = _power_of_two(len(branches))
        cache = self._empty_cache(rows, self._bucket(max(map(len, branches))))
        if any(branches):
            _, cache = self._prefill(trunk, cache, branches, [0] * rows)
        return cache

    # ---------------------------------------------------------------------------------- decode

    def _generate_on(self, trunk_ids, numbered):
        trunk = self._trunk(trunk_ids)
        # Alike prompts next to each other, so that they are admitted, and prefilled, together.
        waiting = deque(sorted(numbered, key=lambda pair: (pair[1].branch, pair[1].leaf)))
        longest = max(len(r.prompt_ids) - len(trunk_ids) + r.max_new_tokens for _, r in numbered)
        widest_leaf = max(len(r.leaf) for _, r in numbered)
        # A padded prefill writes a whole bucket past its start: the cache must hold it, or the write would shift.
        longest = max(longest, max(len(r.branch) for _, r in numbered) + self._bucket(widest_leaf))
        positions = self._bucket(longest)
        branches = sorted({r.branch for _, r in numbered})
        branch_cache = self._branches(trunk, branches)
        branch_row = {branch: row for row, branch in enumerate(branches)}

        slots = min(self._num_slots, _power_of_two(len(numbered)))
        cache = self._empty_cache(slots, positions)
        state = SlotState(
            token=np.zeros(slots, np.int32),
            filled=np.zeros(slots, np.int32),
            remaining=np.zeros(slots, np.int32),
            sampling=Sampling(np.zeros(slots, np.float32), np.zeros(slots, np.int32), np.ones(slots, np.float32)),
            key=np.zeros((slots, 2), np.uint32),
        )
        occupant: list[_Occupant | None] = [None] * slots
        while waiting or any(occupant):
            free = [slot for slot, owner in enumerate(occupant) if owner is None]
            if waiting and free:
                admitted = [(slot, *waiting.popleft()) for slot in free[: len(waiting)]]
                cache = self._admit(trunk, branch_cache, branch_row, cache, state, occupant, admitted)
            cache, new_state, drawn = decoding.decode(
                self.config, self._weights, trunk[0], cache, state, trunk[1], self._steps_per_call, self._end_ids
            )
            state = jax.tree.map(np.array, new_state)
            drawn = jax.tree.map(np.asarray, drawn)
            held = drawn.token >= 0
            self.stats.slot_steps += int(held.any(0).sum()) * slots
            self.stats.new_tokens += int(held.sum())
            for slot, owner in enumerate(occupant):
                if owner is None:
                    continue
                for so_far, new in zip(owner.drawn, drawn, strict=True):
                    so_far += new[slot][held[slot]].tolist()
                if state.remaining[slot] == 0:
                    yield owner.index, self._completion(owner)
                    occupant[slot] = None

    def _admit(self, trunk, branch_cache, branch_row, cache, state, occupant, admitted):
        """Prefills the admitted requests' leaves, copies them into their slots and draws their first tokens."""
        prompts = list(dict.fromkeys((request.branch, request.leaf) for _, _, request in admitted))
        rows = _power_of_two(len(prompts))
        parents = [branch_row[branch] for branch, _ in prompts]
        starts = [len(branch) for branch, _ in prompts]
        padding = rows - len(prompts)
        positions = cache[0][0].shape[2]
        leaf_cache = decoding.gather_rows(branch_cache, np.asarray(parents + [0] * padding, np.int32), positions)
        hidden, leaf_cache = self._prefill(trunk, leaf_cache, [leaf for _, leaf in prompts], starts + [0] * padding)

        slots = len(state.token)
        row_of = {prompt: row for row, prompt in enumerate(prompts)}
        targets, sources = np.full(slots, slots, np.int32), np.zeros(slots, np.int32)
        for i, (slot, _, request) in enumerate(admitted):
            targets[i], sources[i] = slot, row_of[request.branch, request.leaf]
            state.filled[slot] = len(request.branch) + len(request.leaf)
            state.sampling.temperature[slot] = request.temperature
            state.sampling.top_k[slot] = request.top_k
            state.sampling.top_p[slot] = request.top_p
            state.key[slot] = request.key
        cache = decoding.insert_rows(cache, leaf_cache, targets, sources)

        source_of_slot = np.zeros(slots, np.int32)
        source_of_slot[targets[: len(admitted)]] = sources[: len(admitted)]
        # The first draw's position is the prompt's last token, so that it never meets a later draw's key.
        first_state = state._replace(filled=state.filled - 1)
        first = decoding.draw_first(self.config, self._weights, hidden[source_of_slot], first_state, trunk[1])
        first = jax.tree.map(np.asarray, first)
        ends = set(np.asarray(self._end_ids).tolist())
        for slot, index, request in admitted:
            occupant[slot] = _Occupant(
                index, ([int(first.token[slot])], [float(first.log_prob[slot])], [float(first.raw_log_prob[slot])])
            )
            state.token[slot] = first.token[slot]
            state.remaining[slot] = 0 if int(first.token[slot]) in ends else request.max_new_tokens - 1
            self.stats.new_tokens += 1
        return cache

    def _completion(self, owner):
        ids, log_probs, raw_log_probs = map(tuple, owner.drawn)
        reason = "stop" if ids[-1] in np.asarray(self._end_ids) else "length"
        return Completion(ids, log_probs, reason, self.policy_version, raw_log_probs)

    def _empty_cache(self, rows, positions):
        return decoding.empty_cache(self.config, rows, positions, self._dtype)

    def _bucket(self, length):
        return -(-length // self._multiple) * self._multiple


def _unstack(config, params, dtype):
    # Copies, never views: the learner gives its arrays away at the next update.
    rest, layers = decoder.unstack(config, params)
    return jax.tree.map(lambda x: jnp.array(x, dtype), rest), jax.tree.map(lambda x: x.astype(dtype), layers)


def _power_of_two(n):
    return 1 << (n - 1).bit_length()
