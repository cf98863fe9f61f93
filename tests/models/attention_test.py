"""Tests of finemem_jax/models/attention.py: by hand, and against softmax attention over one row of keys."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finemem_jax.models import attention
from finemem_jax.models.attention import Level, Segment

N, L, H, K, C = 4, 3, 6, 2, 5

attend = jax.jit(attention.attend)


def slow_attention(queries, segments):
    """One query at a time, over the keys of all segments in one list; float64."""
    out = np.zeros(queries.shape)
    for n, i, h in np.ndindex(queries.shape[:3]):
        logits, values = [], []
        for keys, vals, mask in segments:
            m, k = n // (len(queries) // len(keys)), h // (queries.shape[2] // keys.shape[1])
            seen = np.broadcast_to(mask, (len(queries), queries.shape[1], keys.shape[3]))[n, i]
            logits += list(keys[m, k][:, seen].T.astype(np.float64) @ queries[n, i, h] / np.sqrt(queries.shape[3]))
            values += list(vals[m, k, seen])
        weights = np.exp(np.array(logits) - max(logits))
        out[n, i, h] = weights @ np.array(values) / weights.sum()
    return out


def random_segment(rng, rows, num_keys, mask_shape, density=0.6):
    keys, values = rng.normal(size=(2, rows, K, num_keys, C)).astype(np.float32)
    return Segment(keys.swapaxes(2, 3), values, rng.random((*mask_shape, num_keys)) < density)


def own_segment(rng, num_keys=L):
    """Each row's own keys, causal, so that every query sees something."""
    keys, values = rng.normal(size=(2, N, K, num_keys, C)).astype(np.float32)
    return Segment(keys.swapaxes(2, 3), values, np.tril(np.ones((1, L, num_keys), bool)))


def random_queries(rng):
    return rng.normal(size=(N, L, H, C)).astype(np.float32)


@pytest.mark.parametrize("split", [False, True], ids=["one segment", "two segments"])
def test_attention_by_hand(split):
    # C=4. One query (2, 0, 0, 0), keys (0, 1, 0, 0) and (ln 3, 0, 0, 0): logits 0 and 2 ln 3 / sqrt(4) = ln 3, so
    # weights 1/4 and 3/4 of the values 8 and 4: 2 + 3 = 5.
    queries = jnp.array([2.0, 0, 0, 0]).reshape(1, 1, 1, 4)
    keys = jnp.array([[0.0, 1, 0, 0], [np.log(3), 0, 0, 0]]).reshape(1, 1, 2, 4).swapaxes(2, 3)
    values = jnp.array([[8.0] * 4, [4.0] * 4]).reshape(1, 1, 2, 4)
    mask = jnp.ones((1, 1, 2), bool)
    segments = [Segment(keys, values, mask)]
    if split:
        segments = [Segment(keys[..., i : i + 1], values[:, :, i : i + 1], mask[..., :1]) for i in range(2)]
    np.testing.assert_allclose(attend(queries, segments), np.full((1, 1, 1, 4), 5.0), rtol=1e-6)


@pytest.mark.parametrize("mask_shape", [(1, 1), (1, L), (N, 1), (N, L)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, N])
def test_agrees_with_a_slow_loop(rows, mask_shape):
    rng = np.random.default_rng(rows)
    queries = random_queries(rng)
    segments = [own_segment(rng), random_segment(rng, rows, 7, mask_shape)]
    np.testing.assert_allclose(attend(queries, segments), slow_attention(queries, segments), rtol=0, atol=1e-5)


def test_order_and_number_of_segments_do_not_matter():
    rng = np.random.default_rng(0)
    queries = random_queries(rng)
    own, prefix = own_segment(rng), random_segment(rng, 1, 8, (1, L))
    expected = attend(queries, [own, prefix])
    np.testing.assert_allclose(attend(queries, [prefix, own]), expected, rtol=0, atol=1e-6)
    halves = [
        Segment(prefix.keys[..., half], prefix.values[:, :, half], prefix.mask[..., half])
        for half in (slice(0, 3), slice(3, 8))
    ]
    np.testing.assert_allclose(attend(queries, [*halves, own]), expected, rtol=0, atol=1e-6)


