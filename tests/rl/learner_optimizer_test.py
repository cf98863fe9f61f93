"""Tests of finemem_jax/optimizer.py: the learning rate of each update, clipping, and weight decay."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from finemem_jax.config.sections import Optimizer
from finemem_jax.rl import learner

PLAIN = dict(learning_rate=0.1, warmup_steps=4, weight_decay=0.0, b1=0.9, b2=0.999, clip_norm=1e9)


def updates(gradients, params=0.0, **changes):
    """What is added to one parameter, update by update."""
    tx = learner.make_optimizer(Optimizer(**(PLAIN | changes)))
    params = {"w": jnp.asarray(params, jnp.float32)}
    state, found = tx.init(params), []
    for gradient in gradients:
        step, state = tx.update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = optax.apply_updates(params, step)
        found.append(np.asarray(step["w"]))
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
