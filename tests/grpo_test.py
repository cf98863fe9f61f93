"""Tests of finemem_jax/grpo.py: advantages and the clipped objective, by hand and by their laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finemem_jax import grpo

S, G, T = 5, 4, 3
N, A = 6, 7
CLIP = dict(clip_low=0.2, clip_high=0.28)


def float64_advantage(rewards, step_mask, epsilon=1e-6):
    """As `rewards.judge` calls it."""
    with jax.enable_x64(True):
        group = grpo.group_advantage(np.asarray(rewards, np.float64), step_mask, np.float64(epsilon))
        return jax.tree.map(np.asarray, group)


def all_steps(rewards):
    return np.ones((rewards.shape[0], rewards.shape[2]), bool)


@pytest.fixture
def rewards():
    return np.random.default_rng(0).normal(size=(S, G, T))


# --------------------------------------------------------------------------------------
# Advantages
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epsilon", "expected"), [(0.0, [-1, 0, 1]), (1.0, [-0.5, 0, 0.5])])
def test_advantage_by_hand(epsilon, expected):
    # Rewards 1, 2, 3: mean 2, std sqrt((1 + 0 + 1) / (3 - 1)) = 1; divided by 1 + ε. (ddof 0 would give 0.816.)
    got = grpo.group_advantage(np.array([[[1.0], [2.0], [3.0]]]), np.array([[True]]), epsilon)
    np.testing.assert_allclose(got.advantages[0, :, 0], expected, rtol=1e-6)
    assert got.alive.all()


def test_steps_are_compared_apart():
    # Step 0: -1, 0, 1 as above. Step 1, ten times larger: 10 / 10, the same. Step 2: equal, so 0.
    rewards = np.array([[[1.0, 10.0, 5.0], [2.0, 20.0, 5.0], [3.0, 30.0, 5.0]]])
    got = grpo.group_advantage(rewards, all_steps(rewards), 0.0)
    np.testing.assert_allclose(got.advantages[0], [[-1, -1, 0], [0, 0, 0], [1, 1, 0]], atol=1e-6)
    np.testing.assert_array_equal(got.alive, [[True, True, False]])


def test_agrees_with_numpy(rewards):
    got = float64_advantage(rewards, all_steps(rewards))
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True, ddof=1) + 1e-6)
    np.testing.assert_allclose(got.advantages, expected, rtol=0, atol=1e-12)


def test_advantages_sum_to_zero(rewards):
    got = float64_advantage(rewards, all_steps(rewards))
    np.testing.assert_allclose(got.advantages.sum(1), 0, atol=1e-12)
    assert got.alive.all()


@pytest.mark.parametrize("constant", [-3.0, 0.5, 1000.0])
def test_adding_a_constant_changes_nothing(rewards, constant):
    expected = float64_advantage(rewards, all_steps(rewards))
    got = float64_advantage(rewards + constant, all_steps(rewards))
    np.testing.assert_allclose(got.advantages, expected.advantages, rtol=0, atol=1e-10)


def test_permuting_a_group_permutes_its_advantages(rewards):
    order = [3, 1, 0, 2]
    expected = float64_advantage(rewards, all_steps(rewards)).advantages[:, order]
    got = float64_advantage(rewards[:, order], all_steps(rewards)).advantages
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("dtype", "ulp"), [(np.float32, 2**-23), (np.float64, 2**-52)])
@pytest.mark.parametrize("level", [0.0, 0.1, -0.7, 2.5, 1000.0])
def test_equal_rewards_give_exactly_zero(dtype, ulp, level):
    # Sums of the same parts in another order differ in their last digits; without care their advantages are ±1.
    noise = level * ulp * np.array([0, 1, -1, 3])
    rewards = (level + noise).astype(dtype).reshape(1, G, 1)
    with jax.enable_x64(dtype == np.float64):
        got = grpo.group_advantage(rewards, np.array([[True]]))
        assert got.advantages.dtype == dtype
        np.testing.assert_array_equal(np.asarray(got.advantages), 0)
        assert not got.alive.any()


def test_small_differences_count():
    # A spread of 0.001 is a hundredth of r_comp's weight, and real: the advantages are as large as any.
    rewards = 2.0 + 0.001 * np.array([1.0, 2.0, 3.0]).reshape(1, 3, 1)
    got = float64_advantage(rewards, np.array([[True]]), epsilon=1e-9)
    np.testing.assert_allclose(got.advantages[0, :, 0], [-1, 0, 1], atol=1e-5)


@pytest.mark.parametrize("garbage", [7.0, np.nan, np.inf])
def test_masked_steps_get_zero(rewards, garbage):
    step_mask = np.arange(T) < np.array([[1], [2], [3], [3], [1]])
    expected = float64_advantage(rewards, all_steps(rewards))
    spoilt = np.where(step_mask[:, None], rewards, garbage * np.arange(1, G + 1)[None, :, None])
    got = float64_advantage(spoilt, step_mask)
    np.testing.assert_array_equal(got.advantages, np.where(step_mask[:, None], expected.advantages, 0))
    np.testing.assert_array_equal(got.alive, step_mask)


def test_a_group_of_one_teaches_nothing():
    got = grpo.group_advantage(np.array([[[1.0, 2.0]]]), np.array([[True, True]]))
    assert not got.advantages.any()
    assert not got.alive.any()


# --------------------------------------------------------------------------------------
# The clipped objective
# --------------------------------------------------------------------------------------


def batch(seed=0):
    """Log-probabilities of two policies, advantages, and a mask with rows of all lengths, one of them 0."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(size=(N, A))
    log_probs = old + 0.3 * rng.normal(size=(N, A))
    advantages = np.repeat(rng.normal(size=(N, 1)), A, axis=1)
    token_mask = np.arange(A) < np.array([[7], [3], [0], [1], [5], [2]])
    return log_probs, old, advantages, token_mask, rng.uniform(size=(N, A))


