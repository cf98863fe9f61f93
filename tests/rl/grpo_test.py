"""Tests of finemem_jax/rl/grpo.py: advantages and the clipped objective, by hand and by their laws."""

import functools
import itertools
import math
import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finemem_jax.rl import grpo
from finemem_jax.rl.grpo import Normalizer, ObjectiveOptions, Rows

S, G, T = 5, 4, 3
N, A = 6, 7
CLIP = dict(clip_low=0.2, clip_high=0.28)
AGGREGATIONS = grpo.AGGREGATIONS


class Group(NamedTuple):
    advantages: np.ndarray
    alive: np.ndarray


def group_advantage(rewards, step_mask, normalizer=Normalizer()):  # noqa: B008  It cannot be changed.
    """Compares the rollouts of a stream at the same step: rewards [S, G, T], step_mask [S, T]."""
    mask = np.broadcast_to(step_mask[:, None], rewards.shape)
    advantages, alive = grpo.standardize(rewards, mask, 1, normalizer)
    return Group(np.asarray(advantages), np.asarray(alive[:, 0]))


def float64_advantage(rewards, step_mask, **normalizer):
    """As `rewards.compute` calls it."""
    with jax.enable_x64(True):
        return group_advantage(np.asarray(rewards, np.float64), step_mask, Normalizer(**normalizer))


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
    got = group_advantage(np.array([[[1.0], [2.0], [3.0]]]), np.array([[True]]), Normalizer(epsilon=epsilon))
    np.testing.assert_allclose(got.advantages[0, :, 0], expected, rtol=1e-6)
    assert got.alive.all()


def test_steps_are_compared_apart():
    # Step 0: -1, 0, 1 as above. Step 1, ten times larger: 10 / 10, the same. Step 2: equal, so 0.
    rewards = np.array([[[1.0, 10.0, 5.0], [2.0, 20.0, 5.0], [3.0, 30.0, 5.0]]])
    got = group_advantage(rewards, all_steps(rewards), Normalizer(epsilon=0.0))
    np.testing.assert_allclose(got.advantages[0], [[-1, -1, 0], [0, 0, 0], [1, 1, 0]], atol=1e-6)
    np.testing.assert_array_equal(got.alive, [[True, True, False]])


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
        got = group_advantage(rewards, np.array([[True]]))
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
    got = group_advantage(np.array([[[1.0, 2.0]]]), np.array([[True, True]]))
    assert not got.advantages.any()
    assert not got.alive.any()


# --------------------------------------------------------------------------------------
# Any groups
# --------------------------------------------------------------------------------------


def standardized(x, mask=None, weight=None, axis=-1, **normalizer):
    """As `rewards.compute` calls it."""
    with jax.enable_x64(True):
        x = np.asarray(x, np.float64)
        mask = np.ones(x.shape, bool) if mask is None else mask
        return jax.tree.map(np.asarray, grpo.standardize(x, mask, axis, Normalizer(**normalizer), weight))


def test_standardize_by_hand():
    # Group 0: 1, 2, 3 → -1, 0, 1. Group 1: one entry → 0. Group 2: equal → 0. Group 3: nothing.
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]], bool)
    got, alive = standardized([[1, 2, 3, 99], [7, 8, 8, 8], [4, 9, 4, 9], [5, 6, 7, 8]], mask, epsilon=0.0)
    np.testing.assert_allclose(got, [[-1, 0, 1, 0], [0] * 4, [0] * 4, [0] * 4], atol=1e-12)
    np.testing.assert_array_equal(alive, [[True], [False], [False], [False]])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(ddof=0), 1 / np.sqrt(2 / 3)),
        (dict(scale="none"), 1.0),
        (dict(std_floor=4.0), 0.25),
        (dict(std_floor=0.5), 1.0),  # Below the standard deviation, so of no effect.
        (dict(epsilon=1.0), 0.5),
    ],
)
def test_normalizers_by_hand(settings, expected):
    got, _ = standardized([1, 2, 3], **({"epsilon": 0.0} | settings))
    np.testing.assert_allclose(got, [-expected, 0, expected], atol=1e-12)


