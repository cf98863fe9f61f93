"""Where parameters and batches live on a mesh, by the table in `axes`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from finemem_jax.models import axes, decoder
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices as [data, fsdp, tensor].

    Args:
        data, fsdp, tensor: Sizes; one of them may be -1 and takes what is left.
        devices: None for all that this process sees.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    devices = jax.devices() if devices is None else devices
    count = len(devices)
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
    return Mesh(np.asarray(devices).reshape(sizes), axes.MESH)


def param_shardings(config: DecoderConfig, mesh: Mesh) -> Params:
    """The sharding of every parameter, by `axes.STORED`.

    Raises:
        ValueError: a mesh axis does not divide what it splits.
    """
    for field in ("num_heads", "num_kv_heads"):
        heads, tensor = getattr(config, field), mesh.shape["tensor"]
        if heads % tensor:
            raise ValueError(
                f"mesh.tensor={tensor} does not divide {field}={heads} of {config.name}; "
                f"set mesh.tensor={math.gcd(config.num_heads, config.num_kv_heads, tensor)} or another divisor."
            )

    def one(path, names, leaf):
        stored = [axes.STORED[name] for name in names]
        for name, axis, size in zip(names, stored, leaf.shape, strict=True):
            if axis and size % mesh.shape[axis]:
                raise ValueError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide axis {name!r} ({size}) of parameter "
                    f"{jax.tree_util.keystr(path, simple=True, separator='.')}; "
                    f"set mesh.{axis}={math.gcd(size, mesh.shape[axis])} or another divisor of {size}."
                )
        return NamedSharding(mesh, P(*stored))

    names = decoder.axis_names(decoder.Decoder, config)
    shapes = decoder.abstract_params(config)
    return jax.tree_util.tree_map_with_path(one, names, shapes, is_leaf=lambda x: isinstance(x, tuple))


def place(config: DecoderConfig, params: Params, mesh: Mesh) -> Params:
    """Puts parameters where the rules want them."""
    return jax.tree.map(jax.device_put, params, param_shardings(config, mesh))


def rows(mesh: Mesh, count: int) -> NamedSharding:
    """The sharding of a batch array whose first axis counts rows: split where that works out evenly, else whole."""
    return NamedSharding(mesh, P(axes.ROWS) if count % axes.size(mesh, axes.ROWS) == 0 else P())
