"""The host side of generation: requests in, completions out, in whatever order they are done.

A fixed number of slots is decoded together; a request enters as soon as a slot is free. Prompts come as parts
(`Request.cuts`): the shared prefix, the same for all requests in the slots, is computed once per set of weights, and
attention reads it once for all of them. Of the rest, a prompt takes over whatever some row of the caches already begins
with: the chunk that another rollout of its stream has read, or all of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.sampling.engine import Engine, SharedPrefix
from finemem_jax.sampling.slots import SLOTS, STORE, Slots
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

    Attributes:
        engine: What computes; others may compute with the same weights.
        poll: Called while `collect` works, after every call that decodes. Where it returns True, `collect` comes
            back although nothing may be done; what it raises ends `collect`, and all that is pending stays so.

    Requests are handed in one by one (`submit`) or all at once (`generate`). What comes out depends on the request
    alone: not on the others, their order, or the number of slots.
    """

    def __init__(
        self,
        config: DecoderConfig,
        params: Params,
        end_ids: Sequence[int],
        *,
        num_slots: int,
        steps_per_call: int,
        prefill_tokens: int,
        num_stored: int = 4,
        dtype: str = "float32",
        whole: bool = True,
        int8: bool = False,
        in_place: bool = False,
        policy_version: int = 0,
    ):
        """Args:
        num_slots: Rows decoded together.
        steps_per_call: Tokens drawn per row before the host looks for finished rows.
        prefill_tokens: Tokens of a prompt computed together; longer ones take several calls. Caches are as long as
            so many, or 2, 3, 4, 6, 8, 12, … times as many: few lengths, so that few programs are compiled.
        num_stored: Branches kept beside the slots.
        dtype: What weights and caches are held in, and products computed; "float32" or "bfloat16".
        whole: Devices along "fsdp" hold the weights whole, instead of in parts as they are stored.
        int8: Round the layers' kernels to 8 bits (`cached.layout`).
        in_place: Decode with the arrays of `params` themselves, where they live; `release` before they are given away.
            Saves a copy, and its time at every update; on CPUs decoding is slower.
        """
        self.config = config
        self.stats = SamplerStats()
        self.poll: Callable[[], bool | None] = lambda: None
        self._end_ids = frozenset(end_ids)
        self.engine = Engine(
            config, end_ids, num_slots=num_slots, steps_per_call=steps_per_call, piece=prefill_tokens, dtype=dtype,
            whole=whole, int8=int8, in_place=in_place,
        )  # fmt: skip
        self._num_stored = num_stored
        self._last_id = itertools.count()
        self._waiting: dict[tuple[int, ...], deque[tuple[int, Request]]] = {}
        self._done: list[tuple[int, Completion | Refusal]] = []
        self._slots: Slots | None = None
        self._positions = 0
        self.update(params, policy_version)

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
        self, shared_prefix: int, positions: int, say: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Compiles all that requests of a size can need, so that serving them compiles nothing.

        Args:
            shared_prefix: Tokens of the longest shared prefix; shorter ones are padded to it.
            positions: Tokens beyond it that a request may have, new ones included. Larger requests are served too, but
                what they need is compiled when they come.
            say: Called with the number of programs that are ready and the number of all, before each and at the end.
        """
        self._positions = max(self._positions, self.engine.positions(positions))
        sizes = self.engine.sizes(self._positions)
        self.engine.warm_up(shared_prefix, sizes, (self._stored_rows, self._half), say)

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
        for slot, owner in enumerate(self._slots.occupants if self._slots else ()):
            if self._slots and owner is not None and owner.request_id == request_id:
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

    def _check_idle(self, wanted):
        if self.pending:
            raise ValueError(f"{self.pending} requests are pending; collect or cancel them before {wanted}.")

    def _objection(self, request):
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

    def _slots_for_waiting(self):
        """The slots, over the shared prefix that is next; None if nothing waits, or they must empty first."""
        first_of = {shared_prefix: queue[0][0] for shared_prefix, queue in self._waiting.items() if queue}
        if not first_of:
            return None
        shared_prefix, slots = min(first_of, key=first_of.__getitem__), self._slots
        if slots is not None and first_of.get(slots.shared_prefix_ids, np.inf) < first_of[shared_prefix] + _PATIENCE:
            return slots
        if slots is not None and any(slots.occupants):
            return None
        self._waiting = {ids: queue for ids, queue in self._waiting.items() if queue}
        if slots is None:
            size = self._size_for(_need(self._waiting[shared_prefix][0][1]))
            caches = {
                SLOTS: self.engine.empty(self.engine.num_slots, size),
                STORE: self.engine.empty(self._stored_rows, self._half),
            }
            self._slots = Slots(shared_prefix, self._shared_prefix(shared_prefix), caches, self.engine.shares)
        else:
            slots.take_over(shared_prefix, self._shared_prefix(shared_prefix))
        return self._slots

    def _shared_prefix(self, ids):
        """A shared prefix, computed once per set of weights."""
        if ids not in self._shared_prefixes:
            self._shared_prefixes[ids] = self.engine.shared_prefix(ids)
            self.stats.prefilled_tokens += len(ids)
            self.stats.padded_tokens += -(-len(ids) // self.engine.piece) * self.engine.piece
        return self._shared_prefixes[ids]

    def _size_for(self, need):
        """Positions that slots are given for requests that need so many: from half of the most there were on.

        Every step of decoding reads all positions of all slots, used or not.
        """
        self._positions = max(self._positions, self.engine.positions(need))
        return max(self._half, self.engine.positions(need))

    @property
    def _half(self):
        # As long are the rows of the store: a group prefix is seldom more than half of what a request takes.
        return self.engine.sizes(self._positions)[0]

    @property
    def _stored_rows(self):
        shares = self.engine.shares
        return -(-self._num_stored // shares) * shares

    def _admit(self, slots):
        """Fills free slots with waiting requests, and draws their first tokens."""
        queue = self._waiting[slots.shared_prefix_ids]
        admitted = [queue.popleft() for _ in range(min(slots.num_free, len(queue)))]
        size = self._size_for(max(_need(request) for _, request in admitted))
        if size > slots.positions:
            slots.lengthen(self.engine.lengthen(slots.caches[SLOTS], size))
        entries = slots.admit(admitted)
        duplicates = {entry.slot: entry.duplicate_of for entry in entries if entry.duplicate_of is not None}
        for stage in range(1 + max(entry.stage for entry in entries)):
            of_stage = [entry for entry in entries if entry.stage == stage]
            self._copy_sources(slots, [entry for entry in of_stage if entry.source])
            self._prefill(slots, [entry for entry in of_stage if entry.duplicate_of is None], duplicates)
            saved = [(entry.slot, entry.saved) for entry in of_stage if entry.saved is not None]
            if saved:
                slots.caches[STORE] = self.engine.copy(slots.caches[STORE], slots.caches[SLOTS], saved)

    def _copy_sources(self, slots, entries):
        # In order: what is copied from may be the next one's target.
        for name, group in itertools.groupby(entries, key=lambda entry: entry.source[0]):
            pairs = [(entry.source[1], entry.slot) for entry in group]
            source = None if name == SLOTS else slots.caches[name]
            slots.caches[SLOTS] = self.engine.copy(slots.caches[SLOTS], source, pairs)

    def _prefill(self, slots, entries, duplicates):
        """Computes what slots lack of their prompts, piece by piece, and draws first tokens as prompts end."""
        while entries:
            # Those that lack most first, so that rows of a call are of like length.
            entries.sort(key=lambda entry: entry.cached - len(entry.suffix))
            hidden, row_of_slot = self._prefill_piece(slots, entries)
            ended = {
                e.slot: row_of_slot[e.slot] for e in entries if e.slot in row_of_slot and e.cached == len(e.suffix)
            }
            ended |= {slot: ended[original] for slot, original in duplicates.items() if original in ended}
            if ended:
                self._draw_first(slots, hidden, ended)
            entries = [entry for entry in entries if entry.cached < len(entry.suffix)]

    def _prefill_piece(self, slots, entries):
        """Computes a piece of as many prompts as go into a call; returns last states, and which slot's are where."""
        shares, per_share = self.engine.shares, self.engine.num_slots // self.engine.shares
        by_share = [[entry for entry in entries if entry.slot // per_share == share] for share in range(shares)]
        rows = self._rows_for(max(map(len, by_share)))
        taken = [(share * rows + i, e) for share, own in enumerate(by_share) for i, e in enumerate(own[:rows])]
        missing = max(len(entry.suffix) - entry.cached for _, entry in taken)
        length = next((n for n in self.engine.length_buckets if n >= missing), self.engine.piece)
        count = shares * rows
        starts = np.zeros(count, np.int32)
        tokens, lengths = np.zeros((count, length), np.int32), np.ones(count, np.int32)
        for row, entry in taken:
            # Whole buckets are written: near the end of the cache, some tokens are computed once more.
            start = min(entry.cached, self._positions - length)
            piece = entry.suffix[start : start + length]
            starts[row], lengths[row] = start, len(piece)
            tokens[row, : len(piece)] = piece
            self.stats.prefilled_tokens += start + len(piece) - entry.cached
            entry.cached = start + len(piece)
        self.stats.padded_tokens += tokens.size
        slot_of_row = {row: entry.slot for row, entry in taken}
        hidden, slots.caches[SLOTS] = self.engine.prefill(
            slots.shared_prefix, slots.caches[SLOTS], self._positions, slot_of_row, tokens, lengths, starts
        )
        return hidden, {slot: row for row, slot in slot_of_row.items()}

    def _rows_for(self, count):
        """How many rows a prefill has: the least bucket that holds them all if they fill half of it, else the next."""
        buckets = self.engine.row_buckets
        larger = next((n for n in buckets if n >= count), buckets[-1])
        return larger if 2 * count > larger else max(n for n in buckets if n <= count)

    def _draw_first(self, slots, hidden, row_of_slot):
        rows = np.zeros(self.engine.num_slots, np.int32)
        rows[list(row_of_slot)] = list(row_of_slot.values())
        allowed = slots.allowed(self.config.vocab_size)
        first = self.engine.draw_first(slots.shared_prefix, hidden, rows, slots.state, allowed)
        for slot in row_of_slot:
            owner = slots.occupants[slot]
            _take(owner, first, slot, [0])
            self.stats.new_tokens += 1
            slots.state.token[slot] = first.token[slot]
            slots.state.remaining[slot] = owner.request.max_new_tokens - 1
            if first.token[slot] in self._end_ids or not slots.state.remaining[slot]:
                self._complete(slots, slot)

    # ---------------------------------------------------------------------------------- decoding

    def _decode(self, slots):
        busy = sum(owner is not None for owner in slots.occupants)
        # While others wait, a few free slots are worth a look of the host.
        leave_at = busy - max(self.engine.num_slots // 8, 1) if self._waiting.get(slots.shared_prefix_ids) else 0
        slots.caches[SLOTS], slots.state, drawn = self.engine.decode(
            slots.shared_prefix,
            slots.caches[SLOTS],
            slots.state,
            max(leave_at, 0),
            slots.allowed(self.config.vocab_size),
        )
        held = drawn.token >= 0
        self.stats.slot_steps += int(held.any(0).sum()) * self.engine.num_slots
        self.stats.slot_tokens += int(held.sum())
        self.stats.new_tokens += int(held.sum())
        for slot, owner in enumerate(slots.occupants):
            if owner is None:
                continue
            _take(owner, drawn, slot, held[slot])
            if slots.state.remaining[slot] == 0:
                self._complete(slots, slot)

    def _complete(self, slots, slot):
        owner = slots.leave(slot)
        ids, log_probs, raw_log_probs = map(tuple, owner.drawn)
        reason = "stop" if ids[-1] in self._end_ids else "length"
        completion = Completion(ids, log_probs, reason, self.policy_version, raw_log_probs)
        self._done.append((owner.request_id, completion))


def _take(owner, drawn, slot, places):
    """Gives a slot's owner what it has drawn."""
    ids, *_ = found = [np.atleast_1d(values[slot])[places].tolist() for values in drawn]
    for so_far, new in zip(owner.drawn, found, strict=True):
        so_far += new
    if owner.matcher is not None:
        for token in ids:
            owner.matcher.advance(token)


def _need(request):
    """Cache positions beyond the shared prefix that a request takes."""
    return len(request.prompt_ids) - len(request.shared_prefix) + request.max_new_tokens
