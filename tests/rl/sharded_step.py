"""One training step of a tiny model on eight simulated devices, compared with one device; run by sharded_step_test.py.

XLA_FLAGS=--xla_force_host_platform_device_count=8 PYTHONPATH=.:tests python tests/rl/sharded_step.py [--all]
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import random_batches
from finemem_jax.models import decoder, lora, presets, sharding
from finemem_jax.rl import batching, learner
from finemem_jax.rl.grpo import ObjectiveOptions

TINY = presets.preset("tiny")
MESHES = ((2, 2, 2), (1, 8, 1), (8, 1, 1), (1, 4, 2)) if "--all" in sys.argv else ((2, 2, 2),)


def step(config, params, mesh, attention="xla"):
    """One update by SGD, so that the change of the parameters is the gradient. Returns the new parameters."""
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    groups = random_batches.random_rows(1, groups=8)
    params = jax.tree.map(jnp.copy, params)
    if mesh is not None:
        params = sharding.place(config, params, mesh)
    packed = batching.microbatches(groups, batching.Packing(8, 4, 6, data_shards=shards))
    batches = [batch for batch, _ in packed]
    if mesh is not None:
        batches = [jax.tree.map(lambda x: jax.device_put(x, sharding.rows(mesh, len(x))), batch) for batch in batches]
    options = learner.LearnerOptions(
        config, decoder.Compute(attention=attention, mesh=mesh), ObjectiveOptions(entropy_weight=0.01)
    )
    frozen, trained = lora.split(params)
    tx = optax.sgd(0.1)
    state, metrics = learner.update(random_batches.learner_of(tx, options, frozen), learner.init(trained, tx), batches)
    assert metrics["loss/gradient_norm"] > 0
    if mesh is not None:
        jax.tree.map(lambda new, old: assert_same_place(new, old), state.params, lora.split(params)[1])
    return jax.tree.map(np.asarray, state.params)


def assert_same_place(new, old):
    """An update must leave parameters where they were: no device may come to hold more than its share."""
    assert new.sharding.is_equivalent_to(old.sharding, new.ndim), (new.sharding, old.sharding)


def largest_difference(one, other):
    """Over all parameters."""
    return max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


def main():
    found = {}
    for name, adapters in (("full", None), ("lora", lora.parse(4, 8.0, "all"))):
        config = dataclasses.replace(TINY, lora=adapters)
        params = decoder.init(config, 0)
        one = step(config, params, None)
        assert largest_difference(one, lora.split(params)[1]) > 1e-4
        for sizes in MESHES:
            mesh = sharding.make_mesh(*sizes)
            found[f"{name} {sizes}"] = largest_difference(step(config, params, mesh), one)
        if adapters is None:
            mesh = sharding.make_mesh(2, 2, 2)
            found["full (2, 2, 2), kernel"] = largest_difference(step(config, params, mesh, "splash"), one)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