def test_weights_count_entries_as_repeats():
    # An entry of weight 2 is like two entries: mean and spread of 0, 0, 3, 3, 3, 9.
    whole = np.array([0, 0, 3, 3, 3, 9.0])
    expected = (np.array([0, 3, 9]) - whole.mean()) / whole.std(ddof=1)
    got, _ = standardized([0, 3, 9], weight=np.array([2.0, 3.0, 1.0]), epsilon=0.0)
    np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize(
    "normalizer",
    [dict(), dict(ddof=0, epsilon=0.01, std_floor=0.8), dict(scale="none")],
    ids=["paper", "careful", "no std"],
)
def test_standardize_agrees_with_numpy_on_random_groups(normalizer):
    """1,000 batches of eight ragged groups of at most six."""
    rng = np.random.default_rng(0)
    shape = (1_000, 8, 6)
    x, weight, mask = (
        rng.normal(size=shape),
        rng.integers(1, 4, shape),
        rng.random(shape) < rng.random(shape[:2])[..., None],
    )
    got, _ = standardized(np.where(mask, x, np.nan), mask, weight.astype(float), **normalizer)
    chosen, expected = Normalizer(**normalizer), np.zeros(shape)
    for at in np.ndindex(shape[:2]):
        held = mask[at]
        if held.sum() > 1:
            # An entry of weight 2 is like two entries.
            repeated = np.repeat(x[at][held], weight[at][held])
            scale = max(repeated.std(ddof=chosen.ddof), chosen.std_floor) + chosen.epsilon
            expected[at][held] = (x[at][held] - repeated.mean()) / (1 if chosen.scale == "none" else scale)
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_group_advantage_agrees_with_the_statistics_module():
    """1,000 streams of 1 to T steps."""
    rng = np.random.default_rng(0)
    rewards, steps = rng.normal(size=(1_000, G, T)), rng.integers(1, T + 1, 1_000)
    rewards[rng.random(1_000) < 0.1] = 0.7  # Streams whose rollouts are all equal.
    got = float64_advantage(rewards, np.arange(T) < steps[:, None])
    expected = np.zeros_like(rewards)
    for s, t in itertools.product(range(1_000), range(T)):
        column = rewards[s, :, t].tolist()
        if t < steps[s] and len(set(column)) > 1:
            mean, std = statistics.fmean(column), statistics.stdev(column)
            expected[s, :, t] = [(r - mean) / (std + 1e-6) for r in column]
    np.testing.assert_allclose(got.advantages, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(got.alive, expected.any(1))


def test_a_stream_can_be_one_group():
    rewards = np.random.default_rng(0).normal(size=(S, G, T))
    got, alive = standardized(rewards, axis=(1, 2))
    flat = rewards.reshape(S, -1)
    expected = (flat - flat.mean(1, keepdims=True)) / (flat.std(1, keepdims=True, ddof=1) + 1e-6)
    np.testing.assert_allclose(got.reshape(S, -1), expected, atol=1e-9)
    assert alive.shape == (S, 1, 1)


def test_unknown_scales_are_refused():
    with pytest.raises(ValueError, match="advantage_scale must be 'std' or 'none', got 'mad'"):
        standardized([1, 2], scale="mad")


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


def rows_of(old, advantages, token_mask, aggregation="token", stream=None, **more):
    token_mask = np.asarray(token_mask)
    stream = np.arange(len(token_mask)) if stream is None else stream
    weight, count = grpo.aggregation_weights(token_mask.sum(1), stream, aggregation, constant=A)
    return Rows(token_mask, advantages, old, weight, count, **more)


@functools.partial(jax.jit, static_argnames="options")
def jitted(log_probs, entropy, rows, options):
    return grpo.clipped_objective(log_probs, entropy, rows, options)


def objective_of(log_probs, old, advantages, token_mask, entropy, aggregation="token", more=None, **options):
    rows = rows_of(old, advantages, token_mask, aggregation, **(more or {}))
    return jitted(log_probs, entropy, rows, ObjectiveOptions(**(CLIP | options)))


def value(log_probs, *rest, **settings):
    objective, _ = objective_of(log_probs, *rest, **settings)
    return objective.numerator / objective.denominator


CLIP_CASES = [
    # Gradients are with respect to log π_θ: ρ A where the ratio counts, 0 where the clip does.
    (1.5, 2.0, 2.56, 0.0),  # min(3, 1.28 * 2): a good token, already likelier: cut
    (1.5, -2.0, -3.0, -3.0),  # min(-3, -2.56): a bad token, likelier: pushed back in full
    (0.5, 2.0, 1.0, 1.0),  # min(1, 0.8 * 2): a good token, less likely: pulled in full
    (0.5, -2.0, -1.6, 0.0),  # min(-1, -1.6): a bad token, already less likely: cut
    (1.25, 2.0, 2.5, 2.5),  # inside the upper clip, though outside the lower's width
    (0.75, -2.0, -1.6, 0.0),  # outside the lower clip, though inside the upper's width
    (1.1, 0.0, 0.0, 0.0),
]


def one_token(rho, advantage, more=None, **options):
    """Value and gradient at one token whose old log-probability is -1; and the diagnostics."""

    def surrogate(log_prob):
        one = np.ones((1, 1), np.float32)
        objective, diagnostics = objective_of(log_prob * one, -one, advantage * one, one > 0, one, more=more, **options)
        return objective.numerator, diagnostics

    (got, diagnostics), slope = jax.value_and_grad(surrogate, has_aux=True)(-1.0 + np.log(rho))
    return float(got), float(slope), diagnostics


@pytest.mark.parametrize("kind", ["token", "sequence"])
@pytest.mark.parametrize(("ratio", "advantage", "expected", "gradient"), CLIP_CASES)
def test_clip_by_hand(ratio, advantage, expected, gradient, kind):
    # A row of one token is a sequence: both ratios are the same there.
    got, slope, diagnostics = one_token(ratio, advantage, ratio=kind)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(slope, gradient, rtol=1e-6)
    assert diagnostics.clipped == (gradient == 0 and advantage != 0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient"),
    [
        (5.0, -2.0, -6.0, 0.0),  # -10 without the second clip; 3 * -2 with it
        (2.0, -2.0, -4.0, -4.0),  # inside it
        (5.0, 2.0, 2.56, 0.0),  # of no effect on good tokens
    ],
)
def test_dual_clip_by_hand(ratio, advantage, expected, gradient):
    got, slope, _ = one_token(ratio, advantage, dual_clip=3.0)
    np.testing.assert_allclose([got, slope], [expected, gradient], rtol=1e-6)


@pytest.mark.parametrize(("advantage", "expected"), [(1.0, 1.0), (-1.0, -4.0)])
def test_a_factor_on_the_unclipped_term_amplifies_punishments_only(advantage, expected):
    # At ratio 1: min(4 A, A) is A for A > 0 and 4 A for A < 0, and so are the slopes.
    got, slope, _ = one_token(1.0, advantage, more=dict(unclipped_factor=np.full((1, 1), 4.0)))
    np.testing.assert_allclose([got, slope], [expected, expected], rtol=1e-6)


def test_sequence_ratio_by_hand():
    # One row of ratios 2 and 1/2: as a sequence 1, so that nothing is clipped, and each token pulls with A / 1.
    old = np.full((1, 2), -1.0)
    log_probs = old + np.log([[2.0, 0.5]])
    arrays = (old, np.full((1, 2), 3.0), np.ones((1, 2), bool), np.zeros((1, 2)))
    got, slope = jax.value_and_grad(lambda x: value(x, *arrays, aggregation="row", ratio="sequence"))(log_probs)
    np.testing.assert_allclose(got, 3.0, rtol=1e-6)
    np.testing.assert_allclose(slope, [[1.5, 1.5]], rtol=1e-6)
    # Ratios 2 and 2: as a sequence 2, clipped for A > 0.
    log_probs = old + np.log([[2.0, 2.0]])
    got, slope = jax.value_and_grad(lambda x: value(x, *arrays, aggregation="row", ratio="sequence"))(log_probs)
    np.testing.assert_allclose(got, 3 * 1.28, rtol=1e-6)
    np.testing.assert_allclose(slope, 0, atol=1e-7)


def test_sequence_ratio_has_gspos_gradient():
    """∇ s A with s = exp(mean of the row's log ratios), taken by differentiating that formula itself."""
    log_probs, old, advantages, token_mask, entropy = batch()
    wide = dict(clip_low=1.0, clip_high=1e6)

    def direct(x):
        log_ratio = jnp.where(token_mask, x - old, 0).sum(1) / np.maximum(token_mask.sum(1), 1)
        return (jnp.exp(log_ratio) * advantages[:, 0] * (token_mask.sum(1) > 0)).sum() / (token_mask.sum(1) > 0).sum()

    got = jax.grad(
        lambda x: value(x, old, advantages, token_mask, entropy, aggregation="row", ratio="sequence", **wide)
    )(log_probs)
    np.testing.assert_allclose(got, jax.grad(direct)(log_probs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "expected", "slope"),
    [
        # log π - log π_ref = ln 2, so d = -ln 2. k2 = (ln 2)²/2, slope ln 2. k3 = 1/2 + ln 2 - 1, slope 1 - 1/2.
        ("k2", np.log(2) ** 2 / 2, np.log(2)),
        ("k3", 0.5 + np.log(2) - 1, 0.5),
    ],
)
def test_kl_in_the_loss_by_hand(estimator, expected, slope):
    more = dict(reference_log_probs=np.full((1, 1), -1.0 - np.log(2), np.float32))
    got, gradient, diagnostics = one_token(1.0, 0.0, more=more, kl_weight=0.1, kl_estimator=estimator)
    np.testing.assert_allclose([got, gradient], [-0.1 * expected, -0.1 * slope], rtol=1e-5)
    np.testing.assert_allclose(diagnostics.kl, 0.5 + np.log(2) - 1, rtol=1e-5)


def test_a_policy_against_itself_has_no_kl():
    _, old, _, token_mask, _ = batch()
    for estimator in ("k2", "k3"):
        assert not grpo.kl_estimate(old, old, estimator, token_mask).any()


def test_kl_estimators_agree_in_the_mean():
    """Over all tokens of two distributions, weighted by π: k3 gives the KL itself, k2 nearly."""
    rng = np.random.default_rng(0)
    log_p, log_q = (jax.nn.log_softmax(0.3 * rng.normal(size=(1, 50))) for _ in range(2))
    kl = float((jnp.exp(log_p) * (log_p - log_q)).sum())
    mean = {
        k: float((jnp.exp(log_p) * grpo.kl_estimate(log_p, log_q, k, np.ones((1, 50), bool))).sum())
        for k in ("k2", "k3")
    }
    assert mean["k3"] == pytest.approx(kl, rel=1e-4)
    assert mean["k2"] == pytest.approx(kl, rel=0.1)


def test_k1_in_the_loss_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"mean over samples is zero.*credit\.kl_weight"):
        ObjectiveOptions(kl_estimator="k1")


