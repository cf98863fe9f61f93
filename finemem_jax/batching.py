"""From trajectories and advantages to training batches: trees of token rows whose shared prefixes stand once.

The rollouts of one stream at one step form a group: they share instructions, worked examples and chunk, and
differ in memory and response. A batch holds B groups of G rows over one trunk (see `models.decoder.hidden_states`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from finemem_jax.episode import Step, Trajectory


class Batch(NamedTuple):
    """B groups of G rows: R = B G. Lengths P, C and L are padded; A is the longest response allowed.

    Attributes:
        trunk: What all rows begin with.
        branch, branch_length: What the rows of a group continue with.
        leaf, leaf_length: What is a row's own: the prompt's rest, then the response.
        response_start: Index in the leaf of the response's first token; at least 1.
        response: Response tokens again, aligned to start at 0; what is predicted.
        token_mask: 1 = trained on.
        old_log_probs: Under the policy that sampled them, in nats.
        advantages: One value per token.
    """

    trunk: Int[Array, "1 P"]
    trunk_length: Int[Array, " 1"]
    branch: Int[Array, "B C"]
    branch_length: Int[Array, " B"]
    leaf: Int[Array, "R L"]
    leaf_length: Int[Array, " R"]
    response_start: Int[Array, " R"]
    response: Int[Array, "R A"]
    token_mask: Bool[Array, "R A"]
    old_log_probs: Float[Array, "R A"]
    advantages: Float[Array, "R A"]


class Group(NamedTuple):
    """The rows of one stream at one step, and the advantage of each."""

    steps: tuple[Step, ...]
    advantages: tuple[float, ...]


def groups(
    trajectories: Sequence[Sequence[Trajectory]],
    advantages: Float[np.ndarray, "S G T"],
    alive: Bool[np.ndarray, "S T"],
    drop_dead: bool,
) -> list[Group]:
    """Lists the (stream, step) groups to train on.

    Args:
        trajectories: trajectories[s][i] is rollout i of stream s.
        alive: Groups with unequal rewards. The others have no gradient.
        drop_dead: Leave the others out, so that they do not count in the objective's denominator.
    """
    found = []
    for s, rollouts in enumerate(trajectories):
        for t in range(len(rollouts[0].steps)):
            if alive[s, t] or not drop_dead:
                steps = tuple(rollout.steps[t] for rollout in rollouts)
                found.append(Group(steps, tuple(float(a) for a in advantages[s, :, t])))
    return found


def microbatches(
    selected: Sequence[Group], groups_per_batch: int, length_multiple: int, max_response: int, pad_id: int
) -> Iterator[Batch]:
    """Packs groups of like length together. Missing groups at the end are padding with an empty mask.

    Args:
        length_multiple: Branch and leaf lengths are rounded up to multiples of this, so that few shapes compile.
        max_response: A; no response is longer.
        pad_id: Fills the padding; any valid token id.
    """

    def size(group):
        return max(len(step.prompt_ids) + len(step.completion.ids) for step in group.steps)

    ordered = sorted(selected, key=size)
    for start in range(0, len(ordered), groups_per_batch):
        yield _pack(ordered[start : start + groups_per_batch], groups_per_batch, length_multiple, max_response, pad_id)


def _pack(selected, num_groups, multiple, max_response, pad_id):
    def rounded(length):
        return -(-length // multiple) * multiple

    parts = [[_parts(step) for step in group.steps] for group in selected]
    trunk = parts[0][0][0]
    rows_per_group = len(parts[0])
    for group in parts:
        for row in group:
            assert row[0] == trunk and row[1] == group[0][1], "rows of a batch share a trunk, rows of a group a branch"
    rows = num_groups * rows_per_group
    branch_size = rounded(max(len(group[0][1]) for group in parts))
    leaf_size = rounded(max(len(row[2]) + len(row[3]) for group in parts for row in group))
    batch = Batch(
        trunk=np.asarray([trunk], np.int32),
        trunk_length=np.asarray([len(trunk)], np.int32),
        branch=np.full((num_groups, branch_size), pad_id, np.int32),
        branch_length=np.zeros(num_groups, np.int32),
        leaf=np.full((rows, leaf_size), pad_id, np.int32),
        leaf_length=np.ones(rows, np.int32),
        response_start=np.ones(rows, np.int32),
        response=np.full((rows, max_response), pad_id, np.int32),
        token_mask=np.zeros((rows, max_response), bool),
        old_log_probs=np.zeros((rows, max_response), np.float32),
        advantages=np.zeros((rows, max_response), np.float32),
    )
    for b, (group, group_parts) in enumerate(zip(selected, parts, strict=True)):
        branch = group_parts[0][1]
        batch.branch[b, : len(branch)] = branch
        batch.branch_length[b] = len(branch)
        for g, (step, advantage, (_, _, rest, response)) in enumerate(
            zip(group.steps, group.advantages, group_parts, strict=True)
        ):
            r, length = b * rows_per_group + g, len(response)
            batch.leaf[r, : len(rest) + length] = rest + response
            batch.leaf_length[r] = len(rest) + length
            batch.response_start[r] = len(rest)
            batch.response[r, :length] = response
            batch.token_mask[r, :length] = True
            batch.old_log_probs[r, :length] = step.completion.log_probs
            batch.advantages[r, :length] = advantage
    return batch


def _parts(step):
    """Trunk, branch, rest of the prompt, response."""
    trunk, branch = step.prompt_cuts[:2]
    ids = step.prompt_ids
    return ids[:trunk], ids[trunk:branch], ids[branch:], step.completion.ids