def test_sharing_keys_is_copying_them():
    rng = np.random.default_rng(0)
    queries = random_queries(rng)
    own, shared = own_segment(rng), random_segment(rng, 2, 7, (N, L))
    copied = Segment(np.repeat(shared.keys, 2, axis=0), np.repeat(shared.values, 2, axis=0), shared.mask)
    np.testing.assert_allclose(attend(queries, [own, shared]), attend(queries, [own, copied]), rtol=0, atol=1e-6)


def test_what_is_masked_does_not_count():
    rng = np.random.default_rng(0)
    queries = random_queries(rng)
    own, prefix = own_segment(rng), random_segment(rng, 1, 7, (1, 1))
    hidden = ~prefix.mask[0, 0]
    # Large, since a mask that only lowered the logits would show.
    spoilt = prefix._replace(
        keys=np.where(hidden, np.float32(1e6), prefix.keys),
        values=np.where(hidden[:, None], np.float32(1e6), prefix.values),
    )
    np.testing.assert_array_equal(attend(queries, [own, spoilt]), attend(queries, [own, prefix]))


@pytest.mark.parametrize("own_first", [True, False])
def test_a_segment_masked_whole_weighs_nothing(own_first):
    rng = np.random.default_rng(0)
    queries = random_queries(rng)
    own, empty = own_segment(rng), random_segment(rng, 1, 7, (1, 1), density=0.0)
    assert not empty.mask.any()

    def loss(queries, keys):
        segments = [own, empty._replace(keys=keys)]
        return attend(queries, segments if own_first else segments[::-1]).sum()

    assert_same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    assert_same(attend(queries, [own, empty]), attend(queries, [own]))
    slopes = jax.grad(loss, argnums=(0, 1))(queries, empty.keys)
    assert_same(slopes[0], jax.grad(lambda q: attend(q, [own]).sum())(queries))
    assert_same(slopes[1], 0)


def test_large_logits_do_not_overflow():
    rng = np.random.default_rng(0)
    queries = random_queries(rng) * 1e3
    segments = [own_segment(rng), random_segment(rng, 1, 7, (1, 1))]
    np.testing.assert_allclose(attend(queries, segments), slow_attention(queries, segments), rtol=0, atol=1e-3)


