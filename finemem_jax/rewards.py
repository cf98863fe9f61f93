"""From trajectories to reward arrays: one of the two places where text becomes numbers (the other is `batching`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from finemem_jax import credit, grpo
from finemem_jax.credit import RewardInputs, Rewards, Weights
from finemem_jax.episode import Trajectory


def collect(groups: Sequence[Sequence[Trajectory]], count_tokens: Callable[[str], int]) -> RewardInputs:
    """Measures the rollouts of each stream, padded to the longest.

    Args:
        groups: groups[s][i] is rollout i of stream s.
        count_tokens: Length of a text in tokens; r_comp's unit.
    """
    rollouts = [trajectory for group in groups for trajectory in group]
    shape = (len(groups), len(groups[0]))
    steps = max(len(r.steps) for r in rollouts)
    per_chunk = max((len(step.answers) for r in rollouts for step in r.steps), default=0)
    questions = max(len(r.answers) for r in rollouts)
    evidence = max((len(a.evidence) for r in rollouts for a in r.answers), default=0)
    # At least one slot everywhere, since reductions over empty axes are special cases for nobody's benefit.
    per_chunk, questions, evidence = max(per_chunk, 1), max(questions, 1), max(evidence, 1)
    inputs = RewardInputs(
        step_mask=np.zeros((*shape, steps), bool),
        chunk_scores=np.zeros((*shape, steps, per_chunk)),
        chunk_mask=np.zeros((*shape, steps, per_chunk), bool),
        scores=np.zeros((*shape, questions)),
        question_mask=np.zeros((*shape, questions), bool),
        source_step=np.zeros((*shape, questions, evidence), np.int32),
        is_evidence=np.zeros((*shape, questions, evidence), bool),
        valid_operations=np.zeros((*shape, steps), np.int32),
        written_operations=np.zeros((*shape, steps), np.int32),
        memory_tokens=np.zeros(shape, np.int32),
        stream_tokens=np.ones(shape, np.int32),
    )
    for s, group in enumerate(groups):
        stream_tokens = max(sum(count_tokens(chunk.text) for chunk in group[0].stream.chunks), 1)
        for g, rollout in enumerate(group):
            at = (s, g)
            inputs.step_mask[at][: len(rollout.steps)] = True
            inputs.memory_tokens[at] = sum(count_tokens(item.text) for item in rollout.steps[-1].memory.items)
            inputs.stream_tokens[at] = stream_tokens
            for t, step in enumerate(rollout.steps):
                inputs.valid_operations[*at, t] = sum(outcome.valid for outcome in step.outcomes)
                inputs.written_operations[*at, t] = len(step.outcomes)
                for j, answer in enumerate(step.answers):
                    inputs.chunk_scores[*at, t, j], inputs.chunk_mask[*at, t, j] = answer.score, True
            for j, answer in enumerate(rollout.answers):
                inputs.scores[*at, j], inputs.question_mask[*at, j] = answer.score, True
                for k, item in enumerate(answer.evidence):
                    inputs.source_step[*at, j, k], inputs.is_evidence[*at, j, k] = item.source_step, True
    return inputs


def judge(inputs: RewardInputs, weights: Weights, epsilon: float) -> tuple[Rewards, grpo.Group]:
    """Rewards and advantages of every rollout, [S, G, T], as float64 NumPy arrays.

    float64, because an advantage divides a difference of rewards by their spread: in float32 the rounding of
    rewards near 2 is a visible part of a spread of 0.001.
    """
    # On the host: these are a few thousand numbers, and not every accelerator has float64.
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        rewards = credit.step_rewards(inputs, Weights(*(np.float64(w) for w in weights)))
        group = grpo.group_advantage(rewards.total, inputs.step_mask[:, 0], np.float64(epsilon))
        return jax.tree.map(np.asarray, (rewards, group))
