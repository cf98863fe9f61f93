"""Tests of finemem_jax/rl/credit.py: every kernel by hand, its law and its edge. Whole rules are in rules_test."""

import itertools

import jax
import numpy as np
import pytest

from finemem_jax.rl import credit

# Q=2, K=3, T=3, one operation a step, so that slots are steps: evidence of q0 from steps 0, 0, 2; of q1 from steps 1, 2
# and a padding slot, which holds step 0.
SCORES = np.array([1.0, 0.5], np.float32)
QUESTION_MASK = np.array([True, True])
SLOT = np.array([[0, 0, 2], [1, 2, 0]])
IS_EVIDENCE = np.array([[True, True, True], [True, True, False]])
STEP_MASK = np.array([True, True, True])


def contribution(scores=SCORES, share=None, slot=SLOT, is_evidence=IS_EVIDENCE, step_mask=STEP_MASK, operations=1):
    share = credit.equal_share(is_evidence) if share is None else share
    return credit.contribution(scores, share, slot, QUESTION_MASK, step_mask, operations)


# --------------------------------------------------------------------------------------
# From questions to steps and operations
# --------------------------------------------------------------------------------------


def test_contribution_by_hand():
    # s=(1, 1/2). q0 gives 1/(3*2) to each of steps 0, 0, 2; q1 gives (1/2)/(2*2) to each of steps 1, 2.
    # N = (2/6, 1/8, 1/6 + 1/8); the sum 3/4 is the mean score.
    np.testing.assert_allclose(contribution().total, [1 / 3, 1 / 8, 7 / 24], rtol=1e-6)


def test_contribution_of_a_question_without_evidence_by_hand():
    # q1 has nothing: its (1/2)/2 is spread over the 3 steps, 1/12 each, on top of q0's 1/6 per item.
    got = contribution(is_evidence=IS_EVIDENCE & np.array([[True], [False]]))
    np.testing.assert_allclose(got.total, [1 / 3 + 1 / 12, 1 / 12, 1 / 6 + 1 / 12], rtol=1e-6)
    np.testing.assert_allclose(got.operation[:, 0], [1 / 3, 0, 1 / 6], atol=1e-7)
    np.testing.assert_allclose(got.step, [1 / 12] * 3, rtol=1e-6)


def test_operations_share_their_steps_credit_by_hand():
    # Two operations a step: slot 2t + o. q0's evidence was written by (0,0), (0,1), (2,1); q1's by (1,0), (2,1).
    got = contribution(slot=np.array([[0, 1, 5], [2, 5, 0]]), operations=2)
    np.testing.assert_allclose(got.operation, [[1 / 6, 1 / 6], [1 / 8, 0], [0, 7 / 24]], rtol=1e-6)
    np.testing.assert_allclose(got.step, 0, atol=1e-7)


def test_a_step_that_does_not_exist_gets_nothing():
    got = contribution(is_evidence=np.zeros_like(IS_EVIDENCE), step_mask=np.array([True, True, False]))
    np.testing.assert_allclose(got.total, [3 / 8, 3 / 8, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("cited", "expected"),
    [
        ([[1, 0, 0], [0, 1, 0]], [[1, 0, 0], [0, 1, 0]]),
        ([[0, 1, 1], [0, 0, 0]], [[0, 0.5, 0.5], [0.5, 0.5, 0]]),  # Nothing cited: all that was retrieved.
        ([[1, 1, 1], [1, 1, 1]], [[1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0]]),  # All cited, padding too: as evidence.
    ],
)
def test_cited_share_by_hand(cited, expected):
    np.testing.assert_allclose(credit.cited_share(np.array(cited, bool), IS_EVIDENCE), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, [1 / 4, 1 / 4, 1 / 4]),  # outcome only: r_global / T
        (1.0, [1 / 3, 1 / 8, 7 / 24]),  # N_t itself
        (0.5, [7 / 24, 3 / 16, 13 / 48]),  # halfway: (1/4 + 1/3)/2, (1/4 + 1/8)/2, (1/4 + 7/24)/2
    ],
)
def test_evidence_reward_by_hand(beta, expected):
    got = credit.evidence_reward(np.float32(0.75), contribution(), STEP_MASK, beta)
    np.testing.assert_allclose(got.total, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("reduce", "expected"), [("mean", [1, 0.75, 0.25]), ("sum", [1, 1.5, 0.25])], ids=["mean", "sum"]
)
def test_by_gold_by_hand(reduce, expected):
    # q0 (1) needs steps 0 and 1, q1 (1/2) step 1, q2 (1/4) is unknown and goes to step 2; q3 does not exist.
    value = np.array([1, 0.5, 0.25, np.nan])
    gold = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1]], bool)
    got = credit.by_gold(value, gold, np.array([True, True, True, False]), np.int32(2), reduce)
    np.testing.assert_allclose(got, expected)


