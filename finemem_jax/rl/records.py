"""Writes trajectories as plain records: enough to recompute every reward and advantage (`trajectories/*.jsonl.gz`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from finemem_jax.rl.advantages import Advantages
from finemem_jax.rl.credit_rules import RewardInputs, Rewards
from finemem_jax.types import Answer, Chunk, Malformed, Outcome, Step, Trajectory, to_json

# Parts of a step's reward that a record holds, as `credit_rules.Rewards` names them.
_STEP_REWARDS = ("total", "credit", "contribution", "chunk", "likelihood", "format", "compression", "content", "kl")

Decode = Callable[[Sequence[int]], str]


def trajectories(
    groups: Sequence[Sequence[Trajectory]],
    inputs: RewardInputs,
    rewards: Rewards,
    *,
    advantages: Advantages,
    decode: Decode,
) -> Iterator[dict[str, Any]]:
    """Yields every rollout of a training step with its rewards and advantages.

    Args:
        groups: groups[s][i] is rollout i of stream s.
        inputs, rewards, advantages: Of all of them, float64 (see `rewards.compute`).
        decode: Token ids to text.
    """
    for s, rollouts in enumerate(groups):
        for i, rollout in enumerate(rollouts):
            steps = []
            for t, (chunk, step) in enumerate(zip(rollout.stream.chunks, rollout.steps, strict=True)):
                here = s, i, t
                record = {"step": t, "prompt": decode(step.prompt_ids), **_written(chunk, step, decode)}
                for o, operation in enumerate(record["operations"]):
                    operation["credit"] = float(rewards.operation_credit[*here, o])
                    operation["reward"] = float(rewards.operation_total[*here, o])
                    operation["advantage"] = float(advantages.operation[*here, o])
                record |= {
                    "completion_ids": list(step.completion.ids),
                    "log_probs": list(step.completion.log_probs),
                    "raw_log_probs": list(step.completion.raw_log_probs),
                    "finish_reason": step.completion.finish_reason,
                    "policy_version": step.completion.policy_version,
                    "token_operations": list(step.token_operations),
                    "rewards": {name: float(getattr(rewards, name)[here]) for name in _STEP_REWARDS},
                    "advantage": float(advantages.step[here]),
                }
                steps.append(record)
            yield {
                "stream_id": rollout.stream.stream_id,
                "source": rollout.stream.source,
                "competency": rollout.stream.competency,
                "rollout": rollout.rollout,
                "memory_tokens": int(inputs.memory_tokens[s, i]),
                "stream_tokens": int(inputs.stream_tokens[s, i]),
                "outcome": float(rewards.outcome[s, i]),
                "answers": [answer_record(answer) for answer in rollout.answers],
                "probes": to_json(rollout.probes),
                "steps": steps,
            }


def evaluated(rollout: Trajectory, decode: Decode) -> dict[str, Any]:
    """Returns one rollout of an evaluation: what was read, written, remembered and answered."""
    return {
        "stream_id": rollout.stream.stream_id,
        "competency": rollout.stream.competency,
        "answers": [answer_record(answer) for answer in rollout.answers],
        "steps": [
            _written(chunk, step, decode) for chunk, step in zip(rollout.stream.chunks, rollout.steps, strict=True)
        ],
    }


def _written(chunk: Chunk, step: Step, decode: Decode) -> dict[str, Any]:
    operations = [_operation(outcome) for outcome in step.outcomes]
    if step.verdicts:
        for operation, verdict in zip(operations, step.verdicts, strict=True):
            operation["verdict"] = verdict
    return {
        "chunk": chunk.text,
        "completion": decode(step.completion.ids),
        "operations": operations,
        "memory": to_json(step.memory.items),
        "answers": [answer_record(answer) for answer in step.answers],
    }


def _operation(outcome: Outcome) -> dict[str, Any]:
    record: dict[str, Any] = {"status": outcome.status.value, "item_id": outcome.item_id}
    if isinstance(outcome.operation, Malformed):
        return record | {"text": outcome.operation.text, "reason": outcome.operation.reason}
    written = outcome.operation
    return record | {
        "action": written.action.value,
        "content": written.content,
        "written_id": written.item_id,
        "memory_type": written.memory_type,
        "previous": to_json(outcome.previous),
    }


def answer_record(answer: Answer) -> dict[str, Any]:
    """Returns an answer with its question, evidence and score."""
    return {
        "question": answer.question.prompt,
        "kind": answer.question.kind,
        "gold": list(answer.question.answers),
        "metric": answer.question.metric,
        "gold_steps": list(answer.question.gold_steps),
        "evidence": to_json(answer.evidence),
        "cited": list(answer.cited),
        "answer": answer.text,
        "score": answer.score,
        "likelihood": to_json(answer.likelihood),
    }