def test_k1s_gradient_is_noise():
    """Why it is refused: weighted by π, the slopes of log π - log π_ref add up to 0 whatever the reference."""
    logits = np.random.default_rng(0).normal(size=20)

    def mean_of_k1(x):
        log_p = jax.nn.log_softmax(x)
        weights = jax.lax.stop_gradient(jnp.exp(log_p))
        return (weights * (log_p - np.log(1 / 20))).sum()

    np.testing.assert_allclose(jax.grad(mean_of_k1)(logits), 0, atol=1e-6)


def test_importance_weights_by_hand():
    # π_old / π_sampler = 2, capped at 1.5: the surrogate 3 becomes 4.5; a weight of 1/2 is not capped.
    for sampler, expected in ((-1 - np.log(2), 4.5), (-1 + np.log(2), 1.5)):
        more = dict(sampler_log_probs=np.full((1, 1), sampler, np.float32))
        got, gradient, diagnostics = one_token(1.0, 3.0, more=more, importance_cap=1.5)
        np.testing.assert_allclose(
            [got, gradient, diagnostics.importance], [expected, expected, expected / 3], rtol=1e-5
        )


def test_entropy_bonus_by_hand():
    got, slope, _ = one_token(1.0, 0.0, entropy_weight=0.25)
    assert (got, slope) == (0.25, 0.0)