def test_gradient_is_that_of_plain_softmax():
    rng = np.random.default_rng(0)
    queries = random_queries(rng)
    own, prefix = own_segment(rng), random_segment(rng, 2, 7, (N, L))
    weights = rng.normal(size=(N, L, H, C)).astype(np.float32)

    def plain(queries, keys, values):
        # All keys of a row next to each other, one copy a query head.
        keys, values = (
            jnp.concatenate([jnp.repeat(x, N // len(x), axis=0) for x in parts], axis=2).repeat(H // K, axis=1)
            for parts in ([x.swapaxes(2, 3) for x in keys], values)
        )
        mask = jnp.concatenate([jnp.broadcast_to(s.mask, (N, L, s.keys.shape[3])) for s in (own, prefix)], axis=-1)
        logits = jnp.einsum("nlhc,nhpc->nhlp", queries, keys) / np.sqrt(C)
        attention_weights = jax.nn.softmax(jnp.where(mask[:, None], logits, -1e9))
        return (jnp.einsum("nhlp,nhpc->nlhc", attention_weights, values) * weights).sum()

    def segmented(queries, keys, values):
        segments = [Segment(k, v, s.mask) for k, v, s in zip(keys, values, (own, prefix), strict=True)]
        return (attend(queries, segments) * weights).sum()

    arguments = (queries, (own.keys, prefix.keys), (own.values, prefix.values))
    got = jax.jit(jax.value_and_grad(segmented, argnums=(0, 1, 2)))(*arguments)
    expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 2)))(*arguments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------
# Trees of rows
# --------------------------------------------------------------------------------------


def random_tree(seed, rows, widths, width=16):
    """Levels with ragged lengths; the last level's rows have at least one token."""
    rng = np.random.default_rng(seed)
    levels = []
    for n, length in zip(rows, widths, strict=True):
        queries = rng.normal(size=(n, length, H, width)).astype(np.float32)
        keys, values = rng.normal(size=(2, n, length, K, width)).astype(np.float32)
        levels.append(Level(queries, keys, values, rng.integers(1, length + 1, n).astype(np.int32)))
    return levels


def path_of(levels, i, row):
    """Keys and values that the tokens of a row see besides its own."""
    keys, values = [], []
    for level in levels[:i]:
        ancestor = row // (len(levels[i].queries) // len(level.queries))
        keys.append(level.keys[ancestor, : level.lengths[ancestor]])
        values.append(level.values[ancestor, : level.lengths[ancestor]])
    return keys, values


def slow_tree(levels):
    """Each token's attention over its path, one at a time, in float64; zero at padding."""
    out = [np.zeros(level.queries.shape) for level in levels]
    for i, level in enumerate(levels):
        for row in range(len(level.queries)):
            keys, values = path_of(levels, i, row)
            for t in range(level.lengths[row]):
                k = np.concatenate([*keys, level.keys[row, : t + 1]]).astype(np.float64)
                v = np.concatenate([*values, level.values[row, : t + 1]])
                for h in range(H):
                    logits = k[:, h // (H // K)] @ level.queries[row, t, h] / np.sqrt(k.shape[-1])
                    weights = np.exp(logits - logits.max())
                    out[i][row, t, h] = weights @ v[:, h // (H // K)] / weights.sum()
    return out


def without_padding(levels, arrays):
    return [np.concatenate([x[r, :n] for r, n in enumerate(level.lengths)]) for level, x in
            zip(levels, arrays, strict=True)]  # fmt: skip


TREES = {"rows": ((3,), (5,)), "two levels": ((1, 4), (6, 3)), "three levels": ((2, 4, 8), (4, 3, 5))}


@pytest.mark.parametrize("shape", TREES.values(), ids=TREES)
@pytest.mark.parametrize("implementation", ["xla", "blocked", "splash"])
def test_trees_agree_with_one_token_at_a_time(shape, implementation):
    """The TPU kernel is interpreted here; tests/tpu_test.py compiles it for a TPU."""
    levels = random_tree(0, *shape)
    got = jax.jit(attention.attend_tree, static_argnums=1)(levels, implementation)
    for a, b in zip(without_padding(levels, got), without_padding(levels, slow_tree(levels)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert all(np.isfinite(x).all() for x in got)


@pytest.mark.parametrize("implementation", ["blocked", "splash"])
def test_own_gradients_are_those_of_plain_products(implementation, monkeypatch):
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 2)
    levels = random_tree(1, *TREES["three levels"])
    rng = np.random.default_rng(2)
    directions = [rng.normal(size=level.queries.shape).astype(np.float32) for level in levels]
    for level, direction in zip(levels, directions, strict=True):
        direction[np.arange(direction.shape[1])[None] >= level.lengths[:, None]] = 0

    def loss(arrays, implementation):
        levels_of = [Level(*some, lengths=level.lengths) for some, level in zip(arrays, levels, strict=True)]
        mixed = attention.attend_tree(levels_of, implementation)
        return sum((x * d).sum() for x, d in zip(mixed, directions, strict=True))

    arrays = [level[:3] for level in levels]
    want, got = (jax.jit(jax.grad(loss), static_argnums=1)(arrays, name) for name in ("xla", implementation))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)


# --------------------------------------------------------------------------------------
# Which implementation
# --------------------------------------------------------------------------------------


class Elsewhere(NamedTuple):
    """Stands for a device of another platform."""

    platform: str


def test_a_cpu_takes_one_head_at_a_time():
    assert attention.choose("auto", jax.devices()[0], jnp.dtype("float32")) == ("blocked", "")


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_a_kernel_of_another_platform_is_refused(name):
    with pytest.raises(ValueError, match=f"model.attention='{name}'.*this is a CPU; set model.attention='auto'"):
        attention.choose(name, jax.devices()[0], jnp.dtype("bfloat16"))


def test_float32_on_a_gpu_falls_back_and_says_so():
    implementation, remark = attention.choose("auto", Elsewhere("gpu"), jnp.dtype("float32"))
    assert implementation == "xla"
    assert "cudnn is not used (it needs model.compute_dtype=bfloat16" in remark


def test_a_kernel_that_fails_falls_back_and_says_why(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel\nand a long trace")

    monkeypatch.setattr(attention, "attend_tree", broken)
    monkeypatch.setattr(jax, "device_put", lambda x, _: x)
    implementation, remark = attention.choose("auto", Elsewhere("tpu"), jnp.dtype("bfloat16"))
    assert implementation == "xla"
    assert "splash is not used (RuntimeError: no such kernel)" in remark
