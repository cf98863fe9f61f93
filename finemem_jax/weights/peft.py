"""Writes and reads low-rank adapters as PEFT does: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from finemem_jax.models import decoder, lora
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.weights import hf_weights


def _name(matrix: str) -> str:
    """PEFT's name of a layer's matrix, e.g. "self_attn.q_proj"."""
    return hf_weights.KERNELS[matrix].removesuffix(".weight")


def save(folder: pathlib.Path, config: DecoderConfig, params: Params, *, base_model: str) -> None:
    """Writes the adapters as PEFT does: adapter_config.json and adapter_model.safetensors.

    Args:
        base_model: What PEFT is to load the base from: a folder or a hub id.
    """
    assert config.lora is not None, "a model without adapters has none to save"
    adapters = lora.split(params)[1]["layers"]
    tensors = {}
    for name in config.lora.targets:
        a, b = (np.asarray(adapters[name + part]) for part in (lora.A, lora.B))
        for i in range(config.num_layers):
            prefix = f"base_model.model.model.layers.{i}.{_name(name)}"
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
        "target_modules": [_name(name).split(".")[1] for name in config.lora.targets],
    }
    folder.mkdir(parents=True, exist_ok=True)
    # The library's own `save_file` would let nobody but its owner read the file.
    (folder / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load(folder: pathlib.Path, config: DecoderConfig) -> Params:
    """Reads what `save` wrote, or PEFT: adapters alone, as `lora.split` returns them.

    Raises:
        ValueError: missing or foreign tensors, or other shapes than `config.lora`'s.
    """
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder} holds no adapter_model.safetensors; give the folder of a PEFT LoRA adapter.")
    found = safetensors.numpy.load_file(path)
    wanted = lora.split(decoder.abstract_params(config))[1]["layers"]
    layers: dict[str, jax.Array] = {}
    for name, leaf in wanted.items():
        matrix, part = name[: -len(lora.A)], {lora.A: "lora_A", lora.B: "lora_B"}[name[-len(lora.A) :]]
        rows = []
        for i in range(config.num_layers):
            key = f"base_model.model.model.layers.{i}.{_name(matrix)}.{part}.weight"
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