@functools.partial(jax.jit, static_argnames="aggregation")
def objective_of(log_probs, old, advantages, token_mask, entropy, aggregation="token"):
    return grpo.clipped_objective(log_probs, old, advantages, token_mask, entropy, aggregation=aggregation, **CLIP)


def value(log_probs, *rest, **settings):
    objective, _ = objective_of(log_probs, *rest, **settings)
    return objective.numerator / objective.denominator


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient"),
    [
        # Gradients are with respect to log π_θ: ρ A where the ratio counts, 0 where the clip does.
        (1.5, 2.0, 2.56, 0.0),  # min(3, 1.28 * 2): a good token, already likelier: cut
        (1.5, -2.0, -3.0, -3.0),  # min(-3, -2.56): a bad token, likelier: pushed back in full
        (0.5, 2.0, 1.0, 1.0),  # min(1, 0.8 * 2): a good token, less likely: pulled in full
        (0.5, -2.0, -1.6, 0.0),  # min(-1, -1.6): a bad token, already less likely: cut
        (1.25, 2.0, 2.5, 2.5),  # inside the upper clip, though outside the lower's width
        (0.75, -2.0, -1.6, 0.0),  # outside the lower clip, though inside the upper's width
        (1.1, 0.0, 0.0, 0.0),
    ],
)
def test_clip_by_hand(ratio, advantage, expected, gradient):
    def surrogate(log_prob):
        one = jnp.ones((1, 1))
        objective, diagnostics = objective_of(log_prob * one, -one, advantage * one, one > 0, one)
        return objective.numerator, diagnostics

    (got, diagnostics), slope = jax.value_and_grad(surrogate, has_aux=True)(-1.0 + np.log(ratio))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(slope, gradient, rtol=1e-6)
    assert diagnostics.clipped == (gradient == 0 and advantage != 0)


@pytest.mark.parametrize(("aggregation", "expected"), [("token", 5 / 4), ("row", 2.0)])
def test_aggregation_by_hand(aggregation, expected):
    # Ratio 1 throughout. Row 0: three tokens of advantage 1/2; row 1: one of 7/2; row 2: padding.
    # Tokens: (3 * 1/2 + 7/2) / 4 = 5/4. Rows: (1/2 + 7/2) / 2 = 2.
    zeros = np.zeros((3, 3))
    advantages = np.array([[0.5] * 3, [3.5] * 3, [9.0] * 3])
    token_mask = np.array([[True, True, True], [True, False, False], [False, False, False]])
    got = value(zeros, zeros, advantages, token_mask, zeros, aggregation=aggregation)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_policy_against_itself_has_ratio_one():
    _, old, advantages, token_mask, entropy = batch()
    for aggregation in ("token", "row"):
        objective, diagnostics = objective_of(old, old, advantages, token_mask, entropy, aggregation)
        per_row = np.where(token_mask, advantages, 0).sum(1)
        lengths = token_mask.sum(1)
        rows = per_row / (np.maximum(lengths, 1) if aggregation == "row" else 1)
        np.testing.assert_allclose(objective.numerator, rows.sum(), rtol=1e-5)
        assert diagnostics.clipped == diagnostics.log_ratio == diagnostics.largest_log_ratio == 0


