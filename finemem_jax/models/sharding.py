"""Where parameters and batches live: one table from logical axis names to mesh axes."""

from __future__ import annotations

import math

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from finemem_jax.models import decoder
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig

AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter → mesh axis; None means whole on every device.
RULES = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "norm": None,
}


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """Arranges all devices as [data, fsdp, tensor].

    Args:
        data, fsdp, tensor: Sizes; one of them may be -1 and takes what is left.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    count = jax.device_count()
    known = math.prod(size for size in sizes if size > 0)
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes) or count % known:
        raise ValueError(
            f"mesh (data={data}, fsdp={fsdp}, tensor={tensor}) does not fit {count} devices; one size may be -1."
        )
    sizes = [count // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != count:
        raise ValueError(
            f"mesh (data={data}, fsdp={fsdp}, tensor={tensor}) uses {math.prod(sizes)} of {count} devices; "
            f"set one size to -1, for example mesh.fsdp={count // known * max(fsdp, 1)}."
        )
    return Mesh(np.asarray(jax.devices()).reshape(sizes), AXES)


def param_shardings(config: DecoderConfig, mesh: Mesh) -> Params:
    """The sharding of every parameter, by RULES.

    Raises:
        ValueError: a mesh axis does not divide the dimension that it splits.
    """
    state = nnx.state(decoder.abstract(decoder.Decoder, config), nnx.Param)

    def spec(path, variable):
        names = variable.get_metadata("out_sharding")
        axes = [RULES[name] for name in names]
        for name, axis, size in zip(names, axes, variable.get_value().shape, strict=True):
            if axis and size % mesh.shape[axis]:
                raise ValueError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide axis {name!r} ({size}) of parameter "
                    f"{jax.tree_util.keystr(path, simple=True, separator='.')}; choose a divisor of {size}."
                )
        return NamedSharding(mesh, P(*axes))

    leaves = jax.tree_util.tree_map_with_path(spec, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.to_pure_dict(leaves)


def place(config: DecoderConfig, params: Params, mesh: Mesh) -> Params:
    """Puts parameters where the rules want them."""
    return jax.tree.map(jax.device_put, params, param_shardings(config, mesh))


def rows(mesh: Mesh, count: int) -> NamedSharding:
    """The sharding of a batch array whose first axis counts rows: split over data and fsdp where that divides it."""
    axes = ("data", "fsdp")
    split = math.prod(mesh.shape[axis] for axis in axes)
    return NamedSharding(mesh, P(axes) if count % split == 0 else P())
