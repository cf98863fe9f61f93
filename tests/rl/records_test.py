"""Tests of finemem_jax/rl/records.py: plain JSON that says what happened and holds what rewards are made of."""

import json

import numpy as np
import pytest

from finemem_jax.rl import records, rewards
from finemem_jax.rl.credit_rules import CreditConfig
from finemem_jax.rl.grpo import Normalizer
from finemem_jax.types import (
    Action,
    Answer,
    Chunk,
    Completion,
    Game,
    Malformed,
    Memory,
    Operation,
    Outcome,
    Probes,
    Question,
    Status,
    Step,
    Stream,
    Trajectory,
)
from small_trajectories import TOKENS, deleted, inserted, item, trajectory, updated

OSLO = item(text="Ana lives in Oslo.")
AS_JSON = {"item_id": 1, "text": "Ana lives in Oslo.", "source_step": 0, "source_operation": 0, "memory_type": ""}
QUESTION = Question("Where does Ana live?", ("Oslo", "Oslo, Norway"), "substring", (0,), "plain")
OUTCOMES = (
    inserted("Ana lives in Oslo."),
    Outcome(Operation(Action.DELETE, item_id=7), Status.UNKNOWN_ID),
    Outcome(Malformed("memory_insert(<b>)", "not JSON"), Status.MALFORMED),
)


def step(outcomes, memory, answers=(), **fields):
    prompt, text = TOKENS.encode("New text"), TOKENS.encode("Ærø")
    completion = Completion((*text, *TOKENS.end_ids), (-0.5,) * 6, "stop", 3)
    return Step(tuple(prompt), (1, 4, 8), completion, tuple(outcomes), Memory(memory, 2), answers=answers, **fields)


STREAM = Stream("s-1", "made up", (Chunk("Ana moved to Oslo.", (QUESTION,)), Chunk("Rain.")), (QUESTION,), "AR")
RIGHT = Answer(QUESTION, (OSLO,), "Oslo", 1.0, (True,))
WRONG = Answer(QUESTION, (), "unknown", 0.0)
PROBES = Probes(empty=(0.25,), games=(Game(((0, 0),), (0.0, 1.0)),))
WROTE = step(OUTCOMES, (OSLO,), (RIGHT,), token_operations=(0, 0, 1, 2, 2, -1))
GROUP = [
    Trajectory(STREAM, 0, (WROTE, step((), (OSLO,))), (RIGHT,), PROBES),
    Trajectory(STREAM, 1, (step((), (), (WRONG,)), step((), ())), (WRONG,)),
]


def computed(group, **choices):
    inputs = rewards.to_arrays([group], lambda text: len(TOKENS.encode(text)))
    return inputs, *rewards.compute(inputs, CreditConfig(**choices), Normalizer())


def recorded(group, **choices):
    inputs, rewards, advantages = computed(group, **choices)
    return list(records.trajectories([group], inputs, rewards, advantages=advantages, decode=TOKENS.decode))


@pytest.fixture(scope="module")
def both():
    """Records of both rollouts, under the paper's rule and weights."""
    return recorded(GROUP, per_operation=True)


def test_a_record_is_plain_json(both):
    assert json.loads(json.dumps(both, allow_nan=False)) == both


def test_a_record_says_what_happened(both):
    one = both[0]
    assert {name: one[name] for name in ("stream_id", "source", "competency", "rollout")} == {
        "stream_id": "s-1", "source": "made up", "competency": "AR", "rollout": 0,
    }  # fmt: skip
    assert (one["memory_tokens"], one["stream_tokens"], one["outcome"]) == (18, 23, 1.0)
    first, second = one["steps"]
    assert (first["step"], second["step"]) == (0, 1)
    assert (first["chunk"], second["chunk"]) == ("Ana moved to Oslo.", "Rain.")
    assert first["prompt"] == "New text"
    assert first["completion"] == "Ærø<|end|>"
    assert first["completion_ids"] == [*TOKENS.encode("Ærø"), *TOKENS.end_ids]
    assert first["log_probs"] == [-0.5] * 6
    assert (first["finish_reason"], first["policy_version"]) == ("stop", 3)
    assert first["token_operations"] == [0, 0, 1, 2, 2, -1]
    assert first["memory"] == [AS_JSON]
    assert second["answers"] == []
    assert first["answers"] == one["answers"] == [
        {
            "question": "Where does Ana live?",
            "kind": "plain",
            "gold": ["Oslo", "Oslo, Norway"],
            "metric": "substring",
            "gold_steps": [0],
            "evidence": [AS_JSON],
            "cited": [True],
            "answer": "Oslo",
            "score": 1.0,
            "likelihood": None,
        }
    ]  # fmt: skip
    assert one["probes"] == {
        "full": [],
        "empty": [0.25],
        "states": [],
        "without": [],
        "games": [{"players": [[0, 0]], "scores": [0.0, 1.0]}],
    }