def test_by_gold_of_a_step_without_questions_is_zero():
    got = credit.by_gold(np.ones(1), np.array([[False, True]]), np.array([True]), np.int32(0), "mean")
    np.testing.assert_allclose(got, [0, 1])


def test_differences_telescope():
    value = np.random.default_rng(0).normal(size=20)
    got = np.asarray(credit.differences(value))
    np.testing.assert_allclose(got.sum(), value[-1] - value[0], rtol=1e-5)
    np.testing.assert_allclose(credit.differences(np.array([1.0, 3.0, 2.0])), [2, -1])


@pytest.mark.parametrize(
    ("gamma", "reduce", "expected"),
    [
        (1.0, "sum", [7, 6, 4, 0]),
        (0.5, "sum", [1 + 1 + 1, 2 + 2, 4, 0]),
        (0.0, "sum", [1, 2, 4, 0]),
        (1.0, "mean", [7 / 3, 3, 4, 0]),
        (0.5, "mean", [3 / 1.75, 4 / 1.5, 4, 0]),
    ],
)
def test_to_go_by_hand(gamma, reduce, expected):
    got = credit.to_go(
        np.array([1.0, 2.0, 4.0, np.nan], np.float32), np.array([True, True, True, False]), gamma, reduce
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("how", ["by_adding", "by_comparing"])
def test_scatter_by_hand(how, monkeypatch):
    # TPUs take the branch that no test here would otherwise run.
    def choose(*args, tpu, default):
        return (tpu if how == "by_comparing" else default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    got = credit.scatter(np.array([[1.0, 2.0], [4.0, 0.0]], np.float32), np.array([[0, 3], [0, 99]], np.int32), 4)
    np.testing.assert_allclose(got, [5, 0, 0, 2])


# --------------------------------------------------------------------------------------
# What an item was worth
# --------------------------------------------------------------------------------------


def test_ablation_by_hand():
    # Without item 0 the answer is lost, without item 1 it is better.
    scores, without = np.array([0.5]), np.array([[0.0, 1.0, np.nan]])
    is_evidence = np.array([[True, True, False]])
    np.testing.assert_allclose(credit.ablation_worth(scores, without, is_evidence, False), [[0.5, -0.5, 0]])
    np.testing.assert_allclose(credit.ablation_worth(scores, without, is_evidence, True), [[0.5, 0, 0]])


def test_ablation_that_conserves_shares_alike_what_no_item_alone_is_needed_for():
    got = credit.ablation_worth(np.array([0.5]), np.array([[0.5, 0.7]]), np.array([[True, True]]), True)
    np.testing.assert_allclose(got, [[0.25, 0.25]])


def test_shapley_of_two_items_by_hand():
    # v(∅)=0.1, v(1)=0.5, v(2)=0.2, v(12)=1: φ_1 = ((0.5-0.1) + (1-0.2))/2 = 0.6, φ_2 = ((0.2-0.1) + (1-0.5))/2 = 0.3.
    got = credit.shapley_worth(np.array([[0.1, 0.5, 0.2, 1.0]], np.float32))
    np.testing.assert_allclose(got, [[0.6, 0.3]], rtol=1e-6)


def test_shapley_of_one_item_is_its_gain():
    np.testing.assert_allclose(credit.shapley_worth(np.array([[0.25, 1.0]], np.float32)), [[0.75]])


def test_shapley_of_nobody():
    assert credit.shapley_worth(np.ones((3, 1), np.float32)).shape == (3, 0)


@pytest.mark.parametrize("players", [1, 2, 3, 4, 6])
def test_shapley_laws(players):
    values = np.random.default_rng(players).normal(size=(10, 2**players))
    with jax.enable_x64(True):
        got = np.asarray(credit.shapley_worth(values))
        np.testing.assert_allclose(got.sum(-1), values[:, -1] - values[:, 0], atol=1e-12)
        # Linear in the game.
        np.testing.assert_allclose(credit.shapley_worth(2 * values + 1), 2 * got, atol=1e-12)
        # Renaming the players renames their values.
        order = np.random.default_rng(0).permutation(players)
        renamed = [sum(1 << int(order[p]) for p in range(players) if c >> p & 1) for c in range(2**players)]
        np.testing.assert_allclose(credit.shapley_worth(values[:, renamed]), got[:, order], atol=1e-12)
        # One that changes nothing gets nothing.
        idle = values[:, [c & ~1 for c in range(2**players)]]
        np.testing.assert_allclose(credit.shapley_worth(idle)[:, 0], 0, atol=1e-12)


@pytest.mark.parametrize(("transform", "expected"), [("prob", [0.5, -0.25]), ("log", [np.log(2), np.log(0.5) / 2])])
def test_state_gain_by_hand(transform, expected):
    # V: (0.5+0.5)/2 = 0.5, then 1, then 0.75. Logarithms: log ½, then 0, then (log ½ + 0)/2. The third is no question.
    states = np.array([[0.5, 0.5, np.nan], [1, 1, np.nan], [0.5, 1, np.nan]])
    got = credit.state_gain(states, np.array([True, True, False]), transform, -5.0)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_score_of_zero_has_a_floor():
    got = credit.state_gain(np.array([[0.0], [1.0]]), np.array([True]), "log", -5.0)
    np.testing.assert_allclose(got, [5], rtol=1e-6)


@pytest.mark.parametrize(("memory", "expected"), [(0, 0), (70, 0), (100, 0.3), (170, 1)])
def test_bloat_by_hand(memory, expected):
    got = credit.bloat(np.asarray(memory), np.asarray(100), np.float32)
    np.testing.assert_allclose(got, expected, atol=1e-6)


# --------------------------------------------------------------------------------------
# Parts that ask nobody, and weights
# --------------------------------------------------------------------------------------


def test_chunk_reward_by_hand():
    # Step 0: scores 1 and 0, mean 1/2. The first rests on (0,0) alone, so (0,0) has 1/2.
    # Step 1: one score of 1, on (1,1) and on (0,0), which is not of this step: half to (1,1), half to the step.
    # Step 2: no questions.
    scores = np.array([[1.0, 0.0], [1.0, np.nan], [np.nan, np.nan]])
    mask = np.array([[True, True], [True, False], [False, False]])
    slot = np.array([[[0, 9], [9, 9]], [[3, 0], [9, 9]], [[4, 4], [4, 4]]], np.int32)
    is_evidence = np.array([[[1, 0], [0, 0]], [[1, 1], [0, 0]], [[1, 1], [1, 1]]], bool)
    got = credit.chunk_reward(scores, mask, slot, is_evidence, 2)
    np.testing.assert_allclose(got.operation, [[0.5, 0], [0, 0.5], [0, 0]])
    np.testing.assert_allclose(got.step, [0, 0.5, 0], atol=1e-7)
    np.testing.assert_allclose(got.total, [0.5, 1, 0])


def test_format_reward_by_hand():
    # All, half, none of the operations valid; and nothing written at all.
    valid = np.array([[1, 1], [1, 0], [0, 0], [1, 1]], np.float32)
    written = np.array([[1, 1], [1, 1], [1, 0], [0, 0]], bool)
    np.testing.assert_allclose(credit.mean_over_operations(valid, written).total, [1, 0.5, 0, 0])


@pytest.mark.parametrize(
    ("memory_tokens", "expected"), [(0, 1), (50, 0.75), (200, 0), (300, -0.5)], ids=["empty", "short", "even", "longer"]
)
def test_compression_reward_by_hand(memory_tokens, expected):
    got = credit.compression_reward(np.asarray(memory_tokens), np.asarray(200), np.float32)
    np.testing.assert_allclose(got, expected)


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ([[2, 2], [3, 0]], [1, 1, 4, 1]),  # Semantic twice, episodic once.
        ([[1, 1], [3, 0]], [1, 1, 1, 4]),  # The exempt type never wins.
        ([[3, 2], [2, 3]], [1, 1, 4, 1]),  # Of equals the first.
    ],
)
def test_type_factors_by_hand(types, expected):
    is_evidence = np.array([[True, True], [True, types[1][1] != 0]])
    np.testing.assert_allclose(credit.type_factors(np.array(types), is_evidence, 4, 1, 4.0), expected)


