"""Tests of finemem_jax/decoding.py: drawing tokens, and caches that go from call to call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finemem_jax import decoding
from finemem_jax.decoding import SlotState
from finemem_jax.drawing import Sampling
from finemem_jax.models import decoder, presets

TINY = presets.preset("tiny")
POSITIONS = 16
PROMPTS = [[10, 20, 30], [40, 50, 60, 70, 80]]


def slots(temperature=None, **fields):
    """A state in which nothing is to be done, but for the fields given."""
    n = len(temperature or next(iter(fields.values())))
    state = SlotState(
        token=np.zeros(n, np.int32),
        filled=np.zeros(n, np.int32),
        remaining=np.zeros(n, np.int32),
        sampling=Sampling(
            np.asarray(temperature or [0.0] * n, np.float32), np.zeros(n, np.int32), np.ones(n, np.float32)
        ),
        key=np.stack([np.zeros(n), np.arange(n)], axis=1).astype(np.uint32),
    )
    return state._replace(**{name: np.asarray(v, getattr(state, name).dtype) for name, v in fields.items()})


@pytest.fixture(scope="module")
def params():
    # Wider than `init`'s embedding, so that some tokens are likelier than others.
    params = decoder.init(TINY, 0)
    return params | {"embedding": params["embedding"] * 15}


@pytest.fixture(scope="module")
def unstacked(params):
    return decoder.unstack(TINY, params)


@pytest.fixture(scope="module")
def logits_of(params):
    """Logits after a row of tokens, computed without a cache."""

    @jax.jit
    def logits(tokens, length):
        (states,) = decoder.hidden_states(TINY, params, [tokens[None]], [length[None]])
        return params["embedding"] @ states[0, length - 1]

    def of(ids):
        return np.asarray(logits(jnp.asarray(np.pad(ids, (0, POSITIONS - len(ids)))), jnp.asarray(len(ids))))

    return of


def no_trunk():
    return decoding.empty_cache(TINY, 1, 0)


def prefilled(unstacked, length=8):
    """Last hidden states and cache of `PROMPTS`, in rows padded with garbage."""
    tokens = np.stack([np.pad(ids, (0, length - len(ids)), constant_values=99) for ids in PROMPTS]).astype(np.int32)
    lengths = np.array([len(ids) for ids in PROMPTS], np.int32)
    cache = decoding.empty_cache(TINY, len(PROMPTS), POSITIONS)
    starts = np.zeros(len(PROMPTS), np.int32)
    return decoding.prefill(TINY, unstacked, no_trunk(), cache, tokens, lengths, np.int32(0), starts)


def decoded(unstacked, state, num_steps, end_ids=()):
    _, cache = prefilled(unstacked)
    ends = np.asarray(end_ids, np.int32)
    _, state, drawn = decoding.decode(TINY, unstacked, no_trunk(), cache, state, np.int32(0), num_steps, ends)
    return state, np.asarray(drawn.token), np.asarray(drawn.log_prob)


# --------------------------------------------------------------------------------------
# Drawing
# --------------------------------------------------------------------------------------


def test_greedy_rows_take_the_likeliest_token(unstacked, logits_of):
    hidden, _ = prefilled(unstacked)
    tokens, log_probs, _ = decoding.draw_first(TINY, unstacked, hidden, slots(temperature=[0, 0]), 0)
    for ids, token, log_prob in zip(PROMPTS, tokens, log_probs, strict=True):
        expected = jax.nn.log_softmax(logits_of(ids))
        assert token == expected.argmax()
        # At temperature 1, since at 0 every log-probability would be 0.
        np.testing.assert_allclose(log_prob, expected.max(), atol=1e-4)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_log_probs_are_those_of_the_distribution_drawn_from(unstacked, logits_of, temperature):
    hidden, _ = prefilled(unstacked)
    tokens, log_probs, _ = decoding.draw_first(TINY, unstacked, hidden, slots(temperature=[temperature] * 2), 0)
    for ids, token, log_prob in zip(PROMPTS, tokens, log_probs, strict=True):
        np.testing.assert_allclose(log_prob, jax.nn.log_softmax(logits_of(ids) / temperature)[token], atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_draws_follow_the_models_distribution(unstacked, logits_of, temperature):
    hidden, _ = prefilled(unstacked)
    n = 4000
    state = slots(temperature=[temperature] * n)
    tokens, *_ = decoding.draw_first(TINY, unstacked, jnp.repeat(hidden[:1], n, axis=0), state, 0)
    counts = np.bincount(np.asarray(tokens), minlength=TINY.vocab_size)
    expected = n * np.asarray(jax.nn.softmax(logits_of(PROMPTS[0]) / temperature), np.float64)
    # Pearson's statistic wants five expected draws a cell; the rare tokens share one.
    common = expected >= 5
    cells = [np.append(x[common], x[~common].sum()) for x in (counts, expected)]
    statistic = ((cells[0] - cells[1]) ** 2 / cells[1]).sum()
    df = common.sum()
    assert df >= 20
    # Mean df, standard deviation sqrt(2 df): five of them are exceeded about once in a hundred thousand seeds.
    assert statistic < df + 5 * np.sqrt(2 * df)


def test_a_draw_depends_on_key_and_position_alone(unstacked):
    hidden, _ = prefilled(unstacked)
    same = jnp.repeat(hidden[:1], 4, axis=0)
    # Rows 0 and 2 agree in key and position, row 1 has another key, row 3 another position.
    keys = [[1, 2], [1, 3], [1, 2], [1, 2]]
    states = [slots(temperature=[2.0] * 4, key=keys, filled=filled) for filled in ([5, 5, 5, 6], [7, 7, 7, 8])]
    draws = np.array([decoding.draw_first(TINY, unstacked, same, state, 0).token for state in states])
    assert (draws[:, 0] == draws[:, 2]).all()
    assert len({tuple(column) for column in draws.T}) == 3


# --------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------


def first_state(remaining, temperature=(0, 0)):
    """The prompts stand in the cache but for their last tokens, which are drawn on from."""
    filled = [len(ids) - 1 for ids in PROMPTS]
    return slots(token=[ids[-1] for ids in PROMPTS], filled=filled, remaining=remaining, temperature=list(temperature))


def greedy(logits_of, ids, steps):
    ids = list(ids)
    for _ in range(steps):
        ids.append(int(logits_of(ids).argmax()))
    return ids[-steps:]


def test_decode_is_an_argmax_loop(unstacked, logits_of):
    state, tokens, log_probs = decoded(unstacked, first_state([4, 4]), num_steps=4)
    for ids, got, values in zip(PROMPTS, tokens, log_probs, strict=True):
        assert got.tolist() == greedy(logits_of, ids, 4)
        expected = [jax.nn.log_softmax(logits_of([*ids, *got[:i]]))[got[i]] for i in range(4)]
        np.testing.assert_allclose(values, expected, atol=1e-4)
    np.testing.assert_array_equal(state.filled, [len(ids) + 3 for ids in PROMPTS])
    np.testing.assert_array_equal(state.remaining, 0)
    np.testing.assert_array_equal(state.token, tokens[:, -1])


def test_calls_go_on_where_the_last_one_stopped(unstacked):
    _, whole, values = decoded(unstacked, first_state([4, 4], [1, 1]), num_steps=4)
    _, cache = prefilled(unstacked)
    state, parts = first_state([4, 4], [1, 1]), []
    for _ in range(4):
        ends = np.zeros(0, np.int32)
        cache, state, drawn = decoding.decode(TINY, unstacked, no_trunk(), cache, state, np.int32(0), 1, ends)
        parts.append((np.asarray(drawn.token), np.asarray(drawn.log_prob)))
    np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in parts], axis=1), whole)
    np.testing.assert_allclose(np.concatenate([v for _, v in parts], axis=1), values, atol=1e-5)


def test_slots_stop_apart(unstacked):
    _, free, _ = decoded(unstacked, first_state([4, 4]), num_steps=4)
    # Slot 0 may draw two tokens; slot 1 meets an end token at its first.
    state, tokens, log_probs = decoded(unstacked, first_state([2, 4]), num_steps=4, end_ids=[free[1, 0]])
    assert free[1, 0] not in free[0, :2]
    assert tokens.tolist() == [[*free[0, :2], -1, -1], [free[1, 0], -1, -1, -1]]
    assert (log_probs[tokens < 0] == 0).all()
    np.testing.assert_array_equal(state.remaining, [0, 0])
    # An idle slot stays where it stopped.
    np.testing.assert_array_equal(state.filled, [len(PROMPTS[0]) - 1 + 2, len(PROMPTS[1]) - 1 + 1])


def test_idle_slots_draw_nothing_and_disturb_nobody(unstacked):
    _, both, _ = decoded(unstacked, first_state([4, 4]), num_steps=4)
    state, tokens, _ = decoded(unstacked, first_state([4, 0]), num_steps=4)
    np.testing.assert_array_equal(tokens, [both[0], [-1] * 4])
    assert state.filled[1] == len(PROMPTS[1]) - 1
    _, tokens, _ = decoded(unstacked, first_state([0, 0]), num_steps=4)
    assert (tokens == -1).all()


# --------------------------------------------------------------------------------------
# Caches
# --------------------------------------------------------------------------------------


def test_prefill_returns_the_last_states_whatever_the_padding(unstacked, params, logits_of):
    for length in (5, 8):
        hidden, _ = prefilled(unstacked, length)
        for ids, state in zip(PROMPTS, hidden, strict=True):
            np.testing.assert_allclose(params["embedding"] @ state, logits_of(ids), rtol=0, atol=1e-3)


def test_prefill_in_two_parts_is_one_prefill(unstacked):
    whole, _ = prefilled(unstacked)
    cache = decoding.empty_cache(TINY, 2, POSITIONS)
    cuts = np.array([1, 3], np.int32)
    for starts, ends in ((0 * cuts, cuts), (cuts, np.array([len(ids) for ids in PROMPTS], np.int32))):
        parts = [ids[a:b] for ids, a, b in zip(PROMPTS, starts, ends, strict=True)]
        tokens = np.stack([np.pad(part, (0, 8 - len(part)), constant_values=77) for part in parts]).astype(np.int32)
        hidden, cache = decoding.prefill(TINY, unstacked, no_trunk(), cache, tokens, ends - starts, np.int32(0), starts)
    np.testing.assert_allclose(hidden, whole, rtol=0, atol=1e-4)


def test_attention_in_blocks_of_tokens_is_attention_at_once(unstacked, monkeypatch):
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12) + 100
    starts = np.array([0, 3], np.int32)
    cache = jax.tree.map(lambda x: x + 0.1, decoding.empty_cache(TINY, 2, 16))
    trunk = jax.tree.map(lambda x: x + 0.2, decoding.empty_cache(TINY, 1, 5))

    def extended():
        return decoder.extend(TINY, unstacked, trunk, cache, tokens, np.int32(4), starts)

    whole = extended()
    monkeypatch.setattr(decoder, "_QUERY_BLOCK", 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), extended(), whole)


def counting_cache(rows):
    """A cache whose row n holds n everywhere."""
    return jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.arange(rows)[:, None, None, None], x.shape).astype(x.dtype),
        decoding.empty_cache(TINY, rows, 3),
    )


def first_entries(cache):
    entries = {tuple(np.asarray(leaf[:, 0, 0, 0]).tolist()) for leaf in jax.tree.leaves(cache)}
    assert len(entries) == 1
    return list(*entries)


def test_gather_and_insert_rows():
    assert first_entries(decoding.gather_rows(counting_cache(3), np.array([2, 0, 2, 1]), 3)) == [2, 0, 2, 1]
    longer = jax.tree.leaves(decoding.gather_rows(counting_cache(3), np.array([2]), 5))[0]
    assert np.asarray(longer[0, 0, :, 0]).tolist() == [2, 2, 2, 0, 0]
    # Rows 2 and 0 of the new cache go to slots 1 and 3; the third target is out of range, and dropped.
    new = jax.tree.map(lambda x: x + 10, counting_cache(3))
    got = decoding.insert_rows(counting_cache(4), new, np.array([1, 3, 4]), np.array([2, 0, 1]))
    assert first_entries(got) == [0, 12, 2, 10]


def test_empty_cache_shares_no_buffer():
    # Donating one array twice is an error that shows on accelerators first.
    leaves = jax.tree.leaves(decoding.empty_cache(TINY, 2, 4))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves) == 2 * TINY.num_layers
