"""Tests of finemem_jax/runtime/checksums.py: the same on devices and on the host, others for other arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from finemem_jax.models import sharding
from finemem_jax.runtime import checksums

ARRAYS = {
    "stacked": np.random.default_rng(0).normal(size=(30, 4, 6)).astype(np.float32),
    "bfloat16": np.asarray(jnp.linspace(-3, 3, 84, dtype=jnp.bfloat16).reshape(14, 6)),
    "count": np.int32(41) * np.ones((), np.int32),
    "mask": np.arange(12).reshape(2, 6) % 5 == 0,
}


@pytest.mark.parametrize("name", ARRAYS)
def test_devices_and_host_agree(name):
    (found,) = checksums.checksums({name: jnp.asarray(ARRAYS[name])}).values()
    assert found == checksums.sum_of(ARRAYS[name])
    assert found.split()[0] == ARRAYS[name].dtype.name


def test_the_mesh_does_not_matter():
    mesh = sharding.make_mesh(1, 2, 1)
    split = jax.device_put(ARRAYS["stacked"], NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    assert checksums.checksums({"a": {"b": split}}) == {"a.b": checksums.sum_of(ARRAYS["stacked"])}


def test_every_bit_counts_and_nearly_every_exchange():
    array, draw = ARRAYS["stacked"], np.random.default_rng(1)
    whole, unseen = checksums.sum_of(array), 0
    for _ in range(500):
        changed = array.copy()
        changed.view(np.uint32).flat[draw.integers(array.size)] ^= np.uint32(1 << int(draw.integers(32)))
        assert checksums.sum_of(changed) != whole
        changed = array.copy()
        first, second = draw.choice(array.size, 2, replace=False)
        changed.flat[[first, second]] = changed.flat[[second, first]]
        unseen += checksums.sum_of(changed) == whole
    # About one in a thousand: both elements' differences and their places' have many factors of two.
    assert unseen <= 5
