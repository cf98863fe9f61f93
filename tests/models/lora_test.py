"""Adapters begin as nothing, and merge into what they compute: finemem_jax/models/lora.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import random_batches
from finemem_jax.models import decoder, lora, presets
from finemem_jax.rl import learner
from finemem_jax.rl.grpo import ObjectiveOptions

BASE = presets.preset("tiny")
ADAPTED = dataclasses.replace(BASE, lora=lora.parse(3, 6.0, "query,value,down"))
OPTIONS = learner.LearnerOptions(ADAPTED, decoder.Compute(), ObjectiveOptions())
TOKENS, LENGTHS = np.arange(20).reshape(2, 10), np.array([10, 7])
states = jax.jit(decoder.hidden_states, static_argnums=0)


@pytest.fixture(scope="module")
def base():
    return decoder.init(BASE, 0)


@pytest.fixture(scope="module")
def adapted(base):
    return lora.combine(base, lora.init(ADAPTED, 1))


@pytest.fixture(scope="module")
def trained(adapted):
    """Adapters whose products are not 0 any more."""
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32) if lora.is_adapter(path[-1].key) else x,
        adapted,
    )


def test_an_adapted_model_begins_as_the_model(base, adapted):
    (want,), (got,) = (
        states(BASE, base, [TOKENS], lengths=[LENGTHS]),
        states(ADAPTED, adapted, [TOKENS], lengths=[LENGTHS]),
    )
    np.testing.assert_array_equal(got, want)


def test_merged_adapters_compute_the_same(trained):
    (want,) = states(ADAPTED, trained, [TOKENS], lengths=[LENGTHS])
    (got,) = states(BASE, lora.merge(ADAPTED, trained), [TOKENS], lengths=[LENGTHS])
    np.testing.assert_allclose(got, want, atol=2e-5)
    (without,) = states(BASE, lora.split(trained)[0], [TOKENS], lengths=[LENGTHS])
    assert np.abs(without - want).max() > 0.01


def test_split_and_combine_undo_each_other(trained):
    frozen, adapters = lora.split(trained)
    assert sorted(adapters["layers"]) == [f"{n}_lora_{x}" for n in ("down", "query", "value") for x in "ab"]
    assert set(frozen) == set(trained)
    jax.tree.map(np.testing.assert_array_equal, lora.combine(frozen, adapters), trained)


def test_without_adapters_everything_is_trained(base):
    frozen, everything = lora.split(base)
    assert frozen == {} and everything is base
    assert lora.combine(frozen, everything) is base
    assert lora.merge(BASE, base) is base


def test_an_update_changes_the_adapters_alone(trained):
    frozen, adapters = lora.split(jax.tree.map(jnp.copy, trained))
    before = jax.tree.map(np.asarray, frozen)
    batch = random_batches.make_batch(lora.merge(ADAPTED, trained))
    tx = optax.adam(1e-2)
    state, metrics = learner.update(random_batches.learner_of(tx, OPTIONS, frozen), learner.init(adapters, tx), [batch])
    assert jax.tree.structure(state.params) == jax.tree.structure(lora.split(trained)[1])
    assert metrics["loss/gradient_norm"] > 0
    jax.tree.map(np.testing.assert_array_equal, frozen, before)


def test_the_gradient_is_that_of_the_merged_matrices(trained):
    """By the chain rule: dA = s dW Bᵀ and dB = s Aᵀ dW, where W is the matrix with its adapter merged in."""
    frozen, adapters = lora.split(trained)
    merged = lora.merge(ADAPTED, trained)
    batch = random_batches.make_batch(merged)
    whole = random_batches.accumulated(merged, [batch]).gradients["layers"]
    sums = learner.zero_sums(adapters, options=OPTIONS)
    made = random_batches.learner_of(options=OPTIONS, base_params=frozen)
    got = learner.accumulate(made, adapters, sums, batch).gradients["layers"]
    scale = ADAPTED.lora.alpha / ADAPTED.lora.rank
    for name in ADAPTED.lora.targets:
        a, b = (adapters["layers"][f"{name}_lora_{part}"] for part in "ab")
        slope = scale * whole[name]
        for part, want in (("a", slope @ b.swapaxes(1, 2)), ("b", a.swapaxes(1, 2) @ slope)):
            np.testing.assert_allclose(got[f"{name}_lora_{part}"], want, atol=1e-4 * np.abs(want).max())


def test_settings_are_read():
    assert lora.parse(0, 32, "all") is None
    assert lora.parse(8, 16, "all").targets == presets.MATRICES
    assert lora.parse(8, 16, "down, query").targets == ("query", "down")
    for wrong in ("", "head", "query,q_proj"):
        with pytest.raises(ValueError, match="lora.targets must be 'all', or some of query"):
            lora.parse(8, 16, wrong)
