"""Tests of finemem_jax/credit.py: each reward by hand, its laws, and a slow loop over ragged rollouts."""

import dataclasses
import random

import jax
import numpy as np
import pytest

from finemem_jax import credit
from finemem_jax.credit import RewardInputs, Weights

PAPER = Weights(beta=0.5, chunk=0.5, compression=0.05, format=1.0)

# Q=2, K=3, T=3: evidence of q0 from steps 0, 0, 2; of q1 from steps 1, 2 and a padding slot, which holds step 0.
SCORES = np.array([1.0, 0.5], np.float32)
QUESTION_MASK = np.array([True, True])
SOURCE_STEP = np.array([[0, 0, 2], [1, 2, 0]])
IS_EVIDENCE = np.array([[True, True, True], [True, True, False]])
STEP_MASK = np.array([True, True, True])


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One rollout as ragged lists: what `RewardInputs` holds before padding."""

    chunk_scores: list[list[float]]
    scores: list[float]
    evidence: list[list[int]]
    valid: list[int]
    written: list[int]
    memory_tokens: int
    stream_tokens: int


def random_group(rng, group_size, most_steps=5, most_questions=4, most_evidence=3, most_chunk_questions=3):
    """The rollouts of one stream: same steps and questions, other scores, evidence and operations."""
    steps = rng.randint(1, most_steps)
    # A quarter of the streams has no questions, a quarter of the chunks none, a quarter of the questions no evidence.
    questions = rng.choice([0, *range(1, most_questions)]) if rng.random() < 0.5 else most_questions
    per_chunk = [rng.choice([0, rng.randint(1, most_chunk_questions)]) for _ in range(steps)]
    stream_tokens = rng.randint(1, 400)

    def one():
        written = [rng.randint(0, 4) for _ in range(steps)]
        return Rollout(
            chunk_scores=[[rng.random() for _ in range(n)] for n in per_chunk],
            scores=[rng.choice([0.0, 1.0, rng.random()]) for _ in range(questions)],
            evidence=[[rng.randrange(steps) for _ in range(rng.randint(0, most_evidence))] for _ in range(questions)],
            valid=[rng.randint(0, n) for n in written],
            written=written,
            memory_tokens=rng.randint(0, 500),
            stream_tokens=stream_tokens,
        )

    return [one() for _ in range(group_size)]


def padded(groups, steps=5, per_chunk=3, questions=4, evidence=3, garbage=None):
    """[S, G, ...] arrays of these sizes; `garbage` (a generator) fills the places that no mask holds."""
    shape = (len(groups), len(groups[0]))

    def floats(*size):
        # NaN is the hardest of all garbage: even zero times NaN is NaN.
        return np.zeros((*shape, *size)) if garbage is None else np.full((*shape, *size), np.nan)

    def counts(*size):
        return np.zeros((*shape, *size), int) if garbage is None else garbage.integers(0, 9, (*shape, *size))

    def mask(*size):
        return np.zeros((*shape, *size), bool)

    inputs = RewardInputs(
        step_mask=mask(steps),
        chunk_scores=floats(steps, per_chunk),
        chunk_mask=mask(steps, per_chunk),
        scores=floats(questions),
        question_mask=mask(questions),
        source_step=counts(questions, evidence),
        is_evidence=mask(questions, evidence),
        valid_operations=counts(steps),
        written_operations=counts(steps),
        memory_tokens=np.zeros(shape, int),
        stream_tokens=np.ones(shape, int),
    )
    for s, group in enumerate(groups):
        for g, rollout in enumerate(group):
            num_steps = len(rollout.written)
            inputs.step_mask[s, g, :num_steps] = True
            inputs.valid_operations[s, g, :num_steps] = rollout.valid
            inputs.written_operations[s, g, :num_steps] = rollout.written
            inputs.memory_tokens[s, g] = rollout.memory_tokens
            inputs.stream_tokens[s, g] = rollout.stream_tokens
            for t, scores in enumerate(rollout.chunk_scores):
                inputs.chunk_scores[s, g, t, : len(scores)] = scores
                inputs.chunk_mask[s, g, t, : len(scores)] = True
            inputs.scores[s, g, : len(rollout.scores)] = rollout.scores
            inputs.question_mask[s, g, : len(rollout.scores)] = True
            for j, sources in enumerate(rollout.evidence):
                inputs.source_step[s, g, j, : len(sources)] = sources
                inputs.is_evidence[s, g, j, : len(sources)] = True
    return inputs


def slow_rewards(rollout, weights):
    """METHOD.md's equations, one number at a time."""
    steps, questions = len(rollout.written), len(rollout.scores)
    outcome = sum(rollout.scores) / questions if questions else 0.0
    contribution = [0.0] * steps
    for score, sources in zip(rollout.scores, rollout.evidence, strict=True):
        for t in sources or range(steps):
            contribution[t] += score / (len(sources or range(steps)) * questions)
    evidence = [(1 - weights.beta) * outcome / steps + weights.beta * n for n in contribution]
    chunk = [sum(scores) / len(scores) if scores else 0.0 for scores in rollout.chunk_scores]
    form = [v / w if w else 0.0 for v, w in zip(rollout.valid, rollout.written, strict=True)]
    compression = [1 - rollout.memory_tokens / rollout.stream_tokens] * steps
    total = [
        evidence[t] + weights.format * form[t] + weights.chunk * chunk[t] + weights.compression * compression[t]
        for t in range(steps)
    ]
    return credit.Rewards(total, evidence, contribution, chunk, form, compression, outcome)


