"""Tests of finemem_jax/models/log_probs.py: the same numbers and gradients as with all logits at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finemem_jax.models import log_probs

D, V = 6, 11


def naive(hidden, head, targets, temperature):
    normalised = jax.nn.log_softmax(hidden @ head.T / temperature)
    chosen = normalised[jnp.arange(len(targets)), targets]
    return chosen, -(jnp.exp(normalised) * normalised).sum(-1)


def random_case(n, seed=0):
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(n, D)), rng.normal(size=(V, D))
    return hidden.astype(np.float32), head.astype(np.float32), rng.integers(0, V, n)


def test_log_probs_by_hand():
    # Logits 0, ln 2, ln 5: probabilities 1/8, 2/8, 5/8. Entropy: 1/8 ln 8 + 1/4 ln 4 + 5/8 ln(8/5).
    head = jnp.log(jnp.array([[1.0], [2.0], [5.0]]))
    got, entropy = log_probs.token_log_probs(jnp.ones((3, 1)), head, jnp.arange(3), 1.0)
    np.testing.assert_allclose(got, np.log([1 / 8, 2 / 8, 5 / 8]), rtol=1e-5)
    np.testing.assert_allclose(entropy, np.log(8) / 8 + np.log(4) / 4 + 5 / 8 * np.log(8 / 5), rtol=1e-5)


def test_temperature_by_hand():
    # Temperature 2 halves the logits: 0 and ln 9 become 0 and ln 3, so 1/4 and 3/4 instead of 1/10 and 9/10.
    head = jnp.log(jnp.array([[1.0], [9.0]]))
    for temperature, expected in [(1.0, [1 / 10, 9 / 10]), (2.0, [1 / 4, 3 / 4])]:
        got, _ = log_probs.token_log_probs(jnp.ones((2, 1)), head, jnp.arange(2), temperature)
        np.testing.assert_allclose(np.exp(got), expected, rtol=1e-5)


@pytest.mark.parametrize(("n", "block"), [(1, 4), (5, 4), (8, 4), (7, 256)])
def test_value_and_gradient_agree_with_all_logits_at_once(n, block):
    hidden, head, targets = random_case(n)
    weights = np.random.default_rng(1).normal(size=(2, n))

    def value_and_slopes(function):
        def loss(hidden, head, temperature):
            parts = function(hidden, head, targets, temperature)
            return sum((w * part).sum() for w, part in zip(weights, parts, strict=True)), parts

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

    blocks = value_and_slopes(functools.partial(log_probs.token_log_probs, block=block))
    whole = value_and_slopes(naive)
    for temperature in (0.5, 1.0, 1.7):
        got, expected = (jax.tree.leaves(f(hidden, head, temperature)) for f in (blocks, whole))
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_probabilities_sum_to_one():
    hidden, head, _ = random_case(1)
    got, entropy = log_probs.token_log_probs(np.repeat(hidden, V, axis=0), head, np.arange(V), 1.0)
    np.testing.assert_allclose(np.exp(got).sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(entropy, -(np.exp(got) * got).sum(), rtol=1e-5)


def test_large_logits_do_not_overflow():
    hidden, head, targets = random_case(5)
    got, entropy = log_probs.token_log_probs(hidden * 1e4, head, targets, 1.0)
    assert np.isfinite(got).all()
    assert np.isfinite(entropy).all()
    assert (entropy >= 0).all()