def test_operations_by_hand(both):
    # Q=1, all of its evidence from operation 0: N_0 = 1. Half of r_global = 1 goes evenly, 1/4 to each step.
    # Operation 0 has 1/2 + 1/12 of the credit, the others 1/12, a third of the step's own 1/4.
    inserted_, unknown, malformed = both[0]["steps"][0]["operations"]
    assert [o["credit"] for o in (inserted_, unknown, malformed)] == pytest.approx([7 / 12, 1 / 12, 1 / 12])
    assert sum(o["credit"] for o in (inserted_, unknown, malformed)) == pytest.approx(3 / 4)
    assert both[0]["steps"][0]["rewards"]["credit"] == pytest.approx(3 / 4)
    # The only one that was valid, and whose item was evidence, is above the others.
    assert inserted_["advantage"] > unknown["advantage"] == malformed["advantage"]
    assert inserted_["reward"] > unknown["reward"] == malformed["reward"]

    def written(operation):
        return {k: v for k, v in operation.items() if k not in ("credit", "reward", "advantage")}

    assert written(inserted_) == {
        "status": "applied", "item_id": 1, "action": "memory_insert", "content": "Ana lives in Oslo.",
        "written_id": None, "memory_type": "", "previous": None,
    }  # fmt: skip
    assert written(unknown) == {
        "status": "unknown_id", "item_id": None, "action": "memory_delete", "content": "", "written_id": 7,
        "memory_type": "", "previous": None,
    }  # fmt: skip
    assert written(malformed) == {
        "status": "malformed", "item_id": None, "text": "memory_insert(<b>)", "reason": "not JSON",
    }  # fmt: skip


def test_what_was_replaced_is_kept():
    old = item(text="Ana lives in Rome.", item_id=4, memory_type="semantic")
    written = step((updated(old, "Ana lives in Oslo."), deleted(old)), ())
    update, delete = records.evaluated(trajectory([written]), TOKENS.decode)["steps"][0]["operations"]
    assert update["content"] == "Ana lives in Oslo."
    assert update["memory_type"] == delete["memory_type"] == "semantic"
    assert update["previous"] == delete["previous"] == {
        "item_id": 4, "text": "Ana lives in Rome.", "source_step": 0, "source_operation": 0, "memory_type": "semantic",
    }  # fmt: skip


def test_verdicts_stand_beside_what_they_are_about():
    rollout = trajectory([step(OUTCOMES, (OSLO,), verdicts=(True, None, None))], rollout=0)
    first, unknown, malformed = recorded([rollout, rollout], rule="mem_alpha")[0]["steps"][0]["operations"]
    assert (first["content"], first["verdict"]) == ("Ana lives in Oslo.", True)
    assert unknown["verdict"] is malformed["verdict"] is None


def test_without_a_judge_there_are_no_verdicts(both):
    assert not any("verdict" in operation for operation in both[0]["steps"][0]["operations"])


def test_rewards_can_be_computed_again(both):
    totals = np.zeros((2, 2))
    for i, one in enumerate(both):
        for t, step_ in enumerate(one["steps"]):
            written = step_["operations"]
            form = sum(o["status"] == "applied" for o in written) / max(len(written), 1)
            chunk = np.mean([a["score"] for a in step_["answers"]]) if step_["answers"] else 0.0
            compression = 1 - one["memory_tokens"] / one["stream_tokens"]
            (asked,) = one["answers"]
            sources = [item["source_step"] for item in asked["evidence"]]
            contribution = asked["score"] * (sources.count(t) / len(sources) if sources else 0.5)
            credit = 0.5 * one["outcome"] / 2 + 0.5 * contribution
            totals[i, t] = credit + form + 0.5 * chunk + 0.05 * compression
            parts = {
                "total": totals[i, t], "credit": credit, "contribution": contribution, "chunk": chunk, "format": form,
                "compression": compression, "likelihood": 0.0, "content": 0.0, "kl": 0.0,
            }  # fmt: skip
            assert step_["rewards"] == pytest.approx(parts)
            # Each operation's reward is as if the whole step were like it.
            if written:
                assert np.mean([o["reward"] for o in written]) == pytest.approx(totals[i, t])


def test_advantages_can_be_computed_again():
    both = recorded(GROUP)
    totals = np.array([[step_["rewards"]["total"] for step_ in one["steps"]] for one in both])
    wanted = (totals - totals.mean(0)) / (totals.std(0, ddof=1) + 1e-6)
    np.testing.assert_allclose([[s["advantage"] for s in one["steps"]] for one in both], wanted, rtol=1e-6)
    # Unless operations are compared, each has its step's.
    assert {o["advantage"] for o in both[0]["steps"][0]["operations"]} == {both[0]["steps"][0]["advantage"]}


def test_an_evaluated_record(both):
    one = records.evaluated(GROUP[0], TOKENS.decode)
    assert json.loads(json.dumps(one, allow_nan=False)) == one
    trained = both[0]
    assert one["answers"] == trained["answers"]
    for name in ("chunk", "completion", "memory", "answers"):
        assert [s[name] for s in one["steps"]] == [s[name] for s in trained["steps"]]
    for written, also in zip(one["steps"][0]["operations"], trained["steps"][0]["operations"], strict=True):
        assert written.items() <= also.items()
        assert also.keys() - written.keys() == {"credit", "reward", "advantage"}
