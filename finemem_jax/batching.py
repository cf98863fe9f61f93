"""From trajectories and advantages to training batches: trees of token rows whose shared prefixes stand once.

The rollouts of one stream at one step form a group: they share instructions, worked examples and chunk, and
differ in memory and response. A batch holds B groups of G rows over one trunk (see `models.decoder.hidden_states`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from finemem_jax import grpo
from finemem_jax.episode import Step, Trajectory
from finemem_jax.grpo import Array, Rows


class Batch(NamedTuple):
    """B groups of G rows: R = B G. Lengths P, C and L are padded; A is the longest response allowed.

    Attributes:
        trunk: What all rows begin with.
        branch, branch_length: What the rows of a group continue with.
        leaf, leaf_length: What is a row's own: the prompt's rest, then the response.
        response_start: Index in the leaf of the response's first token; at least 1.
        response: Response tokens again, aligned to start at 0; what is predicted.
        rows: What the objective reads of each response.
    """

    trunk: Int[Array, "1 P"]
    trunk_length: Int[Array, " 1"]
    branch: Int[Array, "B C"]
    branch_length: Int[Array, " B"]
    leaf: Int[Array, "R L"]
    leaf_length: Int[Array, " R"]
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
) -> Iterator[tuple[Batch, list[Group]]]:
    """Packs groups of like length together. Missing groups at the end are padding with an empty mask.

    Args:
        selected: All groups of one optimizer update: the objective averages over these.
        length_multiple: Branch and leaf lengths are rounded up to multiples of this, so that few shapes compile.
        max_response: A; no response is longer.
        pad_id: Fills the padding; any valid token id.
        aggregation: See `grpo.aggregation_weights`.

    Returns:
        Batches, each with its groups in the order of its rows.
    """

    def size(group):
        return max(len(step.prompt_ids) + len(step.completion.ids) for step in group.steps)

    rows = [(group.stream, _trained_tokens(group, i)) for group in selected for i in range(len(group.steps))]
    streams, lengths = np.asarray(rows, int).reshape(-1, 2).T
    weights = np.stack(grpo.aggregation_weights(lengths, streams, aggregation, max_response), 1)
    per_group = np.split(weights, len(selected)) if selected else []
    ordered = sorted(zip(selected, per_group, strict=True), key=lambda pair: size(pair[0]))
    for start in range(0, len(ordered), groups_per_batch):
        some = ordered[start : start + groups_per_batch]
        yield (
            _pack(some, groups_per_batch, length_multiple, max_response, pad_id),
            [group for group, _ in some],
        )


def _trained_tokens(group, row):
    return len(group.steps[row].completion.ids) if group.trained[row] else 0


def _pack(selected, num_groups, multiple, max_response, pad_id):
    def rounded(length):
        return -(-length // multiple) * multiple

    parts = [[_parts(step) for step in group.steps] for group, _ in selected]
    trunk = parts[0][0][0]
    rows_per_group = len(parts[0])
    for group in parts:
        for row in group:
            assert row[0] == trunk and row[1] == group[0][1], "rows of a batch share a trunk, rows of a group a branch"
    rows = num_groups * rows_per_group
    branch_size = rounded(max(len(group[0][1]) for group in parts))
    leaf_size = rounded(max(len(row[2]) + len(row[3]) for group in parts for row in group))

    def if_given(name):
        given = [getattr(group, name) is not None for group, _ in selected]
        return np.zeros((rows, max_response), np.float32) if any(given) else None

    batch = Batch(
        trunk=np.asarray([trunk], np.int32),
        trunk_length=np.asarray([len(trunk)], np.int32),
        branch=np.full((num_groups, branch_size), pad_id, np.int32),
        branch_length=np.zeros(num_groups, np.int32),
        leaf=np.full((rows, leaf_size), pad_id, np.int32),
        leaf_length=np.ones(rows, np.int32),
        response_start=np.ones(rows, np.int32),
        response=np.full((rows, max_response), pad_id, np.int32),
        rows=Rows(
            token_mask=np.zeros((rows, max_response), bool),
            advantages=np.zeros((rows, max_response), np.float32),
            old_log_probs=np.zeros((rows, max_response), np.float32),
            weight=np.zeros(rows, np.float32),
            count=np.zeros(rows, np.float32),
            sampler_log_probs=np.zeros((rows, max_response), np.float32),
            reference_log_probs=if_given("reference_log_probs"),
            unclipped_factor=if_given("unclipped_factors"),
        ),
    )
    for b, ((group, weights), group_parts) in enumerate(zip(selected, parts, strict=True)):
        branch = group_parts[0][1]
        batch.branch[b, : len(branch)] = branch
        batch.branch_length[b] = len(branch)
        for g, (_, _, rest, response) in enumerate(group_parts):
            r, length = b * rows_per_group + g, len(response)
            batch.leaf[r, : len(rest) + length] = rest + response
            batch.leaf_length[r] = len(rest) + length
            batch.response_start[r] = len(rest)
            batch.response[r, :length] = response
            batch.rows.weight[r], batch.rows.count[r] = weights[g]
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


def _parts(step):
    """Trunk, branch, rest of the prompt, response."""
    trunk, branch = step.prompt_cuts[:2]
    ids = step.prompt_ids
    return ids[:trunk], ids[trunk:branch], ids[branch:], step.completion.ids