def test_gradient_at_the_sampling_policy_is_the_advantage():
    # "row": A / (length * rows that exist); "token": A / tokens. Nothing at masked tokens.
    _, old, advantages, token_mask, entropy = batch()
    lengths = token_mask.sum(1, keepdims=True)
    expected = {
        "row": advantages / np.maximum(lengths, 1) / (lengths > 0).sum(),
        "token": advantages / token_mask.sum(),
    }
    for aggregation, slopes in expected.items():
        got = jax.grad(value)(old, old, advantages, token_mask, entropy, aggregation=aggregation)
        np.testing.assert_allclose(got, np.where(token_mask, slopes, 0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("aggregation", ["token", "row"])
def test_micro_batches_add_up(aggregation):
    arrays = batch()

    def sums(*rows):
        objective, _ = objective_of(*rows, aggregation=aggregation)
        return objective

    whole, whole_slope = jax.value_and_grad(lambda x: sums(x, *arrays[1:]).numerator)(arrays[0])
    for split in ([3, 3], [1, 2, 3], [2, 1, 1, 2]):
        ends = np.cumsum(split)
        parts = [[a[end - n : end] for a in arrays] for n, end in zip(split, ends, strict=True)]
        np.testing.assert_allclose(sum(sums(*part).numerator for part in parts), whole, rtol=1e-5)
        assert sum(sums(*part).denominator for part in parts) == sums(*arrays).denominator
        slopes = [jax.grad(lambda x, rest: sums(x, *rest).numerator)(part[0], part[1:]) for part in parts]
        np.testing.assert_allclose(np.concatenate(slopes), whole_slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("aggregation", ["token", "row"])
def test_masked_tokens_change_nothing(aggregation):
    *arrays, token_mask, entropy = batch()
    call = functools.partial(value, aggregation=aggregation)
    expected, expected_slope = jax.value_and_grad(call)(*arrays, token_mask, entropy)
    spoilt = [np.where(token_mask, x, np.nan) for x in arrays]
    spoilt_entropy = np.where(token_mask, entropy, np.nan)
    got, slope = jax.value_and_grad(call)(*spoilt, token_mask, spoilt_entropy)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-6)
    _, diagnostics = objective_of(*spoilt, token_mask, spoilt_entropy)
    assert all(np.isfinite(x) for x in diagnostics)


def test_diagnostics_by_hand():
    # Two trained tokens with ρ = 2 (A = 1: cut) and ρ = 1/2 (A = 1: not cut), entropies 1 and 3; one masked token.
    # log ratios: ln 2 and -ln 2, so they sum to 0 and their absolute values to 2 ln 2.
    old = np.array([[-1.0, -1.0, -1.0]])
    log_probs = old + np.log([[2.0, 0.5, 8.0]])
    token_mask = np.array([[True, True, False]])
    _, got = objective_of(log_probs, old, np.ones((1, 3)), token_mask, np.array([[1.0, 3.0, 9.0]]))
    expected = grpo.Diagnostics(2, 1, 0, 2 * np.log(2), np.log(2), 4)
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=1e-6, atol=1e-6)


def test_diagnostics_carry_no_gradient():
    arrays = batch()
    slope = jax.grad(lambda x: sum(objective_of(x, *arrays[1:])[1]))(arrays[0])
    assert not slope.any()


def test_nothing_to_train_on_is_zero_over_zero_tokens():
    log_probs, old, advantages, token_mask, entropy = batch()
    for aggregation in ("token", "row"):
        objective, diagnostics = objective_of(log_probs, old, advantages, token_mask & False, entropy, aggregation)
        assert objective.numerator == objective.denominator == diagnostics.tokens == 0


def test_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match=r"objective\.aggregation must be 'token' or 'row', got 'stream'"):
        value(*batch(), aggregation="stream")
