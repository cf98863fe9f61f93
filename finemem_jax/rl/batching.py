"""From trajectories and advantages to training batches: trees of token rows whose shared prefixes stand once.

The rollouts of one stream at one step form a group. What its prompts have in common (instructions, worked examples, the
chunk; at the first step all of it) is found by comparing token ids, so nothing here depends on how prompts are built.
A batch holds B groups of G rows over one shared prefix (see `models.decoder.hidden_states`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
    alive: Bool[Array, "S T"],
    *,
    drop_dead: bool,
    drop_truncated: bool = False,
    unclipped_factors: Float[np.ndarray, "S G T A"] | None = None,
) -> list[Group]:
    """Lists the (stream, step) groups to train on.

    Args:
        trajectories: trajectories[s][i] is rollout i of stream s.
        advantages: Of each response token.
        alive: Groups with unequal rewards. The others have no gradient.
        drop_dead: Leave the others out, so that they do not count in the objective's denominator.
        drop_truncated: Do not train on responses that were cut off at their longest (overlong filtering). They still
            were compared with: their rewards are part of their group's mean.
    """

    def tokens_of(values, s, t, steps):
        return tuple(values[s, i, t, : len(step.completion.ids)] for i, step in enumerate(steps))

    found = []
    for s, rollouts in enumerate(trajectories):
        for t in range(len(rollouts[0].steps)):
            if drop_dead and not alive[s, t]:
                continue
            steps = tuple(rollout.steps[t] for rollout in rollouts)
            found.append(
                Group(
                    stream=s,
                    step=t,
                    steps=steps,
                    advantages=tokens_of(advantages, s, t, steps),
                    trained=tuple(not (drop_truncated and step.completion.finish_reason == "length") for step in steps),
                    unclipped_factors=(
                        None if unclipped_factors is None else tokens_of(unclipped_factors, s, t, steps)
                    ),
                )
            )
    return found


def microbatches(
    selected: Sequence[Group],
    groups_per_batch: int,
    length_multiple: int,
    max_response: int,
    pad_id: int,
    aggregation: str = "row",
    shares: int = 1,
    max_shared_prefix: int | None = None,
) -> Iterator[tuple[Batch, list[Group]]]:
    """Packs groups of like length together. Missing groups at the end are padding with an empty mask.

    Args:
        selected: All groups of one optimizer update: the objective averages over these.
        groups_per_batch: B; a multiple of `shares`.
        length_multiple: Unit of lengths (`buckets.rounded`); the shared prefix's is rounded down to a multiple of it.
        max_response: A; no response is longer.
        pad_id: Fills the padding; any valid token id.
        aggregation: See `grpo.aggregation_weights`.
        shares: T, in how many parts devices share out a batch's groups.
        max_shared_prefix: Its longest length: all that every group begins with, and not what a few happen to.

    Returns:
        Batches, each with its groups in the order of its rows.
    """
    assert groups_per_batch % shares == 0, "devices hold whole groups"

    def size(group):
        return max(len(step.prompt_ids) + len(step.completion.ids) for step in group.steps)

    rows = [(group.stream, _trained_tokens(group, i)) for group in selected for i in range(len(group.steps))]
    streams, lengths = np.asarray(rows, int).reshape(-1, 2).T
    weights = np.stack(grpo.aggregation_weights(lengths, streams, aggregation, max_response), 1)
    per_group = np.split(weights, len(selected)) if selected else []
    ordered = sorted(zip(selected, per_group, strict=True), key=lambda pair: size(pair[0]))
    common = _common_prefix([_shared_prompt(group) for group in selected])
    # Cut to a multiple, a shared prefix has no padding, and its length seldom changes from update to update.
    shared_prefix = common[
        : shared_prefix_length(
            len(common) if max_shared_prefix is None else min(len(common), max_shared_prefix), length_multiple
        )
    ]
    for start in range(0, len(ordered), groups_per_batch):
        some = ordered[start : start + groups_per_batch]
        yield (
            _pack(some, [shared_prefix] * shares, groups_per_batch, length_multiple, max_response, pad_id),
            [group for group, _ in some],
        )


def shared_prefix_length(tokens: int, length_multiple: int) -> int:
    """How long the shared prefix of groups is that have so many tokens in common."""
    return tokens // length_multiple * length_multiple


def blank(
    shared_prefixes: Sequence[Sequence[int]],
    num_groups: int,
    group_size: int,
    sizes: tuple[int, int],
    max_response: int,
    pad_id: int,
    with_reference: bool,
    with_factors: bool,
) -> Batch:
    """A batch of padding.

    Args:
        sizes: C and L.
    """
    rows, (group_prefix_size, suffix_size) = num_groups * group_size, sizes

    def floats():
        return np.zeros((rows, max_response), np.float32)

    return Batch(
        shared_prefix=np.asarray(shared_prefixes, np.int32).reshape(len(shared_prefixes), len(shared_prefixes[0])),
        shared_prefix_length=np.full(len(shared_prefixes), len(shared_prefixes[0]), np.int32),
        group_prefix=np.full((num_groups, group_prefix_size), pad_id, np.int32),
        group_prefix_length=np.zeros(num_groups, np.int32),
        suffix=np.full((rows, suffix_size), pad_id, np.int32),
        suffix_length=np.ones(rows, np.int32),
        response_start=np.ones(rows, np.int32),
        response=np.full((rows, max_response), pad_id, np.int32),
        rows=Rows(
            token_mask=np.zeros((rows, max_response), bool),
            advantages=floats(),
            old_log_probs=floats(),
            weight=np.zeros(rows, np.float32),
            share=np.zeros(rows, np.float32),
            sampler_log_probs=floats(),
            reference_log_probs=floats() if with_reference else None,
            unclipped_factor=floats() if with_factors else None,
        ),
    )


def all_sizes(prompt: int, suffix: int, max_response: int, length_multiple: int) -> list[tuple[int, int]]:
    """C and L of all batches that there can be.

    Args:
        prompt: The longest prompt beyond the shared prefix, in tokens.
        suffix: As much of it as the rows of a group may not share.
        max_response: A.
    """
    group_prefixes = compilation.buckets_up_to(prompt, length_multiple)
    suffixes = compilation.buckets_up_to(suffix + max_response, length_multiple)
    # A size is only needed for lengths above the size before; both together are a row.
    return [
        (group_prefix, own)
        for shorter_group_prefix, group_prefix in itertools.pairwise((0, *group_prefixes))
        for shorter_own, own in itertools.pairwise((0, *suffixes))
        if shorter_group_prefix + 1 + shorter_own + 1 <= prompt + max_response
    ]


def _shared_prompt(group):
    """What the prompts of a group's rows begin with, but for the last token: a row's own state must predict."""
    return _common_prefix([step.prompt_ids[:-1] for step in group.steps])


def _common_prefix(rows):
    if not rows:
        return ()
    # In dictionary order, what the first and the last have in common all between them have too.
    first, last = min(rows), max(rows)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


def _trained_tokens(group, row):
    return len(group.steps[row].completion.ids) if group.trained[row] else 0


def _pack(selected, shared_prefixes, num_groups, multiple, max_response, pad_id):
    shared_prefix_size = len(shared_prefixes[0])
    parts = [_parts(group, shared_prefix_size) for group, _ in selected]
    rows_per_group = len(parts[0][1])
    longest = max(len(group_prefix) for group_prefix, _ in parts)
    # Rows with nothing in common have no group prefix.
    group_prefix_size = compilation.bucket(longest, multiple) if longest else 0
    suffix_size = compilation.bucket(
        max(len(rest) + len(response) for _, suffixes in parts for rest, response in suffixes), multiple
    )

    def is_given(name):
        return any(getattr(group, name) is not None for group, _ in selected)

    batch = blank(
        shared_prefixes, num_groups, rows_per_group, (group_prefix_size, suffix_size), max_response, pad_id,
        is_given("reference_log_probs"), is_given("unclipped_factors"),
    )  # fmt: skip
    for b, ((group, weights), (group_prefix, suffixes)) in enumerate(zip(selected, parts, strict=True)):
        batch.group_prefix[b, : len(group_prefix)] = group_prefix
        batch.group_prefix_length[b] = len(group_prefix)
        for g, (rest, response) in enumerate(suffixes):
            r, length = b * rows_per_group + g, len(response)
            batch.suffix[r, : len(rest) + length] = rest + response
            batch.suffix_length[r] = len(rest) + length
            batch.response_start[r] = len(rest)
            batch.response[r, :length] = response
            batch.rows.weight[r], batch.rows.share[r] = weights[g]
            _fill_row(batch.rows, r, group, g, length)
    return batch


def _fill_row(rows, r, group, g, length):
    sampled = group.steps[g].completion.log_probs
    rows.token_mask[r, :length] = group.trained[g]
    rows.advantages[r, :length] = group.advantages[g]
    rows.sampler_log_probs[r, :length] = sampled
    rows.old_log_probs[r, :length] = sampled if group.old_log_probs is None else group.old_log_probs[g]
    if group.reference_log_probs is not None:
        rows.reference_log_probs[r, :length] = group.reference_log_probs[g]
    if group.unclipped_factors is not None:
        rows.unclipped_factor[r, :length] = group.unclipped_factors[g]


def _parts(group, shared_prefix_size):
    """What a group's rows share beyond the shared prefix, and of each row the rest of its prompt and its response."""
    shared = _shared_prompt(group)
    suffixes = [(step.prompt_ids[len(shared) :], step.completion.ids) for step in group.steps]
    return shared[shared_prefix_size:], suffixes
