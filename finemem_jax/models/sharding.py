"""Makes meshes, and puts parameters and batches where the table in `logical_axes` says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from finemem_jax.models import decoder, logical_axes
from finemem_jax.models.decoder import Params
from finemem_jax.models.logical_axes import Array
from finemem_jax.models.presets import DecoderConfig


def make_mesh(data: int, fsdp: int, tensor: int, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices as [data, fsdp, tensor].

    Args:
        data, fsdp, tensor: Sizes; one of them may be -1 and takes what is left.
        devices: None for all that this process sees.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    # Those of one process beside each other: `own` splits the mesh there.
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id)) if devices is None else devices
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
    return Mesh(np.asarray(devices).reshape(sizes), logical_axes.MESH)


def own_sizes(mesh: Mesh, count: int) -> tuple[int, int, int]:
    """Sizes of the mesh of one process's devices, where `count` processes share a mesh evenly.

    Raises:
        ValueError: "tensor" reaches over several processes.
    """
    devices, tensor = mesh.size // count, mesh.shape["tensor"]
    if devices % tensor:
        raise ValueError(
            f"mesh.tensor={tensor} must divide the {devices} devices of one process: each process decodes by itself. "
            f"Set mesh.tensor={math.gcd(devices, tensor)}."
        )
    fsdp = math.gcd(mesh.shape["fsdp"], devices // tensor)
    return devices // tensor // fsdp, fsdp, tensor


def own(params: Params, mesh: Mesh) -> Params:
    """Puts all parameters on this process's devices alone: a copy where several processes share a mesh."""
    count = jax.process_count()
    if count == 1:
        return params
    sizes = own_sizes(mesh, count)
    together = Mesh(mesh.devices.reshape(count, *sizes), ("processes", *logical_axes.MESH))
    alone = Mesh(together.devices[jax.process_index()], logical_axes.MESH)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
    # Whole in each process, and there split as before.
    where = jax.tree.map(lambda spec: NamedSharding(together, spec), specs)
    copies = jax.jit(lambda tree: tree, out_shardings=where)(params)
    return jax.tree.map(
        lambda leaf, spec: jax.make_array_from_single_device_arrays(
            leaf.shape, NamedSharding(alone, spec), [shard.data for shard in leaf.addressable_shards]
        ),
        copies,
        specs,
    )


def put(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    """Puts an array that every process has where it belongs."""
    if jax.process_count() == 1:
        return jax.device_put(array, where)
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def whole(array: Array) -> np.ndarray:
    """Gathers an array of which processes have parts into the host's memory of each."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def param_shardings(config: DecoderConfig, mesh: Mesh) -> Params:
    """Lists the sharding of every parameter, by `logical_axes.STORED`.

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

    def one(path: tuple[Any, ...], names: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        stored = [logical_axes.STORED[name] for name in names]
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
    return NamedSharding(mesh, P(logical_axes.ROWS) if count % logical_axes.size(mesh, logical_axes.ROWS) == 0 else P())
