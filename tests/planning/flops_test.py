"""Tests of the formulas for FLOPs against the products that traced programs really have."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from finemem_jax.models import decoder, lora, presets
from finemem_jax.models.decoder import Compute
from finemem_jax.planning import flops
from finemem_jax.planning.flops import Lengths

TINY = presets.preset("tiny")
# Lengths of shared prefix, group prefixes and suffixes; two group prefixes, three suffixes on each.
SHARED_PREFIX, GROUP_PREFIX, SUFFIX, GROUPS, ROWS = 16, 8, 12, 2, 3


def products(jaxpr):
    """FLOPs of all matrix products of a traced program; loops count as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            width = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * width * math.prod(equation.outvars[0].aval.shape)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                total += times * products(getattr(inner, "jaxpr", inner))
    return total


def traced(remat, config=TINY, backward=True):
    sizes = [(1, SHARED_PREFIX), (GROUPS, GROUP_PREFIX), (GROUPS * ROWS, SUFFIX)]
    tokens = [jnp.zeros(size, jnp.int32) for size in sizes]
    lengths = [jnp.full(rows, length) for rows, length in sizes]
    frozen, trained = lora.split(decoder.abstract_params(config))

    def loss(trained):
        params = lora.combine(frozen_values, trained)
        return sum(
            x.sum() for x in decoder.hidden_states(config, params, tokens, lengths=lengths, compute=Compute(remat))
        )

    frozen_values = jax.tree.map(lambda x: jnp.zeros(x.shape), frozen)
    return products(jax.make_jaxpr(jax.grad(loss) if backward else loss)(trained).jaxpr)


def work():
    return flops.tree(Lengths(SHARED_PREFIX, GROUP_PREFIX, SUFFIX, 0), GROUPS, ROWS, triangular=False)


def test_a_tree_by_hand():
    # tokens 16 + 2 (8 + 3 · 12) = 104; a suffix's tokens see 16 + 8 keys above them, a group prefix's 16, so
    # 2 (8 · 16 + 36 · 24) = 1984; own squares 256 + 2 (64 + 3 · 144) = 1248, of which causality leaves
    # (1248 + 104) / 2 = 676.
    assert work() == (104, 0, 1984 + 676, 1984 + 1248)
    lengths = Lengths(SHARED_PREFIX, GROUP_PREFIX, SUFFIX - 5, 5)
    assert flops.tree(lengths, GROUPS, ROWS, triangular=True) == (104, 30, 2660, 2660)


def test_the_forward_pass_is_what_is_traced():
    assert flops.forward(TINY, work(), work().computed) == traced("none", backward=False)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_backward_pass_is_what_is_traced(remat):
    # Recomputing a layer need not recompute its very last product, which nothing of its gradient reads.
    spared = 2 * TINY.num_layers * TINY.mlp_dim * TINY.embed_dim * work().tokens if remat == "full" else 0
    assert flops.executed(TINY, work(), remat=remat, attention="xla") == pytest.approx(traced(remat), abs=spared)


def test_a_frozen_model_costs_two_passes_and_its_adapters_three():
    config = dataclasses.replace(TINY, lora=lora.parse(4, 8.0, "all"))
    ours = flops.executed(config, work(), remat="none", attention="xla")
    # The first layer's inputs need no gradient, which the formula counts.
    assert ours == pytest.approx(traced("none", config), rel=0.15)
    assert ours < flops.executed(TINY, work(), remat="none", attention="xla")


def test_six_times_parameters_times_tokens():
    model = presets.preset("qwen3_4b")
    long = flops.tree(Lengths(0, 0, 0, 1), 1, 1_000_000, triangular=True)
    # Short rows: attention is nothing, and what is left is 6 N a token (the embedding is the head).
    assert flops.useful(model, long) == pytest.approx(6 * model.num_parameters * long.tokens, rel=1e-3)
