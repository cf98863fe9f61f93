"""Tests of finemem_jax/models/sharding.py. Two CPU devices stand in for a pod."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from finemem_jax.models import decoder, presets, sharding

TINY = presets.preset("tiny")


def test_rules_reach_every_parameter():
    shardings = sharding.param_shardings(TINY, sharding.make_mesh(1, 2, 1))
    assert jax.tree.structure(shardings) == jax.tree.structure(decoder.init(TINY, 0))
    assert shardings["embedding"].spec == P("tensor", "fsdp")
    assert shardings["layers"]["down"].spec == P(None, "tensor", "fsdp")


def test_minus_one_takes_what_is_left():
    assert dict(sharding.make_mesh(1, -1, 1).shape) == {"data": 1, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, -1, 1), (-1, -1, 1), (0, 1, 2)])
def test_wrong_mesh_is_refused(sizes):
    with pytest.raises(ValueError, match="mesh .*devices"):
        sharding.make_mesh(*sizes)


def test_mesh_that_does_not_divide_the_model_is_refused():
    odd = presets.DecoderConfig("odd", 384, 49, 96, 2, 3, 3, 16, 1e4, 1e-5, True, 64)
    # 3 heads of 16 channels: 48 could be halved, but the second half would begin inside a head.
    with pytest.raises(ValueError, match=r"mesh\.tensor=2 does not divide num_heads=3 of odd; set mesh\.tensor=1"):
        sharding.param_shardings(odd, sharding.make_mesh(1, 1, 2))
    with pytest.raises(ValueError, match=r"mesh\.fsdp=2 does not divide axis 'embed' \(49\).*set mesh\.fsdp=1"):
        sharding.param_shardings(odd, sharding.make_mesh(1, 2, 1))


def test_rows_are_split_only_where_that_works():
    mesh = sharding.make_mesh(1, 2, 1)
    assert sharding.rows(mesh, 4).spec == P(("data", "fsdp"))
    assert sharding.rows(mesh, 3).spec == P()
