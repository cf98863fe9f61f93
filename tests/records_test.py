"""Tests of finemem_jax/records.py: a record is plain JSON, says what happened, and holds what rewards are made of."""

import json

import numpy as np
import pytest

from finemem_jax import records, rewards
from finemem_jax.credit import Weights
from finemem_jax.episode import (
    Action,
    Answer,
    Chunk,
    Completion,
    Malformed,
    Memory,
    MemoryItem,
    Operation,
    Outcome,
    Question,
    Status,
    Step,
    Stream,
    Trajectory,
)
from finemem_jax.tokenizer import ByteTokenizer

TOKENS = ByteTokenizer()
PAPER = Weights(beta=0.5, chunk=0.5, compression=0.05, format=1.0)
ITEM = MemoryItem(1, "Ana lives in Oslo.", 0)
QUESTION = Question("Where does Ana live?", ("Oslo", "Oslo, Norway"), "substring", (0,), "plain")
OUTCOMES = (
    Outcome(Operation(Action.INSERT, "Ana lives in Oslo."), Status.APPLIED, 1),
    Outcome(Operation(Action.DELETE, item_id=7), Status.UNKNOWN_ID),
    Outcome(Malformed("memory_insert(<b>)", "not JSON"), Status.MALFORMED),
)


def step(outcomes, memory, answers=()):
    prompt, text = TOKENS.encode("New text"), TOKENS.encode("Ærø")
    completion = Completion((*text, *TOKENS.end_ids), (-0.5,) * 6, "stop", 3)
    return Step(tuple(prompt), (1, 4, 8), completion, tuple(outcomes), Memory(memory, 2), answers)


STREAM = Stream("s-1", "made up", (Chunk("Ana moved to Oslo.", (QUESTION,)), Chunk("Rain.")), (QUESTION,), "AR")
RIGHT = Answer(QUESTION, (ITEM,), "Oslo", 1.0)
WRONG = Answer(QUESTION, (), "unknown", 0.0)
GROUP = [
    Trajectory(STREAM, 0, (step(OUTCOMES, (ITEM,), (RIGHT,)), step((), (ITEM,))), (RIGHT,)),
    Trajectory(STREAM, 1, (step((), (), (WRONG,)), step((), ())), (WRONG,)),
]


@pytest.fixture(scope="module")
def judged():
    inputs = rewards.collect([GROUP], lambda text: len(TOKENS.encode(text)))
    return inputs, *rewards.judge(inputs, PAPER, 1e-6)


def record(rollout, judged):
    return records.trajectory(GROUP[rollout], (0, rollout), *judged, TOKENS.decode)


def test_a_record_is_plain_json(judged):
    one = record(0, judged)
    assert json.loads(json.dumps(one, allow_nan=False)) == one


def test_a_record_says_what_happened(judged):
    one = record(0, judged)
    assert {name: one[name] for name in ("stream_id", "source", "competency", "rollout")} == {
        "stream_id": "s-1", "source": "made up", "competency": "AR", "rollout": 0,
    }  # fmt: skip
    assert (one["memory_tokens"], one["stream_tokens"], one["outcome"]) == (18, 23, 1.0)
    first, second = one["steps"]
    assert (first["step"], second["step"]) == (0, 1)
    assert first["prompt"] == "New text"
    assert first["completion"] == "Ærø<|end|>"
    assert first["completion_ids"] == [*TOKENS.encode("Ærø"), *TOKENS.end_ids]
    assert first["log_probs"] == [-0.5] * 6
    assert (first["finish_reason"], first["policy_version"]) == ("stop", 3)
    assert first["memory"] == [{"item_id": 1, "text": "Ana lives in Oslo.", "source_step": 0}]
    assert second["answers"] == []
    assert first["answers"] == one["answers"] == [
        {
            "question": "Where does Ana live?",
            "kind": "plain",
            "gold": ["Oslo", "Oslo, Norway"],
            "metric": "substring",
            "evidence": [{"item_id": 1, "text": "Ana lives in Oslo.", "source_step": 0}],
            "answer": "Oslo",
            "score": 1.0,
        }
    ]  # fmt: skip


def test_operations_by_hand(judged):
    inserted, unknown, malformed = record(0, judged)["steps"][0]["operations"]
    assert inserted.items() >= {
        "status": "applied", "item_id": 1, "action": "memory_insert", "content": "Ana lives in Oslo.",
    }.items()  # fmt: skip
    assert unknown.items() >= {"status": "unknown_id", "action": "memory_delete", "content": ""}.items()
    assert malformed.items() >= {"status": "malformed", "text": "memory_insert(<b>)", "reason": "not JSON"}.items()


def test_rewards_can_be_computed_again(judged):
    both = [record(0, judged), record(1, judged)]
    totals = np.zeros((2, 2))
    for i, one in enumerate(both):
        for t, step_ in enumerate(one["steps"]):
            written = step_["operations"]
            form = sum(o["status"] == "applied" for o in written) / max(len(written), 1)
            chunk = np.mean([a["score"] for a in step_["answers"]]) if step_["answers"] else 0.0
            compression = 1 - one["memory_tokens"] / one["stream_tokens"]
            (asked,) = one["answers"]
            sources = [item["source_step"] for item in asked["evidence"]]
            share = sources.count(t) / len(sources) if sources else 0.5
            evidence = 0.5 * one["outcome"] / 2 + 0.5 * share * asked["score"]
            totals[i, t] = evidence + form + 0.5 * chunk + 0.05 * compression
            parts = {"evidence": evidence, "chunk": chunk, "format": form, "compression": compression}
            assert {name: step_["rewards"][name] for name in parts} == pytest.approx(parts)
            assert step_["rewards"]["total"] == pytest.approx(totals[i, t])
    advantages = (totals - totals.mean(0)) / (totals.std(0, ddof=1) + 1e-6)
    got = [[step_["advantage"] for step_ in one["steps"]] for one in both]
    np.testing.assert_allclose(got, advantages, rtol=1e-6)


def test_an_evaluated_record(judged):
    one = records.evaluated(GROUP[0], TOKENS.decode)
    assert json.loads(json.dumps(one, allow_nan=False)) == one
    trained = record(0, judged)
    assert one["answers"] == trained["answers"]
    for name in ("completion", "operations", "memory", "answers"):
        assert [s[name] for s in one["steps"]] == [s[name] for s in trained["steps"]]
