"""Tells low-rank adapters among a decoder's parameters apart, and merges them into what they adapt.

An adapted matrix "query" has the parameters "query_lora_a" and "query_lora_b" beside it (see `presets.Lora`). The model
without adapters is the same parameters without these, so a frozen base is at the same time the reference of a KL.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from finemem_jax.models import decoder, presets
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig, Lora

A, B = "_lora_a", "_lora_b"


def parse(rank: int, alpha: float, targets: str) -> Lora | None:
    """Reads the settings of `config.lora`; None for rank 0.

    Args:
        targets: Names of matrices with commas between them, or "all".

    Raises:
        ValueError: an unknown name, or none.
    """
    if rank == 0:
        return None
    names = presets.MATRICES if targets == "all" else tuple(part.strip() for part in targets.split(",") if part.strip())
    unknown = [name for name in names if name not in presets.MATRICES]
    if unknown or not names:
        raise ValueError(
            f"lora.targets must be 'all', or some of {', '.join(presets.MATRICES)} with commas between them; "
            f"got {targets!r}."
        )
    return Lora(rank, alpha, tuple(name for name in presets.MATRICES if name in names))


def without(config: DecoderConfig) -> DecoderConfig:
    """Returns the shape of the model without adapters."""
    return dataclasses.replace(config, lora=None)


def is_adapter(name: str) -> bool:
    """Whether a layer's parameter of this name belongs to an adapter."""
    return name.endswith((A, B))


@functools.partial(jax.jit, static_argnums=(0, 1))
def init(config: DecoderConfig, seed: int) -> Params:
    """Returns new adapters, whose products are 0; the rest of the tree is left out."""
    # Under jit what is not returned is never computed: no second model is ever allocated.
    return split(decoder.init(config, seed))[1]


def split(params: Params) -> tuple[Params, Params]:
    """Returns (the parameters without adapters, the adapters alone); without adapters ({}, all parameters).

    So the second is what is trained, and the first what stays as it is.
    """
    layers = params["layers"]
    if not any(map(is_adapter, layers)):
        return {}, params
    base = {name: leaf for name, leaf in layers.items() if not is_adapter(name)}
    adapters = {name: leaf for name, leaf in layers.items() if is_adapter(name)}
    return {**params, "layers": base}, {"layers": adapters}


def combine(base: Params, trained: Params) -> Params:
    """Undoes `split`."""
    if not base:
        return trained
    return {**base, "layers": base["layers"] | trained["layers"]}


def merge(config: DecoderConfig, params: Params) -> Params:
    """Adds the adapters to their matrices: parameters of the model `without(config)` that compute the same."""
    return params if config.lora is None else _merge(config, params)


@functools.partial(jax.jit, static_argnums=0)
def _merge(config: DecoderConfig, params: Params) -> Params:
    assert config.lora is not None, "without adapters there is nothing to merge"
    base, adapters = split(params)
    layers = dict(base["layers"])
    for name in config.lora.targets:
        a, b = adapters["layers"][name + A], adapters["layers"][name + B]
        product = jnp.einsum("nir,nro->nio", a, b, preferred_element_type=jnp.float32)
        scaled = config.lora.alpha / config.lora.rank * product
        layers[name] = (layers[name].astype(jnp.float32) + scaled).astype(layers[name].dtype)
    return {**base, "layers": layers}