def test_type_factors_where_nothing_was_retrieved():
    got = credit.type_factors(np.zeros((2, 2), int), np.zeros((2, 2), bool), 4, 1, 4.0)
    np.testing.assert_allclose(got, [1, 1, 1, 1])


def test_keep_top_by_hand():
    # Of category 0 the better half of three, rounded up: 5 and 3. Of category 1 one of two. The 9 is not valid.
    score = np.array([1.0, 5.0, 3.0, 2.0, 2.0, 9.0])
    got = credit.keep_top(score, np.array([0, 0, 0, 1, 1, 0]), 0.5, np.array([1, 1, 1, 1, 1, 0], bool))
    np.testing.assert_array_equal(got, [False, True, True, True, False, False])


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_keep_top_agrees_with_a_slow_loop(fraction):
    rng = np.random.default_rng(0)
    for n in [1, 2, 17, 100]:
        score, category, valid = rng.integers(0, 5, n) / 4, rng.integers(0, 3, n), rng.random(n) < 0.7
        expected = np.zeros(n, bool)
        for c in range(3):
            places = [i for i in range(n) if category[i] == c and valid[i]]
            ranked = sorted(places, key=lambda i: (-score[i], i))
            expected[ranked[: int(np.ceil(fraction * len(places)))]] = True
        np.testing.assert_array_equal(credit.keep_top(score, category, fraction, valid), expected)


