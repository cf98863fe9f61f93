"""Tests of finemem_jax/rewards.py: ragged trajectories to arrays, and the reward of a small case worked by hand."""

import dataclasses

import numpy as np
import pytest

from finemem_jax import rewards
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

PAPER = Weights(beta=0.5, chunk=0.5, compression=0.05, format=1.0)
GOOD = Outcome(Operation(Action.INSERT, "xx"), Status.APPLIED, 1)
SKIP = Outcome(Operation(Action.SKIP), Status.APPLIED)
BAD = Outcome(Malformed("?", "not JSON"), Status.MALFORMED)


def step(outcomes, scores=(), memory=()):
    items = tuple(MemoryItem(i, text, 0) for i, text in enumerate(memory, start=1))
    completion = Completion((65,), (-1.0,), "stop", 0)
    return Step((1, 2), (1, 2), completion, tuple(outcomes), Memory(items), answers(*((s, ()) for s in scores)))


def answers(*scored):
    """One answer for each (score, source steps of its evidence)."""
    return tuple(
        Answer(Question("q", ("a",)), tuple(MemoryItem(i, "m", t) for i, t in enumerate(sources)), "a", score)
        for score, sources in scored
    )


LONG = Stream("long", "made up", (Chunk("aaaa"), Chunk("bbbbbb")))
SHORT = Stream("short", "made up", (Chunk("cc"),))

# One rollout that does well and one that does nothing; and a shorter stream without questions, twice the same.
GOOD_ROLLOUT = Trajectory(
    LONG, 0, (step([GOOD, BAD], [1.0, 0.0], ["xx"]), step([GOOD], (), ["xx"])), answers((1.0, (0, 0, 1)), (0.5, ()))
)
IDLE_ROLLOUT = Trajectory(LONG, 1, (step([], [0.0, 0.0]), step([])), answers((0.0, ()), (0.0, ())))
SKIPPED = Trajectory(SHORT, 0, (step([SKIP]),))
GROUPS = [[GOOD_ROLLOUT, IDLE_ROLLOUT], [SKIPPED, dataclasses.replace(SKIPPED, rollout=1)]]


