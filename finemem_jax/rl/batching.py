"""Packs trajectories and their advantages into training batches: trees of token rows whose shared prefixes stand once.

The rollouts of one stream at one step form a group. What its prompts have in common (instructions, worked examples, the
chunk; at the first step all of it) is found by comparing token ids, so nothing here depends on how prompts are built.
A batch holds B groups of G rows over one shared prefix (see `models.decoder.hidden_states`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from finemem_jax.rl import grpo
from finemem_jax.rl.grpo import Array, Rows
from finemem_jax.runtime import compilation
from finemem_jax.types import Step, Trajectory


class Batch(NamedTuple):
    """B groups of G rows: R = B G. Lengths C and L are padded, P never; A is the longest response allowed.

    Attributes:
        shared_prefix: What all rows of all batches of an update begin with, once for each of T data shards, which hold
            B / T groups each. P is 0 where the rows have too little in common.
        group_prefix, group_prefix_length: What the rows of a group continue with; C may be 0.
        suffix, suffix_length: What is a row's own: the prompt's rest, at least its last token, then the response.
        response_start: Index in the suffix of the response's first token; at least 1.
        response: Response tokens again, aligned to start at 0; what is predicted.
        rows: What the objective reads of each response.
    """

    shared_prefix: Int[Array, "T P"]
    shared_prefix_length: Int[Array, " T"]
    group_prefix: Int[Array, "B C"]
    group_prefix_length: Int[Array, " B"]
    suffix: Int[Array, "R L"]
    suffix_length: Int[Array, " R"]
    response_start: Int[Array, " R"]
    response: Int[Array, "R A"]
    rows: Rows


@dataclasses.dataclass(frozen=True)
class Packing:
    """How groups are packed into batches.

    Attributes:
        num_groups: B; a multiple of `data_shards`.
        length_multiple: Unit of lengths (`compilation.bucket`); the shared prefix's is rounded down to a multiple.
        max_response: A; no response is longer.
        pad_id: Fills the padding; any valid token id.
        aggregation: See `grpo.aggregation_weights`.
        data_shards: T, in how many parts devices share out a batch's groups.
        max_shared_prefix: The longest shared prefix: all that every group begins with, and not what a few happen to;
            None for no limit.
    """

    num_groups: int
    length_multiple: int
    max_response: int
    pad_id: int = 0
    aggregation: str = "row"
    data_shards: int = 1
    max_shared_prefix: int | None = None

    def shared_prefix_length(self, tokens: int) -> int:
        """Returns how long the shared prefix of groups is that have so many tokens in common."""
        most = tokens if self.max_shared_prefix is None else min(tokens, self.max_shared_prefix)
        # Cut to a multiple, a shared prefix has no padding, and its length seldom changes from update to update.
        return most // self.length_multiple * self.length_multiple


class BatchSizes(NamedTuple):
    """The sizes in which the batches of one `Packing` differ: G, C and L."""

    group_size: int
    group_prefix: int
    suffix: int


class Group(NamedTuple):
    """The rows of one stream at one step, and what each is trained with.

    Attributes:
        stream, step: Its place among the trajectories.
        steps: One of each rollout.
        advantages: One value per response token of each row.
        trained: Whether a row is trained on at all.
        unclipped_factors: Per token, as `grpo.Rows` has them; None for 1.
        old_log_probs: Per token, as the trainer computes them; None = the sampler's.
        reference_log_probs: Per token, of the starting weights; None where not needed.
    """

    stream: int
    step: int
    steps: tuple[Step, ...]
    advantages: tuple[np.ndarray, ...]
    trained: tuple[bool, ...]
    unclipped_factors: tuple[np.ndarray, ...] | None = None
    old_log_probs: tuple[np.ndarray, ...] | None = None
    reference_log_probs: tuple[np.ndarray, ...] | None = None


def groups(
    trajectories: Sequence[Sequence[Trajectory]],
    advantages: Float[np.ndarray, "S G T A"],
    trained: Bool[Array, "S T"],
    *,
    drop_truncated: bool = False,
    unclipped_factors: Float[np.ndarray, "S G T A"] | None = None,
) -> list[Group]:
    """Lists the (stream, step) groups to train on.

    Args:
        trajectories: trajectories[s][i] is rollout i of stream s.
        advantages: Of each response token.
        trained: Which groups to list. Those with equal rewards have no gradient; left out, they do not count in the
            objective's denominator either.
        drop_truncated: Do not train on responses that were cut off at their longest (overlong filtering). They still
            were compared with: their rewards are part of their group's mean.
    """

    def tokens_of(values: np.ndarray, s: int, t: int) -> tuple[np.ndarray, ...]:
        return tuple(values[s, i, t, : len(r.steps[t].completion.ids)] for i, r in enumerate(trajectories[s]))

    found = []
    for s, rollouts in enumerate(trajectories):
        for t in range(len(rollouts[0].steps)):
            if not trained[s, t]:
                continue
            steps = tuple(rollout.steps[t] for rollout in rollouts)
            found.append(
                Group(
                    stream=s,
                    step=t,
                    steps=steps,
                    advantages=tokens_of(advantages, s, t),
                    trained=tuple(not (drop_truncated and step.completion.finish_reason == "length") for step in steps),
                    unclipped_factors=None if unclipped_factors is None else tokens_of(unclipped_factors, s, t),
                )
            )
    return found


def microbatches(selected: Sequence[Group], packing: Packing) -> Iterator[tuple[Batch, list[Group]]]:
    """Packs groups of like length together. Missing groups at the end are padding with an empty mask.

    Args:
        selected: All groups of one optimizer update: the objective averages over these.

    Returns:
        Batches, each with its groups in the order of its rows.
    """
    assert packing.num_groups % packing.data_shards == 0, "devices hold whole groups"

    def size(pair: tuple[Group, np.ndarray]) -> int:
        return max(len(step.prompt_ids) + len(step.completion.ids) for step in pair[0].steps)

    rows = [(group.stream, _trained_tokens(group, i)) for group in selected for i in range(len(group.steps))]
    streams, lengths = np.asarray(rows, int).reshape(-1, 2).T
    weights = grpo.aggregation_weights(lengths, streams, packing.aggregation, constant=packing.max_response)
    per_group = np.split(np.stack(weights, 1), len(selected)) if selected else []
    ordered = sorted(zip(selected, per_group, strict=True), key=size)
    common = _common_prefix([_shared_prompt(group) for group in selected])
    shared_prefix = common[: packing.shared_prefix_length(len(common))]
    for start in range(0, len(ordered), packing.num_groups):
        some = ordered[start : start + packing.num_groups]
        yield _pack(some, shared_prefix, packing), [group for group, _ in some]


def blank(
    packing: Packing, shared_prefix: Sequence[int], sizes: BatchSizes, *, with_reference: bool, with_factors: bool
) -> Batch:
    """Returns a batch of padding.

    Args:
        with_reference, with_factors: Whether there are reference log-probabilities, and factors of the unclipped term.
    """
    rows, shards = packing.num_groups * sizes.group_size, packing.data_shards

    def per_token(dtype: type = np.float32) -> np.ndarray:
        return np.zeros((rows, packing.max_response), dtype)

    def ids(*shape: int) -> np.ndarray:
        return np.full(shape, packing.pad_id, np.int32)

    return Batch(
        shared_prefix=np.asarray([shared_prefix] * shards, np.int32).reshape(shards, len(shared_prefix)),
        shared_prefix_length=np.full(shards, len(shared_prefix), np.int32),
        group_prefix=ids(packing.num_groups, sizes.group_prefix),
        group_prefix_length=np.zeros(packing.num_groups, np.int32),
        suffix=ids(rows, sizes.suffix),
        suffix_length=np.ones(rows, np.int32),
        response_start=np.ones(rows, np.int32),
        response=ids(rows, packing.max_response),
        rows=Rows(
            token_mask=per_token(bool),
            advantages=per_token(),
            old_log_probs=per_token(),
            weight=np.zeros(rows, np.float32),
            share=np.zeros(rows, np.float32),
            sampler_log_probs=per_token(),
            reference_log_probs=per_token() if with_reference else None,
            unclipped_factor=per_token() if with_factors else None,
        ),
    )


def all_sizes(packing: Packing, group_size: int, *, prompt: int, suffix: int) -> list[BatchSizes]:
    """Lists the sizes of all batches that there can be.

    Args:
        prompt: The longest prompt beyond the shared prefix, in tokens.
        suffix: As much of it as the rows of a group may not share.
    """
    group_prefixes = compilation.buckets_up_to(prompt, packing.length_multiple)
    suffixes = compilation.buckets_up_to(suffix + packing.max_response, packing.length_multiple)
    # A size is only needed for lengths above the size before; both together are a row.
    return [
        BatchSizes(group_size, group_prefix, own)
        for shorter_group_prefix, group_prefix in itertools.pairwise((0, *group_prefixes))
        for shorter_own, own in itertools.pairwise((0, *suffixes))
        if shorter_group_prefix + 1 + shorter_own + 1 <= prompt + packing.max_response
    ]


def _shared_prompt(group: Group) -> tuple[int, ...]:
    """Returns what the prompts of a group's rows begin with, but for the last token: a row's own state must predict."""
    return _common_prefix([step.prompt_ids[:-1] for step in group.steps])


def _common_prefix(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    if not rows:
        return ()
    # In dictionary order, what the first and the last have in common all between them have too.
    first, last = min(rows), max(rows)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


def _trained_tokens(group: Group, row: int) -> int:
    return len(group.steps[row].completion.ids) if group.trained[row] else 0


def _pack(selected: Sequence[tuple[Group, np.ndarray]], shared_prefix: Sequence[int], packing: Packing) -> Batch:
    """Lays out some groups, each with the weight and share of its rows, as one batch."""
    prompts = [_shared_prompt(group) for group, _ in selected]
    longest_prefix = max(map(len, prompts)) - len(shared_prefix)
    longest_suffix = max(
        len(step.prompt_ids) - len(prompt) + len(step.completion.ids)
        for (group, _), prompt in zip(selected, prompts, strict=True)
        for step in group.steps
    )
    batch = blank(
        packing,
        shared_prefix,
        BatchSizes(
            group_size=len(selected[0][0].steps),
            # Rows with nothing in common have no group prefix.
            group_prefix=compilation.bucket(longest_prefix, packing.length_multiple) if longest_prefix else 0,
            suffix=compilation.bucket(longest_suffix, packing.length_multiple),
        ),
        with_reference=any(group.reference_log_probs is not None for group, _ in selected),
        with_factors=any(group.unclipped_factors is not None for group, _ in selected),
    )
    for b, ((group, weights), prompt) in enumerate(zip(selected, prompts, strict=True)):
        group_prefix = prompt[len(shared_prefix) :]
        batch.group_prefix[b, : len(group_prefix)] = group_prefix
        batch.group_prefix_length[b] = len(group_prefix)
        for g, step in enumerate(group.steps):
            r, rest, response = b * len(group.steps) + g, step.prompt_ids[len(prompt) :], step.completion.ids
            batch.suffix[r, : len(rest) + len(response)] = rest + response
            batch.suffix_length[r] = len(rest) + len(response)
            batch.response_start[r] = len(rest)
            batch.response[r, : len(response)] = response
            batch.rows.weight[r], batch.rows.share[r] = weights[g]
            _fill_row(batch.rows, r, group, row=g)
    return batch


def _fill_row(rows: Any, r: int, group: Group, *, row: int) -> None:
    """Fills in what row r of a batch is trained with: that row of the group."""
    sampled, length = group.steps[row].completion.log_probs, len(group.steps[row].completion.ids)
    rows.token_mask[r, :length] = group.trained[row]
    rows.advantages[r, :length] = group.advantages[row]
    rows.sampler_log_probs[r, :length] = sampled
    rows.old_log_probs[r, :length] = sampled if group.old_log_probs is None else group.old_log_probs[row]
    if group.reference_log_probs is not None:
        rows.reference_log_probs[r, :length] = group.reference_log_probs[row]
    if group.unclipped_factors is not None:
        rows.unclipped_factor[r, :length] = group.unclipped_factors[row]