def test_spread_to_tokens_by_hand():
    got = credit.spread_to_tokens(np.array([1.0, 2.0]), np.float32(9), np.array([-1, 0, 0, -1, 1, -1]))
    np.testing.assert_allclose(got, [9, 1, 1, 9, 2, 9])


@pytest.mark.parametrize(
    ("mask", "expected"), [([True, True, False], 2), ([False, False, True], 8), ([False, False, False], 0)]
)
def test_masked_mean(mask, expected):
    assert credit.masked_mean(np.array([1.0, 3.0, 8.0]), np.array(mask)) == expected


@pytest.mark.parametrize("size", [0, 1, 4, 8, 9, 100])
def test_sums_over_short_and_long_axes(size):
    values = np.random.default_rng(0).normal(size=(3, 2, size)).astype(np.float32)
    np.testing.assert_allclose(credit.sum_last(values), values.sum(-1), rtol=1e-5, atol=1e-5)


def test_scatter_under_vmap():
    rng = np.random.default_rng(0)
    worth, slot = rng.normal(size=(4, 3, 5, 2)), rng.integers(0, 6, (4, 3, 5, 2))
    got = jax.vmap(jax.vmap(lambda w, s: credit.scatter(w, s, 6)))(worth, slot)
    for s, g in itertools.product(range(4), range(3)):
        expected = np.bincount(slot[s, g].reshape(-1), worth[s, g].reshape(-1), 6)
        np.testing.assert_allclose(got[s, g], expected, atol=1e-5)


def test_slots_outside_do_not_reach_the_next_rollout():
    worth, slot = np.ones((2, 1, 3), np.float32), np.array([[[0, 2, -1]], [[1, 7, 1]]], np.int32)
    got = jax.vmap(lambda w, s: credit.scatter(w, s, 2))(worth, slot)
    np.testing.assert_allclose(got, [[1, 0], [0, 2]])
