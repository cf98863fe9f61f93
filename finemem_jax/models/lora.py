"""Low-rank adapters as part of a decoder's parameters: telling them apart, merging them, PEFT's files.

An adapted matrix "query" has the parameters "query_lora_a" and "query_lora_b" beside it (see `presets.Lora`). The model
without adapters is the same parameters without these, so a frozen base is at the same time the reference of a KL.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from finemem_jax.models import decoder, presets
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig, Lora

_A, _B = "_lora_a", "_lora_b"

# PEFT's names of the matrices inside a layer.
_PEFT_NAMES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


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
    """The shape of the model without adapters."""
    return dataclasses.replace(config, lora=None)


def is_adapter(name: str) -> bool:
    """Whether a layer's parameter of this name belongs to an adapter."""
    return name.endswith((_A, _B))


@functools.partial(jax.jit, static_argnums=(0, 1))
def init(config: DecoderConfig, seed: int) -> Params:
    """New adapters, whose products are 0; the rest of the tree is left out."""
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


def combine(frozen: Params, trained: Params) -> Params:
    """Undoes `split`."""
    if not frozen:
        return trained
    return {**frozen, "layers": frozen["layers"] | trained["layers"]}


def merge(config: DecoderConfig, params: Params) -> Params:
    """Adds the adapters to their matrices: parameters of the model `without(config)` that compute the same."""
    return params if config.lora is None else _merge(config, params)


@functools.partial(jax.jit, static_argnums=0)
def _merge(config, params):
    frozen, adapters = split(params)
    layers = dict(frozen["layers"])
    for name in config.lora.targets:
        a, b = adapters["layers"][name + _A], adapters["layers"][name + _B]
        product = jnp.einsum("nir,nro->nio", a, b, preferred_element_type=jnp.float32)
        scaled = config.lora.alpha / config.lora.rank * product
        layers[name] = (layers[name].astype(jnp.float32) + scaled).astype(layers[name].dtype)
    return {**frozen, "layers": layers}


def save_peft(folder: pathlib.Path, config: DecoderConfig, params: Params, base_model: str) -> None:
    """Writes the adapters as PEFT does: adapter_config.json and adapter_model.safetensors.

    Args:
        base_model: What PEFT is to load the base from: a folder or a hub id.
    """
    assert config.lora is not None, "a model without adapters has none to save"
    adapters = split(params)[1]["layers"]
    tensors = {}
    for name in config.lora.targets:
        a, b = (np.asarray(adapters[name + part]) for part in (_A, _B))
        for i in range(config.num_layers):
            prefix = f"base_model.model.model.layers.{i}.{_PEFT_NAMES[name]}"
            # Files hold [out, in].
            tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(a[i].T)
            tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(b[i].T)
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [_PEFT_NAMES[name].split(".")[1] for name in config.lora.targets],
    }
    folder.mkdir(parents=True, exist_ok=True)
    # The library's own `save_file` would let nobody but its owner read the file.
    (folder / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load_peft(folder: pathlib.Path, config: DecoderConfig) -> Params:
    """Reads what `save_peft` wrote, or PEFT: adapters alone, as `split` returns them.

    Raises:
        ValueError: missing or foreign tensors, or other shapes than `config.lora`'s.
    """
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder} holds no adapter_model.safetensors; give the folder of a PEFT LoRA adapter.")
    found = safetensors.numpy.load_file(path)
    wanted = split(decoder.abstract_params(config))[1]["layers"]
    layers: dict[str, jax.Array] = {}
    for name, leaf in wanted.items():
        matrix, part = name[: -len(_A)], {_A: "lora_A", _B: "lora_B"}[name[-len(_A) :]]
        rows = []
        for i in range(config.num_layers):
            key = f"base_model.model.model.layers.{i}.{_PEFT_NAMES[matrix]}.{part}.weight"
            if key not in found:
                raise ValueError(f"{path}: tensor {key!r} is missing; lora.targets must be what the adapter has.")
            rows.append(found.pop(key).T)
            if rows[-1].shape != leaf.shape[1:]:
                raise ValueError(
                    f"{path}: tensor {key!r} has shape {rows[-1].shape[::-1]}, but {config.name} with lora.rank="
                    f"{leaf.shape[1:][part == 'lora_A']} needs {leaf.shape[:0:-1]}; set lora.rank to the adapter's."
                )
        layers[name] = jnp.asarray(np.stack(rows))
    if found:
        raise ValueError(f"{path} adapts more than lora.targets says: {', '.join(sorted(found)[:3])}, …; add it there.")
    return {"layers": layers}
