"""Tests of finemem_jax/models/matmul.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finemem_jax.models import linear


@pytest.mark.parametrize("shape", [(7, 3, 5), (7, 5, 3), (2, 7, 4, 4), (0, 3, 5)], ids=str)
def test_slopes_are_those_of_a_plain_product(shape):
    """Whether the states or the outputs are wider, and however many axes the tokens have."""
    *tokens, wide, out = shape
    keys = jax.random.split(jax.random.key(0), 3)
    states = jax.random.normal(keys[0], (*tokens, wide))
    weight = jax.random.normal(keys[1], (wide, out))
    slope = jax.random.normal(keys[2], (*tokens, out))

    def found(product):
        value, pull = jax.vjp(product, states, weight)
        return value, *pull(slope)

    ours, plain = found(linear.project), found(jnp.matmul)
    for a, b in zip(ours, plain, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_slopes_keep_the_types_of_what_they_belong_to():
    states, weight = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5), jnp.bfloat16)
    found = jax.grad(lambda *x: linear.project(*x).astype(jnp.float32).sum(), argnums=(0, 1))(states, weight)
    assert [x.dtype for x in found] == [jnp.bfloat16] * 2


def test_what_is_frozen_costs_nothing():
    """Neither the product nor the states that it would need are in the backward pass."""
    states, weight = jnp.ones((2, 3, 4)), jnp.ones((4, 5))
    text = str(jax.make_jaxpr(jax.grad(lambda x: linear.project(x, weight).sum()))(states))
    assert text.count("dot_general") == 2
    text = str(jax.make_jaxpr(jax.grad(lambda w: linear.project(states, w).sum()))(weight))
    assert text.count("dot_general") == 2


def test_an_output_that_is_not_used():
    states, weight = jnp.ones((2, 4)), jnp.ones((4, 5))
    found = jax.grad(lambda *x: (0 * linear.project(*x)).sum() + x[1].sum(), argnums=(0, 1))(states, weight)
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_array_equal(found[1], 1)
    found = jax.grad(lambda w: (linear.project(states, w), w.sum())[1])(weight)
    np.testing.assert_array_equal(found, 1)
