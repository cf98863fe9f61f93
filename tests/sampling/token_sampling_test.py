"""Tests of finemem_jax/sampling/token_sampling.py: against sorted float64 probabilities, on ties, and row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finemem_jax.sampling import token_sampling
from finemem_jax.sampling.token_sampling import SamplingParams

inverse_cdf = jax.jit(token_sampling.inverse_cdf)
draw = jax.jit(token_sampling.sample)


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 1), (0.2, 1), (0.49, 1), (0.5, 2), (0.74, 2), (0.75, 4), (1 - 2**-24, 4)]
)
def test_inverse_cdf_by_hand(uniform, token):
    # Shares 0, 1/2, 1/4, 0, 1/4 end at 0, 0.5, 0.75, 0.75, 1. Tokens without a share are never drawn.
    shares = jnp.array([[0, 0.5, 0.25, 0, 0.25]])
    assert inverse_cdf(jnp.log(shares), jnp.array([uniform])) == token


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 1000])
def test_inverse_cdf_agrees_with_a_running_sum(vocab):
    rng = np.random.default_rng(vocab)
    log_probs = np.log(rng.dirichlet(np.full(vocab, 0.3), size=400) + 1e-12)
    log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
    uniform = rng.random(400)
    got = np.asarray(inverse_cdf(log_probs.astype(np.float32), uniform.astype(np.float32)))
    ends = np.cumsum(np.exp(log_probs), axis=-1)
    # float32 may decide otherwise at the very edge of a token's share, nowhere else.
    starts = ends - np.exp(log_probs)
    rows = np.arange(400)
    assert (starts[rows, got] - 1e-5 <= uniform).all()
    assert (uniform <= ends[rows, got] + 1e-5).all()


# --------------------------------------------------------------------------------------
# Temperature, top-k, top-p
# --------------------------------------------------------------------------------------


def sampling(num_rows, temperature=1.0, top_k=0, top_p=1.0):
    return SamplingParams(
        np.full(num_rows, temperature, np.float32),
        np.full(num_rows, top_k, np.int32),
        np.full(num_rows, top_p, np.float32),
    )


def left_by_sorting(logits, temperature, top_k, top_p):
    """Probabilities that a row draws from, float64: sort, cut, normalize."""
    probs = np.exp(logits.astype(np.float64) / temperature)
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    if top_k:
        probs[order[top_k:]] = 0
    probs /= probs.sum()
    # The fewest whose sum reaches top_p: a token stays if those before it do not.
    before = np.cumsum(probs[order]) - probs[order]
    if top_p < 1:
        probs[order[before >= top_p]] = 0
    return probs / probs.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.9), (0, 0.3), (7, 0.8), (900, 0.999)])
def test_only_what_is_left_is_drawn_and_log_probs_are_its(temperature, top_k, top_p):
    """2,000 draws of one row at evenly spread random numbers visit each token as often as its probability says."""
    n, vocab = 2_000, 700
    logits = np.random.default_rng(top_k).normal(size=vocab).astype(np.float32) * 2
    found = draw(
        jnp.tile(logits, (n, 1)), sampling(n, temperature, top_k, top_p), (np.arange(n, dtype=np.float32) + 0.5) / n
    )
    expected = left_by_sorting(logits, temperature, top_k, top_p)
    tokens = np.asarray(found.token)
    assert (expected[tokens] > 0).all()
    shares = np.bincount(tokens, minlength=vocab) / n
    np.testing.assert_allclose(shares, expected, atol=1.01 / n)
    np.testing.assert_allclose(found.log_prob, np.log(expected[tokens]), atol=1e-4)
    raw = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(found.raw_log_prob, raw[tokens], atol=1e-5)


def test_rows_have_settings_of_their_own():
    """What one row cuts changes no bit of another."""
    rng = np.random.default_rng(0)
    logits, uniform = rng.normal(size=(4, 300)).astype(np.float32), rng.random(4).astype(np.float32)
    mixed = SamplingParams(
        np.array([1, 1, 0, 1.5], np.float32), np.array([0, 2, 3, 0], np.int32), np.array([1, 1, 0.5, 0.7], np.float32)
    )
    together = draw(logits, mixed, uniform)
    for row in range(4):
        alone = draw(np.tile(logits[row], (4, 1)), jax.tree.map(lambda x, r=row: np.tile(x[r], 4), mixed), uniform)
        assert alone.token[row] == together.token[row]
        assert alone.log_prob[row] == together.log_prob[row]
    # Greedy, whatever it could cut, with log-probabilities at temperature 1.
    assert together.token[2] == logits[2].argmax()
    assert together.log_prob[2] == together.raw_log_prob[2] < 0


def test_equally_likely_tokens_stay_together():
    """No order is made up between tokens of one probability: top-k keeps all that are as likely as the k-th."""
    logits = np.array([3, 2, 2, 2, 0], np.float32)
    uniform = (np.arange(1_000, dtype=np.float32) + 0.5) / 1_000
    tokens = draw(np.tile(logits, (1_000, 1)), sampling(1_000, top_k=2), uniform).token
    assert set(np.asarray(tokens).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("settings", [{"top_p": 1e-9}, {"top_k": 1}])
def test_the_likeliest_token_always_stays(settings):
    logits = np.random.default_rng(1).normal(size=(8, 500)).astype(np.float32)
    found = draw(logits, sampling(8, **settings), np.linspace(0, 0.999, 8, dtype=np.float32))
    np.testing.assert_array_equal(found.token, logits.argmax(-1))
    np.testing.assert_allclose(found.log_prob, 0, atol=1e-6)


def test_words_without_probability_are_never_drawn():
    """Masked logits stay masked, also where top-p could let everything in."""
    logits = np.full((50, 300), -np.inf, np.float32)
    logits[:, [3, 299]] = [0.0, -20.0]
    for settings in ({}, {"top_k": 5}, {"top_p": 0.999999}):
        found = draw(logits, sampling(50, **settings), np.linspace(0, 1 - 2**-24, 50, dtype=np.float32))
        assert set(np.asarray(found.token).tolist()) <= {3, 299}
