"""From `trajectories/*.jsonl.gz` alone, plain Python must find every reward and advantage that the trainer used."""

import gzip
import json
import math
import pathlib

import pytest

import smoke_run

BETA, CHUNK_WEIGHT, COMPRESSION_WEIGHT, EPSILON = 0.5, 0.5, 0.05, 1e-6


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("recompute")
    # Answers that are sometimes right, so that scores are not all 0: the reader of random weights never is.
    settings = {"train.num_steps": 2, "train.evaluate_first": False, "reader.kind": "evidence"}
    smoke_run.run(folder, smoke_run.config(**settings))
    return folder


def read(workdir):
    for path in sorted((workdir / "trajectories").glob("*.jsonl.gz")):
        groups = {}
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for record in map(json.loads, file):
                groups.setdefault(record["stream_id"], []).append(record)
        yield from groups.values()


def recomputed_rewards(record):
    """r_t of one rollout, written from the equations of docs/method.md and nothing of the package."""
    steps, answers = record["steps"], record["answers"]
    num_steps = len(steps)
    outcome = sum(a["score"] for a in answers) / len(answers) if answers else 0.0
    contribution = [0.0] * num_steps
    for answer in answers:
        share = answer["score"] / len(answers)
        if answer["evidence"]:
            for item in answer["evidence"]:
                contribution[item["source_step"]] += share / len(answer["evidence"])
        else:
            contribution = [c + share / num_steps for c in contribution]
    compression = 1 - record["memory_tokens"] / record["stream_tokens"]
    totals = []
    for step, credit in zip(steps, contribution, strict=True):
        evidence = (1 - BETA) * outcome / num_steps + BETA * credit
        written = step["operations"]
        valid = sum(operation["status"] == "applied" for operation in written)
        asked = step["answers"]
        chunk = sum(a["score"] for a in asked) / len(asked) if asked else 0.0
        form = valid / len(written) if written else 0.0
        totals.append(evidence + form + CHUNK_WEIGHT * chunk + COMPRESSION_WEIGHT * compression)
    return totals


def test_every_reward_and_advantage(workdir):
    count = 0
    for records in read(workdir):
        rewards = [recomputed_rewards(record) for record in records]
        for t in range(len(rewards[0])):
            column = [rollout[t] for rollout in rewards]
            mean = sum(column) / len(column)
            std = math.sqrt(sum((r - mean) ** 2 for r in column) / (len(column) - 1))
            equal = max(column) - min(column) <= 1e-6 * max(1.0, max(map(abs, column)))
            for record, reward in zip(records, column, strict=True):
                assert record["steps"][t]["rewards"]["total"] == pytest.approx(reward, abs=1e-6)
                advantage = 0.0 if equal else (reward - mean) / (std + EPSILON)
                assert record["steps"][t]["advantage"] == pytest.approx(advantage, abs=1e-6)
                count += 1
    assert count == 2 * 2 * 4 * 2  # steps × streams × rollouts × chunks


def test_there_is_something_to_compute(workdir):
    """Else the test above would compare zeros with zeros."""
    steps = [step for records in read(workdir) for record in records for step in record["steps"]]
    assert any(step["advantage"] for step in steps)
    assert any(step["rewards"]["chunk"] for step in steps)
    assert any(step["rewards"]["contribution"] for step in steps)
    assert len({step["rewards"]["contribution"] for step in steps}) > 2


def test_operations_share_their_steps_credit(workdir):
    for records in read(workdir):
        for record in records:
            for step in record["steps"]:
                if step["operations"]:
                    shares = [operation["credit"] for operation in step["operations"]]
                    assert sum(shares) == pytest.approx(step["rewards"]["credit"], abs=1e-9)
                    rewards = [operation["reward"] for operation in step["operations"]]
                    assert sum(rewards) / len(rewards) == pytest.approx(step["rewards"]["total"], abs=1e-9)
