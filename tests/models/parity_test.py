"""Our decoder against transformers: log-probabilities, cached decoding and gradients of every family.

References in tests/parity/ come from make_parity_references.py; where PyTorch is installed, transformers is asked.
"""

# No request here is refused, unless a test says so: every result has `ids`.
# pyright: reportAttributeAccessIssue=false

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import make_parity_references
import parity_cases
from finemem_jax.config import sections
from finemem_jax.models import decoder, kv_cache
from finemem_jax.models.kv_cache import Context, NewTokens
from finemem_jax.sampling.sampler import Sampler
from finemem_jax.types import Request

CASES = list(parity_cases.CASES.values())
PREFILLED = 30
each_case = pytest.mark.parametrize("config", CASES, ids=list(parity_cases.CASES))
# For what runs once on tiny arrays: half the compile time, which is all the time there is.
UNOPTIMISED = {"xla_backend_optimization_level": 0}


@functools.cache
def ours(config):
    """Our log-probabilities [tokens, V], and our gradients by Hugging Face's names."""
    rows, lengths = parity_cases.token_rows(config), np.array(parity_cases.LENGTHS)
    tokens = np.stack([np.pad(row, (0, lengths.max() - len(row)), constant_values=3) for row in rows])

    def mean_log_prob(params):
        (states,) = decoder.hidden_states(config, params, [tokens], lengths=[lengths], compute=decoder.Compute("none"))
        log_probs = jax.nn.log_softmax(states @ decoder.output_head(config, params).T)
        chosen = [log_probs[i, np.arange(len(row) - 1), row[1:]] for i, row in enumerate(rows)]
        return jnp.concatenate(chosen).mean(), log_probs

    function = jax.jit(jax.value_and_grad(mean_log_prob, has_aux=True), compiler_options=UNOPTIMISED)
    (_, log_probs), gradients = function(parity_cases.as_params(config, parity_cases.checkpoint(config)))
    flat = np.concatenate([log_probs[i, : len(row)] for i, row in enumerate(rows)])
    return flat, parity_cases.as_checkpoint(config, gradients)


@functools.cache
def reference(config):
    with np.load(make_parity_references.FOLDER / f"{config.name}.npz") as file:
        return dict(file)


@each_case
def test_log_probs(config):
    np.testing.assert_allclose(ours(config)[0], reference(config)["log_probs"], rtol=0, atol=1e-4)


@each_case
def test_gradients(config):
    stored, gradients = reference(config), ours(config)[1]
    assert {f"norm/{name}" for name in gradients} == {name for name in stored if name.startswith("norm/")}
    for name, gradient in gradients.items():
        norm = stored[f"norm/{name}"]
        np.testing.assert_allclose(np.linalg.norm(gradient), norm, rtol=1e-3, err_msg=name)
        entries = gradient.reshape(-1)[parity_cases.stored_entries(name, gradient.size)]
        # A thousandth of what is usual among the parameter's entries.
        usual = norm / gradient.size**0.5
        np.testing.assert_allclose(entries, stored[f"entries/{name}"], rtol=1e-3, atol=1e-3 * usual, err_msg=name)


@each_case
def test_cached_decoding(config):
    row = parity_cases.token_rows(config)[0]
    weights = kv_cache.layout(config, parity_cases.as_params(config, parity_cases.checkpoint(config)), "float32")
    cache, shared_prefix = kv_cache.empty(config, 1, len(row)), kv_cache.empty(config, 1, 0)

    @functools.partial(jax.jit, compiler_options=UNOPTIMISED)
    def extend(cache, tokens, start):
        context = Context(weights, shared_prefix, jnp.asarray(0))
        states, cache = kv_cache.extend(config, context, cache, new=NewTokens(tokens, start))
        return jax.nn.log_softmax(kv_cache.logits(config, weights, states[0])), cache

    parts = []
    for start, end in [(0, PREFILLED), *((i, i + 1) for i in range(PREFILLED, len(row)))]:
        part, cache = extend(cache, row[None, start:end], np.array([start]))
        parts.append(part)
    expected = reference(config)["log_probs"][: len(row)]
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=0, atol=1e-4)


# One of each family; the others take as long again.
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(case, marks=() if name in ("llama_scaled", "qwen2_tied", "qwen3_tied") else pytest.mark.slow)
        for name, case in parity_cases.CASES.items()
    ],
    ids=list(parity_cases.CASES),
)
def test_greedy_generation(config):
    """All prompts at once, in few slots; some begin with what others are."""
    params = parity_cases.as_params(config, parity_cases.checkpoint(config))
    settings = sections.Sampler(num_slots=5, steps_per_call=4, prefill_tokens=32)
    sampler = Sampler(config, params, parity_cases.END_IDS, settings=settings)
    prompts = [tuple(prompt) for prompt in parity_cases.prompts(config)]
    requests = [Request(ids, (0, len(ids)), parity_cases.NEW_TOKENS, 0.0, (0, 0)) for ids in prompts]
    stored = reference(config)
    expected = np.split(stored["generated"], np.cumsum(stored["generated_lengths"])[:-1])
    assert [c.ids for c in sampler.generate(requests)] == [tuple(ids.tolist()) for ids in expected]


@each_case
def test_greedy_generation_of_transformers_itself(config):
    pytest.importorskip("torch", reason="compares with transformers' models, which need PyTorch")
    stored = reference(config)
    np.testing.assert_array_equal(np.concatenate(make_parity_references.generate(config)), stored["generated"])


@each_case
def test_against_transformers_itself(config):
    pytest.importorskip("torch", reason="compares with transformers' models, which need PyTorch")
    log_probs, gradients = make_parity_references.compute(config)
    np.testing.assert_allclose(ours(config)[0], log_probs, rtol=0, atol=1e-4)
    np.testing.assert_allclose(reference(config)["log_probs"], log_probs, rtol=0, atol=1e-5)
    for name, gradient in ours(config)[1].items():
        error = np.linalg.norm(gradient - gradients[name]) / np.linalg.norm(gradients[name])
        assert error < 1e-3, (name, error)


def test_the_references_are_small():
    assert sum(path.stat().st_size for path in make_parity_references.FOLDER.glob("*.npz")) < 200_000


def test_the_scaled_model_has_rotations_of_all_three_kinds():
    config = parity_cases.CASES["llama_scaled"]
    plain = decoder.rotary_frequencies(dataclasses.replace(config, rope_scaling=None))
    shares = decoder.rotary_frequencies(config) / plain
    # f_i = 10000^(-i/8) turns 32 f_i / 2π times in 32 positions: 5.1, 1.6, 0.5, …; kept are those above 4, and slowed
    # in full those below 1. Of f_1, (1.6105 - 1) / 3 = .2035 is kept, and of the rest an eighth.
    np.testing.assert_allclose(shares, [1, 0.2035 + 0.7965 / 8, *[1 / 8] * 6], rtol=1e-3)


@each_case
def test_num_parameters_counts_them_all(config):
    assert sum(tensor.size for tensor in parity_cases.checkpoint(config).values()) == config.num_parameters
    shapes = jax.eval_shape(functools.partial(decoder.init, config, 0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == config.num_parameters
