"""Tests of finemem_jax/sampling/decode.py: drawing tokens, and caches that go from call to call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finemem_jax.models import decoder, kv_cache, presets
from finemem_jax.models.kv_cache import Context, NewTokens
from finemem_jax.sampling import decode as decode_lib
from finemem_jax.sampling.decode import Copies, PromptEnds, Rules, SlotState, Spec
from finemem_jax.sampling.token_sampling import SamplingParams

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
        sampling=SamplingParams(
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
def weights(params):
    return kv_cache.layout(TINY, params, "float32")


@pytest.fixture(scope="module")
def logits_of(params):
    """Logits after a row of tokens, computed without a cache."""

    @jax.jit
    def logits(tokens, length):
        (states,) = decoder.hidden_states(TINY, params, [tokens[None]], lengths=[length[None]])
        return params["embedding"] @ states[0, length - 1]

    def of(ids):
        return np.asarray(logits(jnp.asarray(np.pad(ids, (0, POSITIONS - len(ids)))), jnp.asarray(len(ids))))

    return of


def without_prefix(weights):
    return Context(weights, kv_cache.empty(TINY, 1, 0), np.int32(0))


def prefill(weights, cache, tokens, lengths, starts):
    return decode_lib.prefill(without_prefix(weights), cache, NewTokens(tokens, starts, lengths), spec=Spec(TINY))


def draw_first(weights, hidden, state):
    ends = PromptEnds(hidden, np.arange(len(hidden)))
    return decode_lib.draw_first(without_prefix(weights), ends, state, None, spec=Spec(TINY))


def decode(weights, cache, state, num_steps, ends, leave_at=0):
    rules = Rules(np.int32(leave_at), ends)
    return decode_lib.decode(without_prefix(weights), cache, state, rules, spec=Spec(TINY, None, num_steps))


def prefilled(weights, length=8):
    """Last hidden states and cache of `PROMPTS`, in rows padded with garbage."""
    tokens = np.stack([np.pad(ids, (0, length - len(ids)), constant_values=99) for ids in PROMPTS]).astype(np.int32)
    lengths = np.array([len(ids) for ids in PROMPTS], np.int32)
    cache = kv_cache.empty(TINY, len(PROMPTS), POSITIONS)
    starts = np.zeros(len(PROMPTS), np.int32)
    return prefill(weights, cache, tokens, lengths, starts)


def decoded(weights, state, num_steps, end_ids=()):
    _, cache = prefilled(weights)
    ends = np.asarray(end_ids, np.int32)
    _, state, drawn = decode(weights, cache, state, num_steps, ends)
    return state, np.asarray(drawn.token), np.asarray(drawn.log_prob)


# --------------------------------------------------------------------------------------
# Drawing
# --------------------------------------------------------------------------------------


def test_greedy_rows_take_the_likeliest_token(weights, logits_of):
    hidden, _ = prefilled(weights)
    tokens, log_probs, _ = draw_first(weights, hidden, slots(temperature=[0, 0]))
    for ids, token, log_prob in zip(PROMPTS, tokens, log_probs, strict=True):
        expected = jax.nn.log_softmax(logits_of(ids))
        assert token == expected.argmax()
        # At temperature 1, since at 0 every log-probability would be 0.
        np.testing.assert_allclose(log_prob, expected.max(), atol=1e-4)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_log_probs_are_those_of_the_distribution_drawn_from(weights, logits_of, temperature):
    hidden, _ = prefilled(weights)
    tokens, log_probs, _ = draw_first(weights, hidden, slots(temperature=[temperature] * 2))
    for ids, token, log_prob in zip(PROMPTS, tokens, log_probs, strict=True):
        np.testing.assert_allclose(log_prob, jax.nn.log_softmax(logits_of(ids) / temperature)[token], atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_draws_follow_the_models_distribution(weights, logits_of, temperature):
    hidden, _ = prefilled(weights)
    n = 4000
    state = slots(temperature=[temperature] * n)
    tokens, *_ = draw_first(weights, jnp.repeat(hidden[:1], n, axis=0), state)
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


def test_a_draw_depends_on_key_and_position_alone(weights):
    hidden, _ = prefilled(weights)
    same = jnp.repeat(hidden[:1], 4, axis=0)
    # Rows 0 and 2 agree in key and position, row 1 has another key, row 3 another position.
    keys = [[1, 2], [1, 3], [1, 2], [1, 2]]
    states = [slots(temperature=[2.0] * 4, key=keys, filled=filled) for filled in ([5, 5, 5, 6], [7, 7, 7, 8])]
    draws = np.array([draw_first(weights, same, state).token for state in states])
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


def test_decode_is_an_argmax_loop(weights, logits_of):
    state, tokens, log_probs = decoded(weights, first_state([4, 4]), num_steps=4)
    for ids, got, values in zip(PROMPTS, tokens, log_probs, strict=True):
        assert got.tolist() == greedy(logits_of, ids, 4)
        expected = [jax.nn.log_softmax(logits_of([*ids, *got[:i]]))[got[i]] for i in range(4)]
        np.testing.assert_allclose(values, expected, atol=1e-4)
    np.testing.assert_array_equal(state.filled, [len(ids) + 3 for ids in PROMPTS])
    np.testing.assert_array_equal(state.remaining, 0)
    np.testing.assert_array_equal(state.token, tokens[:, -1])


def test_calls_go_on_where_the_last_one_stopped(weights):
    _, whole, values = decoded(weights, first_state([4, 4], [1, 1]), num_steps=4)
    _, cache = prefilled(weights)
    state, parts = first_state([4, 4], [1, 1]), []
    for _ in range(4):
        ends = np.zeros(0, np.int32)
        cache, state, drawn = decode(weights, cache, state, 1, ends)
        parts.append((np.asarray(drawn.token), np.asarray(drawn.log_prob)))
    np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in parts], axis=1), whole)
    np.testing.assert_allclose(np.concatenate([v for _, v in parts], axis=1), values, atol=1e-5)


def test_slots_stop_apart(weights):
    _, free, _ = decoded(weights, first_state([4, 4]), num_steps=4)
    # Slot 0 may draw two tokens; slot 1 meets an end token at its first.
    state, tokens, log_probs = decoded(weights, first_state([2, 4]), num_steps=4, end_ids=[free[1, 0]])
    assert free[1, 0] not in free[0, :2]
    assert tokens.tolist() == [[*free[0, :2], -1, -1], [free[1, 0], -1, -1, -1]]
    assert (log_probs[tokens < 0] == 0).all()
    np.testing.assert_array_equal(state.remaining, [0, 0])
    # An idle slot stays where it stopped.
    np.testing.assert_array_equal(state.filled, [len(PROMPTS[0]) - 1 + 2, len(PROMPTS[1]) - 1 + 1])


def test_idle_slots_draw_nothing_and_disturb_nobody(weights):
    _, both, _ = decoded(weights, first_state([4, 4]), num_steps=4)
    state, tokens, _ = decoded(weights, first_state([4, 0]), num_steps=4)
    np.testing.assert_array_equal(tokens, [both[0], [-1] * 4])
    assert state.filled[1] == len(PROMPTS[1]) - 1
    _, tokens, _ = decoded(weights, first_state([0, 0]), num_steps=4)
    assert (tokens == -1).all()


# --------------------------------------------------------------------------------------
# Caches
# --------------------------------------------------------------------------------------


def test_prefill_returns_the_last_states_whatever_the_padding(weights, params, logits_of):
    for length in (5, 8):
        hidden, _ = prefilled(weights, length)
        for ids, state in zip(PROMPTS, hidden, strict=True):
            np.testing.assert_allclose(params["embedding"] @ state, logits_of(ids), rtol=0, atol=1e-3)


def test_prefill_in_two_parts_is_one_prefill(weights):
    whole, _ = prefilled(weights)
    cache = kv_cache.empty(TINY, 2, POSITIONS)
    cuts = np.array([1, 3], np.int32)
    for starts, ends in ((0 * cuts, cuts), (cuts, np.array([len(ids) for ids in PROMPTS], np.int32))):
        parts = [ids[a:b] for ids, a, b in zip(PROMPTS, starts, ends, strict=True)]
        tokens = np.stack([np.pad(part, (0, 8 - len(part)), constant_values=77) for part in parts]).astype(np.int32)
        hidden, cache = prefill(weights, cache, tokens, ends - starts, starts)
    np.testing.assert_allclose(hidden, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("leave_at", "steps"), [(0, 4), (1, 2), (2, 0)])
def test_decoding_stops_early_when_few_are_left(weights, leave_at, steps):
    """Slot 0 has two tokens to draw, slot 1 four."""
    _, cache = prefilled(weights)
    _, state, drawn = decode(weights, cache, first_state([2, 4]), 6, np.zeros(0, np.int32), leave_at)
    assert (np.asarray(drawn.token) >= 0).sum(1).tolist() == [min(2, steps), steps]
    assert np.asarray(state.remaining).tolist() == [max(2 - steps, 0), 4 - steps]


def counting_cache(rows, positions=3):
    """A cache whose row n holds n everywhere."""
    return jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.arange(rows)[:, None, None, None], x.shape).astype(x.dtype),
        kv_cache.empty(TINY, rows, positions),
    )


def first_entries(cache):
    entries = {tuple(np.asarray(leaf[:, 0, 0, 0]).tolist()) for leaf in jax.tree.leaves(cache)}
    assert len(entries) == 1
    return list(*entries)


def test_copying_rows():
    new = jax.tree.map(lambda x: x + 10, counting_cache(3))
    targets, rows = np.array([1, 3, 0]), np.array([2, 0, 1])
    # The third pair is not counted.
    assert first_entries(decode_lib.copy_rows(counting_cache(4), new, Copies(targets, rows, np.array([2])))) == [
        0,
        12,
        2,
        10,
    ]
    # One after the other: row 2 is copied to 1, and 1, which holds 2 by then, to 3.
    within = decode_lib.copy_within(counting_cache(4), Copies(np.array([1, 3, 0]), np.array([2, 1, 3]), np.array([2])))
    assert first_entries(within) == [0, 2, 2, 2]


@pytest.mark.parametrize(("held", "copied"), [(5, 3), (3, 5)])
def test_copying_between_caches_of_other_lengths(held, copied):
    source = jax.tree.map(lambda x: x + 10, counting_cache(2, copied))
    got = decode_lib.copy_rows(counting_cache(2, held), source, Copies(np.array([1]), np.array([0]), np.array([1])))
    both = min(held, copied)
    for keys, values in got:
        assert (keys[1, :, :, :both] == 10).all() and (values[1, :, :both] == 10).all()
        assert (keys[1, :, :, both:] == 1).all() and (values[1, :, both:] == 1).all()