def test_collect_pads_to_the_longest():
    got = rewards.collect(GROUPS, len)
    np.testing.assert_array_equal(got.step_mask, [[[1, 1], [1, 1]], [[1, 0], [1, 0]]])
    np.testing.assert_array_equal(got.chunk_scores[0, 0], [[1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(got.chunk_mask[0, 0], [[True, True], [False, False]])
    assert not got.chunk_mask[1].any()
    np.testing.assert_array_equal(got.scores[0], [[1.0, 0.5], [0.0, 0.0]])
    np.testing.assert_array_equal(got.question_mask, [[[1, 1], [1, 1]], [[0, 0], [0, 0]]])
    np.testing.assert_array_equal(got.source_step[0, 0], [[0, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(got.is_evidence[0, 0], [[True, True, True], [False, False, False]])
    np.testing.assert_array_equal(got.valid_operations, [[[1, 1], [0, 0]], [[1, 0], [1, 0]]])
    np.testing.assert_array_equal(got.written_operations, [[[2, 1], [0, 0]], [[1, 0], [1, 0]]])
    np.testing.assert_array_equal(got.memory_tokens, [[2, 0], [0, 0]])
    np.testing.assert_array_equal(got.stream_tokens, [[10, 10], [2, 2]])


def test_collect_without_any_question_has_one_empty_slot():
    got = rewards.collect([[SKIPPED]], len)
    assert got.scores.shape == (1, 1, 1)
    assert got.source_step.shape == (1, 1, 1, 1)
    assert got.chunk_scores.shape == (1, 1, 1, 1)
    assert not (got.question_mask.any() or got.is_evidence.any() or got.chunk_mask.any())


def test_collect_of_a_blank_stream_does_not_divide_by_zero():
    blank = dataclasses.replace(SKIPPED, stream=Stream("blank", "made up", (Chunk(""),)))
    inputs = rewards.collect([[blank, blank]], len)
    assert inputs.stream_tokens.tolist() == [[1, 1]]
    earned, _ = rewards.judge(inputs, PAPER, 1e-6)
    assert np.isfinite(earned.total).all()


def test_judge_by_hand():
    # Stream 0, rollout 0. r_global = (1 + 0.5) / 2 = 3/4.
    # N: q0 gives 1/2, two thirds of it to step 0; q1 has no evidence and gives 1/4, half to each step.
    #   N_0 = 1/3 + 1/8 = 11/24,  N_1 = 1/6 + 1/8 = 7/24;  together 3/4.
    # r_EARA = (1/2)(3/4)/2 + N/2:  3/16 + 11/48 = 5/12,  3/16 + 7/48 = 1/3.
    # r_fmt = 1/2, 1.  r_chunk = 1/2, 0.  r_comp = 1 - 2/10 = 4/5.
    # r_0 = 5/12 + 1/2 + 1/4 + 1/25 = 181/150,  r_1 = 1/3 + 1 + 0 + 1/25 = 103/75.
    # Rollout 1 wrote nothing: r = 0.05 · 1. Stream 1 skipped: r = 1 + 0.05.
    earned, group = rewards.judge(rewards.collect(GROUPS, len), PAPER, 1e-6)
    close = dict(rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(earned.outcome, [[3 / 4, 0], [0, 0]], **close)
    np.testing.assert_allclose(earned.contribution[0], [[11 / 24, 7 / 24], [0, 0]], **close)
    np.testing.assert_allclose(earned.evidence[0], [[5 / 12, 1 / 3], [0, 0]], **close)
    np.testing.assert_allclose(earned.format, [[[0.5, 1], [0, 0]], [[1, 0], [1, 0]]], **close)
    np.testing.assert_allclose(earned.chunk[0], [[0.5, 0], [0, 0]], **close)
    np.testing.assert_allclose(earned.compression, [[[0.8, 0.8], [1, 1]], [[1, 0], [1, 0]]], **close)
    np.testing.assert_allclose(earned.total, [[[181 / 150, 103 / 75], [0.05, 0.05]], [[1.05, 0], [1.05, 0]]], **close)
    # Of two, the better is 1/√2 above the mean in standard deviations (ddof 1), whatever lies between them.
    np.testing.assert_allclose(group.advantages[0], np.array([[1, 1], [-1, -1]]) / np.sqrt(2), rtol=1e-5)
    np.testing.assert_array_equal(group.advantages[1], 0)
    np.testing.assert_array_equal(group.alive, [[True, True], [False, False]])


def test_judge_is_float64_on_the_host():
    earned, group = rewards.judge(rewards.collect(GROUPS, len), PAPER, 1e-6)
    for array in (*earned, group.advantages):
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float64


@pytest.mark.parametrize("weight", ["beta", "chunk", "compression", "format"])
def test_a_weight_of_zero_takes_its_part_out(weight):
    inputs = rewards.collect(GROUPS, len)
    earned, _ = rewards.judge(inputs, PAPER._replace(**{weight: 0.0}), 1e-6)
    parts = {"chunk": 0.5 * earned.chunk, "compression": 0.05 * earned.compression, "format": earned.format}
    wanted = earned.evidence + sum(part for name, part in parts.items() if name != weight)
    np.testing.assert_allclose(earned.total, wanted, rtol=1e-12)
    np.testing.assert_allclose(earned.evidence.sum(-1), earned.outcome, rtol=1e-12)


def test_swapping_rollouts_swaps_their_rewards():
    swapped = [group[::-1] for group in GROUPS]
    one, one_group = rewards.judge(rewards.collect(GROUPS, len), PAPER, 1e-6)
    other, other_group = rewards.judge(rewards.collect(swapped, len), PAPER, 1e-6)
    np.testing.assert_array_equal(one.total, other.total[:, ::-1])
    np.testing.assert_array_equal(one_group.advantages, other_group.advantages[:, ::-1])
