"""Serves requests with one model: a batch of slots is decoded, and a request enters as soon as a slot is free.

The host's side of generation (continuous batching): `collect` admits waiting requests to free slots, computes what
their prompts lack chunk by chunk, and decodes all slots for a few steps, again and again. `slots` decides which request
gets which slot, and by `prefix_cache` what need not be computed again; `engine` calls the programs of `decode`.

Prompts come as parts (`Request.cuts`): the shared prefix, the same for all requests in the slots, is computed once per
set of weights, and attention reads it once for all of them. Of the rest, a prompt takes over whatever some row of the
caches already begins with: the chunk that another rollout of its stream has read, or all of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from finemem_jax.config import sections
from finemem_jax.models.decoder import Params
from finemem_jax.models.kv_cache import NewTokens
from finemem_jax.models.logical_axes import Array
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.sampling.decode import PromptEnds
from finemem_jax.sampling.engine import Engine, SharedPrefix
from finemem_jax.sampling.slots import SLOTS, STORE, Admission, Slot, Slots
from finemem_jax.sampling.token_sampling import Sample
from finemem_jax.types import Completion, Refusal, Request

# How many later requests may overtake one with another shared prefix: to change the prefix, slots must empty.
_PATIENCE = 256


@dataclasses.dataclass
class SamplerStats:
    """Counts since the last `Sampler.take_stats`.

    Attributes:
        prefilled_tokens: Prompt tokens that were computed; the others were there already.
        padded_tokens: The same with the padding of rows and lengths.
        slot_steps, slot_tokens: Slots times decoding steps, and tokens drawn in these; without idle slots, the same.
        device_seconds: Of `seconds`, those spent on calls to the device and on waiting for them.
    """

    requests: int = 0
    refused: int = 0
    new_tokens: int = 0
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    padded_tokens: int = 0
    slot_steps: int = 0
    slot_tokens: int = 0
    seconds: float = 0.0
    device_seconds: float = 0.0


class Sampler:
    """Generates with one model. Not thread-safe.

    Requests are handed in one by one (`submit`) or all at once (`generate`). What comes out depends on the request
    alone: not on the others, their order, or the number of slots.

    Attributes:
        engine: What computes; others may compute with the same weights.
        poll: Called while `collect` works, after every call that decodes. Where it returns True, `collect` comes
            back although nothing may be done; what it raises ends `collect`, and all that is pending stays so.
    """

    def __init__(
        self,
        config: DecoderConfig,
        params: Params,
        end_ids: Sequence[int],
        *,
        settings: sections.Sampler,
        num_stored: int = 4,
    ):
        """Takes weights of version 0.

        Args:
            end_ids: Tokens that end a completion.
            settings: With `in_place`, `offload` before the arrays of `params` are given away.
            num_stored: Group prefixes kept beside the slots.
        """
        self.config = config
        self.stats = SamplerStats()
        self.poll: Callable[[], bool | None] = lambda: None
        self._end_ids = frozenset(end_ids)
        self.engine = Engine(config, end_ids, settings)
        self._num_stored = num_stored
        self._last_id = itertools.count()
        self._waiting: dict[tuple[int, ...], deque[tuple[int, Request]]] = {}
        self._done: list[tuple[int, Completion | Refusal]] = []
        self._slots: Slots | None = None
        self._positions = 0
        self.update(params, 0)

    # ---------------------------------------------------------------------------------- weights

    def update(self, params: Params, policy_version: int) -> None:
        """Takes new weights, and forgets everything computed with the old ones.

        Raises:
            ValueError: requests are pending; collect or cancel them first.
        """
        self.offload()
        self.policy_version = policy_version
        self.engine.load(params)

    def offload(self) -> None:
        """Drops the weights, and all computed with them, until the next `update`: more than a model's size of memory.

        Raises:
            ValueError: requests are pending; collect or cancel them first.
        """
        self._check_idle("new weights")
        self.engine.drop()
        self._shared_prefixes: dict[tuple[int, ...], SharedPrefix] = {}
        self._slots = None

    def reset(self) -> None:
        """Empties the slots, as if nothing had been served since the last `update`.

        Numbers are rounded by the lengths of caches and by what was computed together, and both depend on what the
        slots have served: a program that goes on from here can only repeat those that another began here.

        Raises:
            ValueError: requests are pending; collect or cancel them first.
        """
        self._check_idle("empty slots")
        self._slots = None

    def warm_up(
        self, prefix_length: int, positions: int, say: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Compiles all that requests of a size can need, so that serving them compiles nothing.

        Args:
            prefix_length: Tokens of the longest shared prefix; shorter ones are padded to it.
            positions: Tokens beyond it that a request may have, new ones included. Larger requests are served too, but
                what they need is compiled when they come.
            say: Called with the number of programs that are ready and the number of all, before each and at the end.
        """
        self._positions = max(self._positions, self.engine.positions(positions))
        sizes = self.engine.sizes(self._positions)
        self.engine.warm_up(prefix_length, sizes, stored=(self._stored_rows, self._half), say=say)

    def take_stats(self) -> SamplerStats:
        """Returns the counts since the last call."""
        stats, self.stats = self.stats, SamplerStats()
        return stats

    # ---------------------------------------------------------------------------------- requests

    @property
    def pending(self) -> int:
        """Requests handed in whose results have not been collected."""
        waiting = sum(map(len, self._waiting.values())) + len(self._done)
        return waiting + (self.engine.num_slots - self._slots.num_free if self._slots else 0)

    def submit(self, request: Request) -> int:
        """Hands a request in. Returns its request_id, with which `collect` will return its result."""
        request_id = next(self._last_id)
        self.stats.requests += 1
        reason = self._objection(request)
        if reason:
            self.stats.refused += 1
            self._done.append((request_id, Refusal(reason)))
        else:
            self.stats.prompt_tokens += len(request.prompt_ids)
            self._waiting.setdefault(request.shared_prefix, deque()).append((request_id, request))
        return request_id

    def cancel(self, request_id: int) -> bool:
        """Takes a request back, at whatever stage. Returns whether it was still to be collected; now it never is."""
        for queue in self._waiting.values():
            for place, (other, _) in enumerate(queue):
                if other == request_id:
                    del queue[place]
                    return True
        for slot, taken in enumerate(self._slots.occupants if self._slots else ()):
            if self._slots and taken is not None and taken.request_id == request_id:
                self._slots.leave(slot)
                return True
        before = len(self._done)
        self._done = [pair for pair in self._done if pair[0] != request_id]
        return len(self._done) < before

    def collect(self, wait: bool = True) -> list[tuple[int, Completion | Refusal]]:
        """Works until at least one request is done. Returns all that are, with their ids; [] if none is pending.

        It may come back earlier, with [], where `poll` says so.

        Args:
            wait: False: do no work, and return what is done already.
        """
        began, waited = time.perf_counter(), self.engine.device_seconds
        while wait and not self._done and self.pending:
            slots = self._slots_for_waiting()
            if slots is not None and slots.num_free:
                self._admit(slots)
            if self._slots is not None and any(self._slots.occupants):
                self._decode(self._slots)
            if self.poll():
                break
        done, self._done = self._done, []
        self.stats.seconds += time.perf_counter() - began
        self.stats.device_seconds += self.engine.device_seconds - waited
        return done

    def generate(self, requests: Sequence[Request]) -> list[Completion | Refusal]:
        """Completes all requests; results stand in their order.

        Raises:
            ValueError: other requests are pending, whose results would be lost.
        """
        self._check_idle("`generate`")
        place = {self.submit(request): index for index, request in enumerate(requests)}
        results: list[Any] = [None] * len(requests)
        while self.pending:
            for request_id, result in self.collect():
                results[place[request_id]] = result
        return results

    def _check_idle(self, wanted: str) -> None:
        if self.pending:
            raise ValueError(f"{self.pending} requests are pending; collect or cancel them before {wanted}.")

    def _objection(self, request: Request) -> str:
        """Why a request cannot be served; "" if it can."""
        config, length, cuts = self.config, len(request.prompt_ids), request.cuts
        if not length:
            return "The prompt is empty; it needs at least one token."
        low, high = min(request.prompt_ids), max(request.prompt_ids)
        if low < 0 or high >= config.vocab_size:
            return (
                f"The prompt has token ids from {low} to {high}, but {config.name} knows 0 to {config.vocab_size - 1}; "
                "use the tokenizer that belongs to the model."
            )
        if not cuts or list(cuts) != sorted(cuts) or cuts[0] < 0 or cuts[-1] != length:
            return f"The cuts {cuts} must rise from 0 or more to the prompt's length, {length}."
        if cuts[0] == length:
            return f"The cuts {cuts} make all of the prompt its shared prefix; leave at least one token to follow it."
        if request.max_new_tokens < 1:
            return f"max_new_tokens must be at least 1, got {request.max_new_tokens}."
        if not 0 <= request.temperature < float("inf"):
            return f"temperature must be 0 (greedy) or above, and finite; got {request.temperature}."
        if request.top_k < 0 or not 0 < request.top_p <= 1:
            return f"top_k must be 0 or above, and top_p in (0, 1]; got {request.top_k} and {request.top_p}."
        if length + request.max_new_tokens > config.max_length:
            return (
                f"A request of {length} prompt tokens and {request.max_new_tokens} new ones does not fit {config.name} "
                f"({config.max_length} tokens); lower rollout.max_new_tokens, data.chunk_words or memory.view_tokens."
            )
        return ""

    # ---------------------------------------------------------------------------------- admission

    def _slots_for_waiting(self) -> Slots | None:
        """The slots, over the shared prefix that is next; None if nothing waits, or they must empty first."""
        first_of = {prefix: queue[0][0] for prefix, queue in self._waiting.items() if queue}
        if not first_of:
            return None
        prefix_ids, slots = min(first_of, key=first_of.__getitem__), self._slots
        if slots is not None and first_of.get(slots.prefix_ids, np.inf) < first_of[prefix_ids] + _PATIENCE:
            return slots
        if slots is not None and any(slots.occupants):
            return None
        self._waiting = {ids: queue for ids, queue in self._waiting.items() if queue}
        if slots is None:
            size = self._size_for(_need(self._waiting[prefix_ids][0][1]))
            caches = {
                SLOTS: self.engine.empty(self.engine.num_slots, size),
                STORE: self.engine.empty(self._stored_rows, self._half),
            }
            self._slots = Slots(
                prefix_ids, self._shared_prefix(prefix_ids), caches, data_shards=self.engine.data_shards
            )
        else:
            slots.take_over(prefix_ids, self._shared_prefix(prefix_ids))
        return self._slots

    def _shared_prefix(self, ids: tuple[int, ...]) -> SharedPrefix:
        """A shared prefix, computed once per set of weights."""
        if ids not in self._shared_prefixes:
            chunk = self.engine.prefill_chunk
            self._shared_prefixes[ids] = self.engine.shared_prefix(ids)
            self.stats.prefilled_tokens += len(ids)
            self.stats.padded_tokens += -(-len(ids) // chunk) * chunk
        return self._shared_prefixes[ids]

    def _size_for(self, need: int) -> int:
        """Positions that slots are given for requests that need so many: from half of the most there were on.

        Every step of decoding reads all positions of all slots, used or not.
        """
        self._positions = max(self._positions, self.engine.positions(need))
        return max(self._half, self.engine.positions(need))

    @property
    def _half(self) -> int:
        # As long are the rows of the store: a group prefix is seldom more than half of what a request takes.
        return self.engine.sizes(self._positions)[0]

    @property
    def _stored_rows(self) -> int:
        shards = self.engine.data_shards
        return -(-self._num_stored // shards) * shards

    def _admit(self, slots: Slots) -> None:
        """Fills free slots with waiting requests, and draws their first tokens."""
        queue = self._waiting[slots.prefix_ids]
        requests = [queue.popleft() for _ in range(min(slots.num_free, len(queue)))]
        size = self._size_for(max(_need(request) for _, request in requests))
        if size > slots.positions:
            slots.lengthen(self.engine.lengthen(slots.caches[SLOTS], size))
        admissions = slots.admit(requests)
        duplicates = {one.slot: one.duplicate_of for one in admissions if one.duplicate_of is not None}
        for stage in range(1 + max(one.stage for one in admissions)):
            of_stage = [one for one in admissions if one.stage == stage]
            self._copy_sources(slots, of_stage)
            self._prefill(slots, [one for one in of_stage if one.duplicate_of is None], duplicates)
            saved = [(one.slot, one.saved) for one in of_stage if one.saved is not None]
            if saved:
                slots.caches[STORE] = self.engine.copy(slots.caches[STORE], slots.caches[SLOTS], saved)

    def _copy_sources(self, slots: Slots, admissions: Sequence[Admission]) -> None:
        """Copies what other rows have of the prompts."""
        found = [(one.source, one.slot) for one in admissions if one.source]
        # In order: what is copied from may be the next one's target.
        for name, group in itertools.groupby(found, key=lambda pair: pair[0][0]):
            pairs = [(row, slot) for (_, row), slot in group]
            source = None if name == SLOTS else slots.caches[name]
            slots.caches[SLOTS] = self.engine.copy(slots.caches[SLOTS], source, pairs)

    def _prefill(self, slots: Slots, admissions: list[Admission], duplicates: Mapping[int, int]) -> None:
        """Computes what slots lack of their prompts, chunk by chunk, and draws first tokens as prompts end.

        Args:
            duplicates: {slot: slot with the same prompt}; they draw when that one does.
        """
        while admissions:
            # Those that lack most first, so that rows of a call are of like length.
            admissions.sort(key=lambda one: one.cached - len(one.suffix))
            hidden, row_of_slot = self._prefill_chunk(slots, admissions)
            ended = {
                one.slot: row_of_slot[one.slot]
                for one in admissions
                if one.slot in row_of_slot and one.cached == len(one.suffix)
            }
            ended |= {slot: ended[original] for slot, original in duplicates.items() if original in ended}
            if ended:
                self._draw_first(slots, hidden, ended)
            admissions = [one for one in admissions if one.cached < len(one.suffix)]

    def _prefill_chunk(self, slots: Slots, admissions: Sequence[Admission]) -> tuple[jax.Array, dict[int, int]]:
        """Computes a chunk of as many prompts as go into a call; returns last states, and which slot's are where."""
        shards, per_shard = self.engine.data_shards, self.engine.num_slots // self.engine.data_shards
        by_shard = [[one for one in admissions if one.slot // per_shard == shard] for shard in range(shards)]
        rows = self._rows_for(max(map(len, by_shard)))
        taken = {shard * rows + i: one for shard, own in enumerate(by_shard) for i, one in enumerate(own[:rows])}
        missing = max(len(one.suffix) - one.cached for one in taken.values())
        length = next((n for n in self.engine.length_buckets if n >= missing), self.engine.prefill_chunk)
        count = shards * rows
        tokens, starts = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
        lengths = np.ones(count, np.int32)
        for row, one in taken.items():
            # Whole buckets are written: near the end of the cache, some tokens are computed once more.
            start = min(one.cached, self._positions - length)
            chunk = one.suffix[start : start + length]
            tokens[row, : len(chunk)], starts[row], lengths[row] = chunk, start, len(chunk)
            self.stats.prefilled_tokens += start + len(chunk) - one.cached
            one.cached = start + len(chunk)
        self.stats.padded_tokens += tokens.size
        slot_of_row = {row: one.slot for row, one in taken.items()}
        hidden, slots.caches[SLOTS] = self.engine.prefill(
            slots.prefix, slots.caches[SLOTS], NewTokens(tokens, starts, lengths),
            slot_of_row=slot_of_row, positions=self._positions,
        )  # fmt: skip
        return hidden, {slot: row for row, slot in slot_of_row.items()}

    def _rows_for(self, count: int) -> int:
        """How many rows a prefill has: the least bucket that takes them all if they fill half of it, else the next."""
        buckets = self.engine.row_buckets
        larger = next((n for n in buckets if n >= count), buckets[-1])
        return larger if 2 * count > larger else max(n for n in buckets if n <= count)

    def _draw_first(self, slots: Slots, hidden: jax.Array, row_of_slot: Mapping[int, int]) -> None:
        """Draws the first token of each slot whose prompt has ended."""
        rows = np.zeros(self.engine.num_slots, np.int32)
        rows[list(row_of_slot)] = list(row_of_slot.values())
        allowed = slots.allowed(self.config.vocab_size)
        drawn = self.engine.draw_first(slots.prefix, PromptEnds(hidden, rows), slots.state, allowed=allowed)
        for slot in row_of_slot:
            taken = slots.occupants[slot]
            assert taken is not None, "its prompt has just ended"
            _append(taken, drawn, slot=slot, places=[0])
            self.stats.new_tokens += 1
            slots.state.token[slot] = drawn.token[slot]
            slots.state.remaining[slot] = taken.request.max_new_tokens - 1
            if drawn.token[slot] in self._end_ids or not slots.state.remaining[slot]:
                self._complete(slots, slot)

    # ---------------------------------------------------------------------------------- decoding

    def _decode(self, slots: Slots) -> None:
        """Decodes all slots for some steps, and completes those that end."""
        busy = sum(taken is not None for taken in slots.occupants)
        # While others wait, a few free slots are worth a look of the host.
        leave_at = busy - max(self.engine.num_slots // 8, 1) if self._waiting.get(slots.prefix_ids) else 0
        allowed = slots.allowed(self.config.vocab_size)
        slots.caches[SLOTS], slots.state, drawn = self.engine.decode(
            slots.prefix, slots.caches[SLOTS], slots.state, leave_at=max(leave_at, 0), allowed=allowed
        )
        is_drawn = drawn.token >= 0
        self.stats.slot_steps += int(is_drawn.any(0).sum()) * self.engine.num_slots
        self.stats.slot_tokens += int(is_drawn.sum())
        self.stats.new_tokens += int(is_drawn.sum())
        for slot, taken in enumerate(slots.occupants):
            if taken is None:
                continue
            _append(taken, drawn, slot=slot, places=is_drawn[slot])
            if slots.state.remaining[slot] == 0:
                self._complete(slots, slot)

    def _complete(self, slots: Slots, slot: int) -> None:
        """Frees a slot whose completion has ended, and keeps the completion for `collect`."""
        left = slots.leave(slot)
        ids, log_probs, raw_log_probs = left.drawn
        reason = "stop" if ids[-1] in self._end_ids else "length"
        completion = Completion(tuple(ids), tuple(log_probs), reason, self.policy_version, tuple(raw_log_probs))
        self._done.append((left.request_id, completion))


def _append(taken: Slot, drawn: Sample, *, slot: int, places: Array | list[int]) -> None:
    """Appends what a slot has drawn to its completion so far.

    Args:
        places: Of the tokens drawn by a call, those that are the slot's.
    """
    ids, *_ = found = [np.atleast_1d(values[slot])[places].tolist() for values in drawn]
    for so_far, new in zip(taken.drawn, found, strict=True):
        so_far += new
    if taken.matcher is not None:
        for token in ids:
            taken.matcher.advance(token)


def _need(request: Request) -> int:
    """Cache positions beyond the shared prefix that a request takes."""
    return len(request.prompt_ids) - len(request.shared_prefix) + request.max_new_tokens
