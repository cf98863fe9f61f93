"""Trajectories as plain records for `trajectories/*.jsonl.gz`: enough to recompute every reward and advantage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from finemem_jax.credit import RewardInputs, Rewards
from finemem_jax.episode import Answer, Malformed, Outcome, Step, Trajectory, to_json
from finemem_jax.grpo import Group

Decode = Callable[[Sequence[int]], str]


def trajectory(
    rollout: Trajectory, at: tuple[int, int], inputs: RewardInputs, rewards: Rewards, group: Group, decode: Decode
) -> dict[str, Any]:
    """One rollout with its rewards and advantages.

    Args:
        at: Its index (stream, rollout) in the arrays.
        inputs, rewards, group: Of the whole batch, float64 (see `rewards.judge`).
        decode: Token ids to text.
    """
    steps = []
    for t, step in enumerate(rollout.steps):
        here = (*at, t)
        steps.append(
            {
                "step": t,
                "prompt": decode(step.prompt_ids),
                "completion": decode(step.completion.ids),
                "completion_ids": list(step.completion.ids),
                "log_probs": list(step.completion.log_probs),
                "finish_reason": step.completion.finish_reason,
                "policy_version": step.completion.policy_version,
                "operations": [_operation(outcome) for outcome in step.outcomes],
                "memory": to_json(step.memory.items),
                "answers": [_answer(answer) for answer in step.answers],
                "rewards": {
                    "total": float(rewards.total[here]),
                    "evidence": float(rewards.evidence[here]),
                    "contribution": float(rewards.contribution[here]),
                    "chunk": float(rewards.chunk[here]),
                    "format": float(rewards.format[here]),
                    "compression": float(rewards.compression[here]),
                },
                "advantage": float(group.advantages[here]),
            }
        )
    return {
        "stream_id": rollout.stream.stream_id,
        "source": rollout.stream.source,
        "competency": rollout.stream.competency,
        "rollout": rollout.rollout,
        "memory_tokens": int(inputs.memory_tokens[at]),
        "stream_tokens": int(inputs.stream_tokens[at]),
        "outcome": float(np.asarray(rewards.outcome)[at]),
        "answers": [_answer(answer) for answer in rollout.answers],
        "steps": steps,
    }


def evaluated(rollout: Trajectory, decode: Decode) -> dict[str, Any]:
    """One rollout of an evaluation: what was written, remembered and answered."""
    return {
        "stream_id": rollout.stream.stream_id,
        "competency": rollout.stream.competency,
        "answers": [_answer(answer) for answer in rollout.answers],
        "steps": [_written(step, decode) for step in rollout.steps],
    }


def _written(step: Step, decode: Decode) -> dict[str, Any]:
    return {
        "completion": decode(step.completion.ids),
        "operations": [_operation(outcome) for outcome in step.outcomes],
        "memory": to_json(step.memory.items),
        "answers": [_answer(answer) for answer in step.answers],
    }


def _operation(outcome: Outcome) -> dict[str, Any]:
    record: dict[str, Any] = {"status": outcome.status.value, "item_id": outcome.item_id}
    if isinstance(outcome.operation, Malformed):
        return record | {"text": outcome.operation.text, "reason": outcome.operation.reason}
    written = outcome.operation
    return record | {"action": written.action.value, "content": written.content, "written_id": written.item_id}


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "question": answer.question.text,
        "kind": answer.question.kind,
        "gold": list(answer.question.answers),
        "metric": answer.question.metric,
        "evidence": to_json(answer.evidence),
        "answer": answer.text,
        "score": answer.score,
    }
