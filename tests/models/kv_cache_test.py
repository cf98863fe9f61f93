"""Tests of finemem_jax/models/kv_cache.py: rows that grow token by token are rows computed at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finemem_jax.models import decoder, kv_cache, presets, sharding
from finemem_jax.models.kv_cache import Context, NewTokens

from slow_llama import as_checkpoint, cached_rows, extend, slow_hidden, strong_params  # isort: skip

TINY = presets.preset("tiny")


@pytest.fixture(scope="module")
def params():
    return strong_params(TINY)


@pytest.fixture(scope="module")
def paths():
    rng = np.random.default_rng(1)
    return [rng.integers(0, TINY.vocab_size, length) for length in (14, 16, 13, 17)]


@pytest.fixture(scope="module")
def rows(params, paths):
    return [slow_hidden(TINY, as_checkpoint(params), ids) for ids in paths]


@pytest.mark.parametrize(("prefix_tokens", "num_prefilled"), [(0, 4), (7, 4)])
def test_extend_agrees_with_numpy(params, paths, rows, prefix_tokens, num_prefilled):
    got = cached_rows(TINY, params, paths[1], num_prefilled, prefix_tokens)
    np.testing.assert_allclose(got, rows[1], rtol=0, atol=1e-4)


def test_extend_takes_rows_of_different_lengths(params, paths, rows):
    # Prefill all paths in one call, then append one token to each at its own place.
    lengths = np.array([len(ids) for ids in paths])
    tokens = np.stack([np.pad(ids[:-1], (0, 20 - len(ids)), constant_values=9) for ids in paths])
    cache, shared_prefix = kv_cache.empty(TINY, len(tokens), 24), kv_cache.empty(TINY, 1, 0)
    weights = kv_cache.layout(TINY, params, "float32")
    context = Context(weights, shared_prefix, jnp.asarray(0))
    _, cache = extend(TINY, context, cache, new=NewTokens(tokens, jnp.zeros(4, jnp.int32)))
    last = np.array([ids[-1:] for ids in paths])
    states, _ = extend(TINY, context, cache, new=NewTokens(last, lengths - 1))
    np.testing.assert_allclose(states[:, 0], [row[-1] for row in rows], rtol=0, atol=1e-4)


def test_attention_in_blocks_of_tokens_is_attention_at_once(params, monkeypatch):
    weights = kv_cache.layout(TINY, params, "float32")
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12) + 100
    cache = jax.tree.map(lambda x: x + 0.1, kv_cache.empty(TINY, 2, 16))
    shared_prefix = jax.tree.map(lambda x: x + 0.2, kv_cache.empty(TINY, 1, 5))

    def extended():
        return kv_cache.extend(TINY, Context(weights, shared_prefix, 4), cache, new=NewTokens(tokens, np.array([0, 3])))

    whole = extended()
    monkeypatch.setattr(kv_cache, "_QUERY_BLOCK", 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), extended(), whole)


def test_an_empty_cache_shares_no_buffer():
    # Donating one array twice is an error that shows on accelerators first.
    leaves = jax.tree.leaves(kv_cache.empty(TINY, 2, 4))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves) == 2 * TINY.num_layers


def test_the_layout_is_a_copy(params):
    """Training gives its arrays away; a sampler's must stay."""
    own = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    laid_out = jax.tree.leaves(kv_cache.layout(TINY, params, "float32"))
    assert own.isdisjoint(leaf.unsafe_buffer_pointer() for leaf in laid_out)
    assert sum(leaf.size for leaf in laid_out) == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("whole", [True, False])
def test_places_on_a_mesh(params, whole):
    """Split along "tensor" always, along "fsdp" only where weights are to stay in parts."""
    mesh = sharding.make_mesh(1, 2, 1, devices=jax.devices()[:2])
    placed = jax.device_put(kv_cache.layout(TINY, params, "float32"), kv_cache.shardings(TINY, mesh, whole=whole))
    gate = placed[1][0]["gate"]
    assert gate.shape == (TINY.mlp_dim, TINY.embed_dim)
    assert gate.addressable_shards[0].data.shape == (TINY.mlp_dim, TINY.embed_dim // (1 if whole else 2))
    assert decoder.abstract_params(TINY)["layers"]["gate"].shape[1:] == gate.shape[::-1]


def test_int8_rounds_by_at_most_half_a_step(params):
    exact, (_, layers) = kv_cache.layout(TINY, params, "float32"), kv_cache.layout(TINY, params, "float32", int8=True)
    for plain, rounded in zip(exact[1], layers, strict=True):
        assert {name for name, leaf in rounded.items() if isinstance(leaf, kv_cache.Int8)} == {
            name for name, leaf in plain.items() if leaf.ndim == 2
        }
        gate, values = np.asarray(plain["gate"]), rounded["gate"]
        assert values.values.dtype == np.int8 and values.values.shape == gate.shape
        step = np.abs(gate).max(1) / 127
        error = np.abs(np.asarray(values.values) * np.asarray(values.scale)[:, None] - gate)
        assert (error <= step[:, None] * 0.501).all() and error.max() > 0
        assert plain["attention_norm"] is not None and rounded["attention_norm"].dtype == np.float32


def test_int8_states_are_close(params, paths, rows):
    """Against the exact states: wrong by a few hundredths of their size, and not by none."""
    weights = kv_cache.layout(TINY, params, "float32", int8=True)
    cache, shared_prefix = kv_cache.empty(TINY, 1, 24), kv_cache.empty(TINY, 1, 0)
    new = NewTokens(paths[1][None], np.zeros(1, np.int32))
    states, _ = extend(TINY, Context(weights, shared_prefix, jnp.int32(0)), cache, new=new)
    error = np.abs(np.asarray(states[0]) - rows[1]).mean() / np.abs(rows[1]).mean()
    assert 1e-4 < error < 0.05
