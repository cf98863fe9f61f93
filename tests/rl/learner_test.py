"""Tests of finemem_jax/rl/learner.py: what an update may depend on, and what it must not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from finemem_jax.config.sections import Optimizer
from finemem_jax.models import decoder, sharding
from finemem_jax.rl import batching, learner
from finemem_jax.rl.grpo import ObjectiveOptions, Rows, aggregation_weights
from random_batches import MODEL, ONE, OPTIONS, accumulated, learner_of, make_batch, random_rows

response_log_probs = jax.jit(learner.response_log_probs, static_argnums=0)
hidden_states = jax.jit(decoder.hidden_states, static_argnames=("config", "compute"))


@pytest.fixture(scope="module")
def params():
    return decoder.init(MODEL, 0)


def relative_change(one, other):
    """‖one - other‖ / ‖other‖ over a whole tree."""
    difference = jax.tree.map(jnp.subtract, one, other)
    return float(optax.global_norm(difference) / optax.global_norm(other))


def joined(first, second):
    """Both batches as one; they have the same shared prefix."""
    whole = jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second)
    return whole._replace(shared_prefix=first.shared_prefix, shared_prefix_length=first.shared_prefix_length)


def test_policy_against_itself_has_ratio_one(params):
    sums = accumulated(params, [make_batch(params)])
    assert float(sums.diagnostics.largest_log_ratio) < 1e-5
    assert float(sums.diagnostics.clipped) == 0


def test_log_probs_equal_those_of_plain_rows(params):
    """Shared prefixes change nothing: each row alone, written out in full, gives the same numbers."""
    batch = make_batch(params, seed=3)
    got, _ = response_log_probs(OPTIONS, params, batch, ONE)
    for r in range(len(batch.suffix)):
        b = r // (len(batch.suffix) // len(batch.group_prefix))
        row = np.concatenate(
            [
                batch.shared_prefix[0],
                batch.group_prefix[b, : batch.group_prefix_length[b]],
                batch.suffix[r, : batch.suffix_length[r]],
            ]
        )
        padded = np.pad(row, (0, 24 - len(row)))
        hidden = hidden_states(MODEL, params, [padded[None]], lengths=[np.array([len(row)])])[0][0, : len(row)]
        log_probs = jax.nn.log_softmax(hidden @ params["embedding"].T)
        count = int(batch.rows.token_mask[r].sum())
        want = np.take_along_axis(np.asarray(log_probs)[-count - 1 : -1], row[-count:, None], axis=1)[:, 0]
        np.testing.assert_allclose(got[r, :count], want, atol=1e-5)


def test_gradient_equals_that_of_plain_rows(params):
    batch = make_batch(params, seed=4)
    tree = accumulated(params, [batch])
    size = len(batch.suffix) // len(batch.group_prefix)
    total = None
    for r in range(len(batch.suffix)):
        b = r // size
        plain = batch._replace(
            group_prefix=batch.group_prefix[b : b + 1],
            group_prefix_length=batch.group_prefix_length[b : b + 1],
            **{
                name: jax.tree.map(lambda x, r=r: x[r : r + 1], getattr(batch, name))
                for name in batching.Batch._fields[4:]
            },
        )
        one = accumulated(params, [plain])
        total = one if total is None else jax.tree.map(jnp.add, total, one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), tree.gradients, total.gradients)


def plain_rows(groups, width=26, response=6):
    """The same rows, each written out in full; padded to one shape."""
    steps = [step for group in groups for step in group.steps]
    rows, n = len(steps), [len(step.completion.ids) for step in steps]
    suffix, responses = np.zeros((rows, width), np.int32), np.zeros((rows, response), np.int32)
    old, advantages = np.zeros((2, rows, response), np.float32)
    given = [values for group in groups for values in group.advantages]
    for r, step in enumerate(steps):
        whole = step.prompt_ids + step.completion.ids
        suffix[r, : len(whole)], responses[r, : n[r]] = whole, step.completion.ids
        old[r, : n[r]], advantages[r, : n[r]] = step.completion.log_probs, given[r]
    starts = np.array([len(step.prompt_ids) for step in steps], np.int32)
    return batching.Batch(
        shared_prefix=np.zeros((1, 0), np.int32), shared_prefix_length=np.zeros(1, np.int32),
        group_prefix=np.zeros((rows, 0), np.int32), group_prefix_length=np.zeros(rows, np.int32),
        suffix=suffix, suffix_length=starts + np.array(n, np.int32), response_start=starts, response=responses,
        rows=Rows(
            token_mask=np.arange(response) < np.array(n)[:, None], advantages=advantages, old_log_probs=old,
            weight=(1 / np.array(n)).astype(np.float32), share=np.ones(rows, np.float32), sampler_log_probs=old,
        ),
    )  # fmt: skip


MORE = [(1, "xla"), (2, "xla"), (3, "xla"), (5, "blocked")]


@pytest.mark.parametrize(
    ("seed", "attention"),
    [(0, "xla"), (4, "blocked"), *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE)],
)
def test_random_trees_have_the_gradients_of_separate_rows(params, seed, attention):
    """However little or much the rows share: the update is the one of rows that are all written out."""
    groups = random_rows(seed)
    packed = batching.microbatches(groups, batching.Packing(len(groups), 4, 6))
    options = learner.LearnerOptions(MODEL, decoder.Compute(attention=attention), ObjectiveOptions())
    shared, plain = accumulated(params, [b for b, _ in packed], options), accumulated(params, [plain_rows(groups)])
    np.testing.assert_allclose(float(shared.objective.numerator), float(plain.objective.numerator), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), shared.gradients, plain.gradients)


def test_split_into_microbatches_changes_nothing(params):
    first, second = make_batch(params, seed=1), make_batch(params, seed=2)
    second = second._replace(shared_prefix=first.shared_prefix)
    both = joined(first, second)
    apart, together = accumulated(params, [first, second]), accumulated(params, [both])
    assert float(apart.objective.denominator) == float(together.objective.denominator)
    assert relative_change(apart.gradients, together.gradients) < 1e-6


def test_padding_groups_change_nothing(params):
    batch = make_batch(params)
    ones = jax.tree.map(np.ones_like, batch)
    nothing = ones.rows._replace(token_mask=np.zeros_like(batch.rows.token_mask), share=np.zeros_like(batch.rows.share))
    padded = joined(batch, ones._replace(rows=nothing))
    a, b = accumulated(params, [batch]), accumulated(params, [padded])
    assert float(a.objective.denominator) == float(b.objective.denominator)
    assert relative_change(a.gradients, b.gradients) < 1e-6


@pytest.mark.parametrize("remat", ["none", "full"])
def test_remat_changes_nothing(params, remat):
    batch = make_batch(params)
    other = learner.LearnerOptions(MODEL, decoder.Compute(remat), ObjectiveOptions())
    a, b = accumulated(params, [batch]), accumulated(params, [batch], other)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a.gradients, b.gradients)


def test_update_raises_what_was_better(params):
    """A small gradient step raises Σ A log π: rows that did better than their group become likelier."""
    batch = make_batch(params, groups=1)
    tx = optax.sgd(1e-2)
    state, metrics = learner.update(learner_of(tx), learner.init(jax.tree.map(jnp.copy, params), tx), [batch])
    new, _ = response_log_probs(OPTIONS, state.params, batch, ONE)
    change = np.where(batch.rows.token_mask, np.asarray(new) - batch.rows.old_log_probs, 0)
    assert (batch.rows.advantages * change / batch.rows.token_mask.sum(1, keepdims=True)).sum() > 0
    assert metrics["loss/gradient_norm"] > 0


def test_no_batch_leaves_the_state_alone(params):
    tx = optax.adam(1e-3)
    state = learner.init(params, tx)
    after, metrics = learner.update(learner_of(tx), state, [])
    assert after is state
    assert metrics == {}


@pytest.mark.parametrize("sizes", [pytest.param((1, 2, 1), marks=pytest.mark.slow), (2, 1, 1), (1, 1, 2)])
def test_sharded_equals_single_device(params, sizes):
    batch = make_batch(params)
    want = accumulated(params, [batch])
    mesh = sharding.make_mesh(*sizes)
    placed = sharding.place(MODEL, params, mesh)
    rows = jax.tree.map(lambda x: jax.device_put(x, sharding.rows(mesh, len(x))), batch)
    got = accumulated(placed, [rows])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got.gradients, want.gradients)


@pytest.mark.parametrize(("aggregation", "kind"), [("stream", "token"), ("row", "sequence")])
def test_every_objective_is_indifferent_to_the_split(params, aggregation, kind):
    objective = ObjectiveOptions(
        dual_clip=3.0, ratio=kind, kl_weight=0.1, kl_estimator="k2", entropy_weight=0.01, importance_cap=2.0
    )
    options = learner.LearnerOptions(MODEL, decoder.Compute(), objective)
    first, second = make_batch(params, seed=1), make_batch(params, seed=2)
    both = joined(first, second._replace(shared_prefix=first.shared_prefix))
    lengths = both.rows.token_mask.sum(1)
    weight, count = aggregation_weights(lengths, np.arange(len(lengths)) // 6, aggregation, constant=6)
    rng = np.random.default_rng(0)
    noise = [rng.normal(0, 0.3, (*lengths.shape, 6)).astype(np.float32) for _ in range(3)]
    rows = both.rows._replace(weight=weight, share=count)
    rows = rows._replace(
        old_log_probs=rows.old_log_probs + noise[0],
        sampler_log_probs=rows.old_log_probs + noise[1],
        reference_log_probs=rows.old_log_probs + noise[2],
    )
    both = both._replace(rows=rows)
    n, b = len(lengths) // 2, len(both.group_prefix) // 2

    def half(batch, low):
        parts = {}
        for name in batching.Batch._fields[2:]:
            size = b if name.startswith("group_prefix") else n
            parts[name] = jax.tree.map(lambda x, size=size: x[low * size : (low + 1) * size], getattr(batch, name))
        return batch._replace(**parts)

    together = accumulated(params, [both], options)
    apart = accumulated(params, [half(both, 0), half(both, 1)], options)
    np.testing.assert_allclose(*(float(sums.objective.denominator) for sums in (together, apart)), rtol=1e-6)
    assert relative_change(apart.gradients, together.gradients) < 1e-6
    np.testing.assert_allclose(float(apart.diagnostics.kl), float(together.diagnostics.kl), rtol=1e-4)


# --------------------------------------------------------------------------------------
# The optimizer: the learning rate of each update, clipping, and weight decay
# --------------------------------------------------------------------------------------

PLAIN = dict(learning_rate=0.1, warmup_steps=4, weight_decay=0.0, b1=0.9, b2=0.999, clip_norm=1e9)


def updates(gradients, params=0.0, **changes):
    """What is added to one parameter, update by update."""
    tx = learner.make_optimizer(Optimizer(**(PLAIN | changes)))
    params = {"w": jnp.asarray(params, jnp.float32)}
    state, found = tx.init(params), []
    for gradient in gradients:
        change, state = tx.update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = optax.apply_updates(params, change)
        found += map(np.asarray, jax.tree.leaves(change))
    return np.array(found)


def test_warm_up_by_hand():
    # Equal gradients make Adam's step exactly the learning rate: 0.1 · 1/5, 2/5, 3/5, 4/5, 1, 1.
    np.testing.assert_allclose(updates([3.0] * 6), [-0.02, -0.04, -0.06, -0.08, -0.1, -0.1], rtol=1e-4)


def test_without_warm_up_the_first_update_has_the_whole_rate():
    np.testing.assert_allclose(updates([3.0, 3.0], warmup_steps=0), [-0.1, -0.1], rtol=1e-4)


def test_clipping_by_hand():
    # (30, 40) has norm 50, (0.3, 0.4) norm 0.5: after clipping to 1 the first is (0.6, 0.8), the second as it was.
    # m = 0.9 · 0.1 g1 + 0.1 g2 and v = 0.999 · 0.001 g1² + 0.001 g2², each divided by its bias correction.
    first, second = np.array([0.6, 0.8]), np.array([0.3, 0.4])
    m = (0.09 * first + 0.1 * second) / (1 - 0.9**2)
    v = (0.000999 * first**2 + 0.001 * second**2) / (1 - 0.999**2)
    got = updates([[30.0, 40.0], [0.3, 0.4]], params=[0.0, 0.0], clip_norm=1.0, warmup_steps=0)
    np.testing.assert_allclose(got[1], -0.1 * m / np.sqrt(v), rtol=1e-4)


def test_clipping_makes_size_irrelevant():
    huge = updates([[3e8, 4e8], [1.0, 0.0]], params=[0.0, 0.0], clip_norm=1.0)
    large = updates([[3.0, 4.0], [1.0, 0.0]], params=[0.0, 0.0], clip_norm=1.0)
    np.testing.assert_allclose(huge, large, rtol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_weight_decay_pulls_towards_zero(weight_decay):
    # No gradient: the update is -rate · decay · w, with rate 0.1 and w = 2.
    got = updates([0.0], params=2.0, warmup_steps=0, weight_decay=weight_decay)
    np.testing.assert_allclose(got, [-0.1 * weight_decay * 2.0], rtol=1e-6)


def test_the_default_settings_are_the_options():
    assert learner.make_optimizer(Optimizer())