@pytest.mark.parametrize("bad", [dict(kl_estimator="k4"), dict(ratio="turn"), dict(dual_clip=0.5)])
def test_unknown_objectives_are_refused(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"objective\.{name} must be"):
        ObjectiveOptions(**bad)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("token", 5 / 4), ("row", 2.0), ("stream", 5 / 4), ("constant", 5 / (2 * A))],
)
def test_aggregation_by_hand(aggregation, expected):
    # Ratio 1 throughout. Row 0: three tokens of advantage 1/2; row 1: one of 7/2; row 2: padding.
    # Tokens: (3 * 1/2 + 7/2) / 4 = 5/4. Rows: (1/2 + 7/2) / 2 = 2. All rows are one stream: as tokens.
    # Constant: 5 / (2 rows * A).
    zeros = np.zeros((3, 3))
    advantages = np.array([[0.5] * 3, [3.5] * 3, [9.0] * 3])
    token_mask = np.array([[True, True, True], [True, False, False], [False, False, False]])
    got = value(
        zeros, zeros, advantages, token_mask, zeros, aggregation=aggregation, more=dict(stream=np.array([4, 4, 4]))
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_streams_weigh_the_same():
    # Stream 0 has rows of 3 and 1 tokens, stream 1 one of 2: means 5/4 and 8, together 37/8.
    weight, count = grpo.aggregation_weights(np.array([3, 1, 2, 0]), np.array([0, 0, 1, 1]), "stream", constant=A)
    sums = np.array([1.5, 3.5, 16.0, 0.0])
    np.testing.assert_allclose((weight * sums).sum() / count.sum(), (5 / 4 + 8) / 2, rtol=1e-6)
    assert count.sum() == 2


def test_unknown_aggregation_is_refused():
    with pytest.raises(
        ValueError, match=r"objective\.aggregation must be one of row, token, stream, constant; got 'batch'"
    ):
        grpo.aggregation_weights(np.array([1]), np.array([0]), "batch", constant=A)


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


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up(aggregation):
    log_probs, old, advantages, token_mask, entropy = batch()
    rows = rows_of(old, advantages, token_mask, aggregation, stream=np.arange(N) // 2)

    def sums(x, entropy, rows):
        return jitted(x, entropy, rows, ObjectiveOptions(**CLIP))[0]

    whole, whole_slope = jax.value_and_grad(lambda x: sums(x, entropy, rows).numerator)(log_probs)
    for split in ([3, 3], [1, 2, 3], [2, 1, 1, 2]):
        ends = np.cumsum(split)
        cuts = [slice(end - n, end) for n, end in zip(split, ends, strict=True)]
        parts = [jax.tree.map(lambda a, cut=cut: a[cut], (log_probs, entropy, rows)) for cut in cuts]
        np.testing.assert_allclose(sum(sums(*part).numerator for part in parts), whole, rtol=1e-5)
        total = sum(sums(*part).denominator for part in parts)
        np.testing.assert_allclose(total, sums(log_probs, entropy, rows).denominator, rtol=1e-6)
        slopes = [jax.grad(lambda x, rest: sums(x, *rest).numerator)(part[0], part[1:]) for part in parts]
        np.testing.assert_allclose(np.concatenate(slopes), whole_slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("aggregation", ["token", "row"])
def test_masked_tokens_change_nothing(aggregation):
    *arrays, token_mask, entropy = batch()
    more = dict(reference_log_probs=arrays[1] - 0.1, sampler_log_probs=arrays[1] + 0.1)
    options = dict(aggregation=aggregation, kl_weight=0.1, importance_cap=2.0, ratio="sequence")
    expected, expected_slope = jax.value_and_grad(functools.partial(value, more=more, **options))(
        *arrays, token_mask, entropy
    )
    spoilt = [np.where(token_mask, x, np.nan) for x in arrays]
    spoilt_more = {name: np.where(token_mask, x, np.nan) for name, x in more.items()}
    spoilt_entropy = np.where(token_mask, entropy, np.nan)
    got, slope = jax.value_and_grad(functools.partial(value, more=spoilt_more, **options))(
        *spoilt, token_mask, spoilt_entropy
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-6)
    _, diagnostics = objective_of(
        *spoilt, token_mask=token_mask, entropy=spoilt_entropy, more=spoilt_more, kl_weight=0.1
    )
    assert all(np.isfinite(x) for x in diagnostics)


def test_diagnostics_by_hand():
    # Two trained tokens with ρ = 2 (A = 1: cut) and ρ = 1/2 (A = 1: not cut), entropies 1 and 3; one masked token.
    # log ratios: ln 2 and -ln 2, so they sum to 0 and their absolute values to 2 ln 2. No reference, no correction.
    old = np.array([[-1.0, -1.0, -1.0]])
    log_probs = old + np.log([[2.0, 0.5, 8.0]])
    token_mask = np.array([[True, True, False]])
    _, got = objective_of(log_probs, old, np.ones((1, 3)), token_mask, np.array([[1.0, 3.0, 9.0]]))
    expected = grpo.Diagnostics(2, 1, 0, 2 * np.log(2), np.log(2), 4, 0, 2)
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=1e-6, atol=1e-6)


def test_diagnostics_carry_no_gradient():
    arrays = batch()
    slope = jax.grad(lambda x: sum(objective_of(x, *arrays[1:])[1]))(arrays[0])
    assert not slope.any()


def test_nothing_to_train_on_is_zero_over_zero_tokens():
    log_probs, old, advantages, token_mask, entropy = batch()
    for aggregation in AGGREGATIONS:
        objective, diagnostics = objective_of(log_probs, old, advantages, token_mask & False, entropy, aggregation)
        assert objective.numerator == objective.denominator == diagnostics.tokens == 0


# --------------------------------------------------------------------------------------
# The objective again, one token at a time
# --------------------------------------------------------------------------------------


def slow_token(log_prob, entropy, old, sampler, reference, advantage, factor, row_log_ratio, options):
    """(what one token adds to the objective, its slope by the token's own log π_θ, whether the clip cut it)."""
    ratio = math.exp(log_prob - old if options.ratio == "token" else row_log_ratio)
    low, high = 1 - options.clip_low, 1 + options.clip_high
    plain = factor * ratio * advantage
    # Each candidate with its slope: dρ = ρ d log π_θ; a clipped ratio has none.
    held = (ratio * advantage, ratio * advantage) if low < ratio < high else (min(max(ratio, low), high) * advantage, 0)
    gain, slope = min((plain, plain), held)
    if options.dual_clip and advantage < 0 and gain < options.dual_clip * advantage:
        gain, slope = options.dual_clip * advantage, 0.0
    cut = gain != plain
    weight = min(math.exp(old - sampler), options.importance_cap) if options.importance_cap else 1.0
    d = log_prob - reference
    kl, kl_slope = (d * d / 2, d) if options.kl_estimator == "k2" else (math.exp(-d) + d - 1, 1 - math.exp(-d))
    value = weight * gain - options.kl_weight * kl + options.entropy_weight * entropy
    return value, weight * slope - options.kl_weight * kl_slope, cut


def slow_average(values, streams, aggregation, longest):
    """The mean of ragged rows, each a list of its tokens' values; rows without tokens are no rows."""
    used = [(row, stream) for row, stream in zip(values, streams, strict=True) if row]
    if not used:
        return 0.0
    if aggregation == "token":
        return statistics.fmean(value for row, _ in used for value in row)
    if aggregation == "row":
        return statistics.fmean(statistics.fmean(row) for row, _ in used)
    if aggregation == "constant":
        return sum(sum(row) for row, _ in used) / (len(used) * longest)
    by_stream = {}
    for row, stream in used:
        by_stream.setdefault(stream, []).extend(row)
    return statistics.fmean(statistics.fmean(tokens) for tokens in by_stream.values())


BATCHES, FEW_ROWS, FEW_TOKENS = 1_000, 4, 5


@pytest.fixture(scope="module")
def ragged_batches():
    """1,000 batches of rows of 0 to 5 tokens, at one shape, so that each objective is compiled once."""
    rng = np.random.default_rng(0)
    shape = (BATCHES, FEW_ROWS, FEW_TOKENS)
    old = -rng.exponential(size=shape)
    length = rng.integers(0, FEW_TOKENS + 1, shape[:2])
    return dict(
        log_probs=old + 0.3 * rng.normal(size=shape),
        entropy=rng.uniform(size=shape),
        old=old,
        sampler=old + 0.2 * rng.normal(size=shape),
        reference=old + 0.3 * rng.normal(size=shape),
        advantages=rng.normal(size=shape),
        factor=rng.choice([1.0, 4.0], shape),
        length=length,
        stream=rng.integers(0, 2, shape[:2]),
    )


@pytest.mark.parametrize(
    "options",
    [
        dict(clip_low=0.2, clip_high=0.2),
        dict(clip_low=0.2, clip_high=0.28, dual_clip=1.5),
        dict(clip_low=0.05, clip_high=0.1, ratio="sequence", dual_clip=1.2),
        dict(kl_weight=0.3, kl_estimator="k3", entropy_weight=0.1),
        dict(kl_weight=0.3, kl_estimator="k2", ratio="sequence"),
        dict(importance_cap=1.1, dual_clip=3.0, kl_weight=0.2),
    ],
    ids=lambda options: " ".join(options),
)
def test_agrees_with_a_slow_loop(ragged_batches, options):
    """Value, slope and clipped tokens of every batch, under all four aggregations."""
    x, chosen = ragged_batches, ObjectiveOptions(**options)
    token_mask = np.arange(FEW_TOKENS) < x["length"][..., None]
    spoilt = {name: np.where(token_mask, a, np.nan) for name, a in x.items() if a.shape == token_mask.shape}

    def objective(log_probs, entropy, rows):
        (numerator, denominator), diagnostics = grpo.clipped_objective(log_probs, entropy, rows, chosen)
        return numerator / jnp.maximum(denominator, 1e-9), diagnostics

    batched = jax.jit(jax.vmap(jax.value_and_grad(objective, has_aux=True)))
    got, diagnostics = {}, None
    for aggregation in AGGREGATIONS:
        averaged = [
            grpo.aggregation_weights(*rows, aggregation, constant=FEW_TOKENS)
            for rows in zip(x["length"], x["stream"], strict=True)
        ]
        weight, count = (np.stack(part).astype(float) for part in zip(*averaged, strict=True))
        fixed = [spoilt[name] for name in ("sampler", "reference", "factor")]
        rows = Rows(token_mask, spoilt["advantages"], spoilt["old"], weight, count, *fixed)
        with jax.enable_x64(True):
            (value, diagnostics), slope = batched(spoilt["log_probs"], spoilt["entropy"], rows)
        got[aggregation] = np.asarray(value), np.asarray(slope)
    means, slopes, cuts = {name: np.zeros(BATCHES) for name in AGGREGATIONS}, np.zeros_like(x["old"]), np.zeros(BATCHES)
    for b in range(BATCHES):
        tokens = [slow_row(x, (b, row), chosen) for row in range(FEW_ROWS)]
        cuts[b] = sum(cut for row in tokens for _, _, cut in row)
        for aggregation in AGGREGATIONS:
            values = [[value for value, _, _ in row] for row in tokens]
            means[aggregation][b] = slow_average(values, x["stream"][b], aggregation, FEW_TOKENS)
        for row, one in enumerate(tokens):
            slopes[b, row, : len(one)] = [slope / x["length"][b].sum() for _, slope, _ in one]
    assert diagnostics is not None
    np.testing.assert_array_equal(diagnostics.clipped, cuts)
    for aggregation in AGGREGATIONS:
        # The weights are float32.
        np.testing.assert_allclose(got[aggregation][0], means[aggregation], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got["token"][1], slopes, rtol=1e-6, atol=1e-9)


def slow_row(x, at, options):
    n = x["length"][at]
    names = ("log_probs", "entropy", "old", "sampler", "reference", "advantages", "factor")
    tokens = list(zip(*(x[name][at][:n].tolist() for name in names), strict=True))
    row_log_ratio = statistics.fmean(token[0] - token[2] for token in tokens) if tokens else 0.0
    return [slow_token(*token, row_log_ratio=row_log_ratio, options=options) for token in tokens]