def float64_rewards(inputs, weights):
    """As `rewards.judge` calls the kernels."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, credit.step_rewards(inputs, Weights(*(np.float64(w) for w in weights))))


def assert_same(got, expected, atol=1e-12):
    for name, a, b in zip(credit.Rewards._fields, got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def ragged_groups():
    rng = random.Random(0)
    groups = [random_group(rng, group_size=3) for _ in range(200)]
    # The edges that the laws are about do occur.
    rollouts = [rollout for group in groups for rollout in group]
    assert any(not r.scores for r in rollouts)
    assert any(not any(r.chunk_scores) for r in rollouts)
    assert any([] in r.evidence and any(r.evidence) for r in rollouts)
    assert any(r.evidence and not any(r.evidence) for r in rollouts)
    assert any(len(r.written) == 1 for r in rollouts)
    return groups


# --------------------------------------------------------------------------------------
# By hand
# --------------------------------------------------------------------------------------


def test_contribution_by_hand():
    # s=(1, 1/2). q0 gives 1/(3*2) to each of steps 0, 0, 2; q1 gives (1/2)/(2*2) to each of steps 1, 2.
    # N = (2/6, 1/8, 1/6 + 1/8); the sum 3/4 is the mean score.
    got = credit.evidence_contribution(SCORES, QUESTION_MASK, SOURCE_STEP, IS_EVIDENCE, STEP_MASK)
    np.testing.assert_allclose(got, [1 / 3, 1 / 8, 7 / 24], rtol=1e-6)


def test_contribution_of_a_question_without_evidence_by_hand():
    # q1 has nothing: its (1/2)/2 is spread over the 3 steps, 1/12 each, on top of q0's 1/6 per item.
    is_evidence = IS_EVIDENCE & np.array([[True], [False]])
    got = credit.evidence_contribution(SCORES, QUESTION_MASK, SOURCE_STEP, is_evidence, STEP_MASK)
    np.testing.assert_allclose(got, [1 / 3 + 1 / 12, 1 / 12, 1 / 6 + 1 / 12], rtol=1e-6)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, [1 / 4, 1 / 4, 1 / 4]),  # outcome only: r_global / T
        (1.0, [1 / 3, 1 / 8, 7 / 24]),  # N_t itself
        (0.5, [7 / 24, 3 / 16, 13 / 48]),  # halfway: (1/4 + 1/3)/2, (1/4 + 1/8)/2, (1/4 + 7/24)/2
    ],
)
def test_evidence_reward_by_hand(beta, expected):
    contribution = np.array([1 / 3, 1 / 8, 7 / 24])
    got = credit.evidence_reward(np.float32(0.75), contribution, STEP_MASK, beta)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_format_reward_by_hand():
    # All, half, none of the operations valid; and nothing written at all.
    got = credit.format_reward(np.array([3, 1, 0, 0]), np.array([3, 2, 4, 0]), np.float32)
    np.testing.assert_allclose(got, [1, 0.5, 0, 0])


@pytest.mark.parametrize(
    ("memory_tokens", "expected"), [(0, 1), (50, 0.75), (200, 0), (300, -0.5)], ids=["empty", "short", "even", "longer"]
)
def test_compression_reward_by_hand(memory_tokens, expected):
    got = credit.compression_reward(np.asarray(memory_tokens), np.asarray(200), np.float32)
    np.testing.assert_allclose(got, expected)


def test_step_rewards_by_hand():
    # The case above (r_EARA = 7/24, 3/16, 13/48 at β = 1/2) with
    # chunk scores (1, 0), none, (1/2): r_chunk = 1/2, 0, 1/2, weighted by 1/2;
    # operations 2 of 2, 0 of 1, none: r_fmt = 1, 0, 0;
    # a memory of 20 tokens for 100 read: r_comp = 4/5, weighted by 1/20.
    rollout = Rollout(
        chunk_scores=[[1.0, 0.0], [], [0.5]],
        scores=[1.0, 0.5],
        evidence=[[0, 0, 2], [1, 2]],
        valid=[2, 0, 0],
        written=[2, 1, 0],
        memory_tokens=20,
        stream_tokens=100,
    )
    got = credit.step_rewards(padded([[rollout]]), PAPER)
    total = [7 / 24 + 1 + 1 / 4 + 1 / 25, 3 / 16 + 0 + 0 + 1 / 25, 13 / 48 + 0 + 1 / 4 + 1 / 25]
    np.testing.assert_allclose(got.total[0, 0], [*total, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(got.compression[0, 0], [0.8, 0.8, 0.8, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(got.outcome[0, 0], 0.75)


@pytest.mark.parametrize(
    ("mask", "expected"), [([True, True, False], 2), ([False, False, True], 8), ([False, False, False], 0)]
)
def test_masked_mean(mask, expected):
    assert credit.masked_mean(np.array([1.0, 3.0, 8.0]), np.array(mask)) == expected


# --------------------------------------------------------------------------------------
# Laws
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", [PAPER, Weights(0.0, 0.0, 0.05, 1.0), Weights(1.0, 2.0, 0.0, 0.3)], ids=["paper", "outcome", "other"]
)
def test_agrees_with_a_slow_loop(ragged_groups, weights):
    got = float64_rewards(padded(ragged_groups), weights)
    for s, group in enumerate(ragged_groups):
        for g, rollout in enumerate(group):
            steps = len(rollout.written)
            one = credit.Rewards(*(part[s, g] for part in got))
            assert_same([part[..., :steps] for part in one[:-1]] + [one.outcome], slow_rewards(rollout, weights))
            assert not any(part[steps:].any() for part in one[:-1])


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_credit_is_conserved(ragged_groups, beta):
    got = float64_rewards(padded(ragged_groups), PAPER._replace(beta=beta))
    outcome = [[np.mean(r.scores) if r.scores else 0.0 for r in group] for group in ragged_groups]
    np.testing.assert_allclose(got.contribution.sum(-1), outcome, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.evidence.sum(-1), outcome, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.outcome, outcome, rtol=0, atol=1e-12)


def test_float32_is_the_default_and_agrees(ragged_groups):
    inputs = padded(ragged_groups)
    got = credit.step_rewards(inputs, PAPER)
    assert {part.dtype for part in got} == {np.dtype(np.float32)}
    expected = float64_rewards(inputs, PAPER)
    assert {part.dtype for part in expected} == {np.dtype(np.float64)}
    # r_comp reaches -499 here (500 tokens kept of 1 read), and float32 has seven digits.
    assert_same(got, expected, atol=1e-4)


def test_padding_changes_nothing(ragged_groups):
    expected = float64_rewards(padded(ragged_groups), PAPER)
    garbage = np.random.default_rng(0)
    got = float64_rewards(padded(ragged_groups, 8, 5, 6, 7, garbage), PAPER)
    assert not any(part[..., 5:].any() for part in got[:-1])
    assert_same([part[..., :5] for part in got[:-1]] + [got.outcome], expected)


def test_permuting_rollouts_permutes_rewards(ragged_groups):
    expected = float64_rewards(padded(ragged_groups), PAPER)
    order = [2, 0, 1]
    got = float64_rewards(padded([[group[i] for i in order] for group in ragged_groups]), PAPER)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b[:, order])


def test_order_of_questions_and_evidence_does_not_matter(ragged_groups):
    def reverse(r):
        return dataclasses.replace(r, scores=r.scores[::-1], evidence=[sources[::-1] for sources in r.evidence[::-1]])

    expected = float64_rewards(padded(ragged_groups), PAPER)
    got = float64_rewards(padded([[reverse(r) for r in group] for group in ragged_groups]), PAPER)
    assert_same(got, expected)


# --------------------------------------------------------------------------------------
# Edges
# --------------------------------------------------------------------------------------


def test_a_stream_without_questions_earns_no_evidence_reward():
    rollout = Rollout([[1.0], [0.0]], [], [], [1, 1], [1, 1], 10, 20)
    got = credit.step_rewards(padded([[rollout]]), PAPER)
    assert not got.outcome.any()
    assert not got.contribution.any()
    assert not got.evidence.any()
    # What is left: 1 + 1/2 * r_chunk + 1/20 * 1/2.
    np.testing.assert_allclose(got.total[0, 0, :2], [1 + 0.5 + 0.025, 1 + 0.025], rtol=1e-6)


def test_all_evidence_from_one_step_credits_that_step_alone():
    rollout = Rollout([[], [], []], [1.0, 1.0], [[1, 1], [1]], [0, 0, 0], [0, 0, 0], 0, 1)
    got = credit.step_rewards(padded([[rollout]]), PAPER)
    np.testing.assert_allclose(got.contribution[0, 0], [0, 1, 0, 0, 0])


def test_a_wrong_answer_credits_nobody():
    rollout = Rollout([[], []], [0.0], [[0, 1]], [0, 0], [0, 0], 0, 1)
    assert not credit.step_rewards(padded([[rollout]]), PAPER).contribution.any()
