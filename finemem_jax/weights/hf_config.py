"""Reads Hugging Face's config.json into a DecoderConfig, and writes it. Refuses by name what the decoder has not."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from finemem_jax.models.presets import DecoderConfig, RopeScaling
from finemem_jax.runtime import files

FILE = "config.json"
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_REMEDY = f"set model.weights to a model of {', '.join(_ARCHITECTURES.values())} in its plain form"


def read(folder: pathlib.Path) -> DecoderConfig:
    """Reads the shape that a folder's config.json states.

    Fields that a file may leave out have the values that transformers gives them.

    Raises:
        ValueError: no such file, no JSON, a field is missing or of another kind, or the model needs something that
            this decoder has not.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {FILE}, so it is no Hugging Face model; set model.weights to a folder with {FILE}, "
            "tokenizer.json and *.safetensors."
        )
    return from_fields(files.read_json(path, "fetch it again"), path)


def from_fields(fields: dict[str, Any], path: pathlib.Path) -> DecoderConfig:
    """Reads a shape, like `read`, from the file's contents."""
    family = fields.get("model_type")
    architecture = (fields.get("architectures") or [None])[0]
    if family not in _ARCHITECTURES or architecture not in (None, _ARCHITECTURES[family]):
        raise ValueError(
            f"{path}: model_type {family!r} with architecture {architecture!r} is not supported; {_REMEDY}."
        )
    for name, plain in _UNSUPPORTED.items():
        value = fields.get(name)
        if value not in plain:
            raise ValueError(f"{path}: {name}={value!r} is not supported; {_REMEDY} ({name}={plain[-1]!r}).")

    def count(name: str, default: int | None = None) -> int:
        value = default if fields.get(name) is None else fields[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{path}: {name} must be a positive whole number, got {value!r}; fetch the file again.")
        return value

    layer_types = fields.get("layer_types") or []
    if set(layer_types) - {"full_attention"}:
        raise ValueError(f"{path}: layer_types={sorted(set(layer_types))} is not supported; {_REMEDY}.")
    heads = count("num_attention_heads")
    kv_heads = count("num_key_value_heads", heads if family == "llama" else None)
    if heads % kv_heads:
        raise ValueError(f"{path}: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}.")
    theta, scaling = _rope(fields, path)
    return DecoderConfig(
        name=path.parent.name,
        vocab_size=count("vocab_size"),
        embed_dim=count("hidden_size"),
        mlp_dim=count("intermediate_size"),
        num_layers=count("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=count("head_dim", 128 if family == "qwen3" else count("hidden_size") // heads),
        rope_theta=theta,
        norm_epsilon=_positive(fields.get("rms_norm_eps", 1e-6), "rms_norm_eps", path),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        max_length=count("max_position_embeddings"),
        family=family,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_scaling=scaling,
    )


# Field → values under which the decoder computes the model; the last one is named in messages. A field that is not
# there is None. `sliding_window` itself is of no consequence without `use_sliding_window`.
_UNSUPPORTED = {
    "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, False),
    "quantization_config": (None,),
    "rope_interleaved": (None, False),
}


def _rope(fields: dict[str, Any], path: pathlib.Path) -> tuple[float, RopeScaling | None]:
    """θ and the scaling, from "rope_parameters" (transformers 5) or "rope_theta" and "rope_scaling" (before)."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = _positive(rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0, "rope_theta", path)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1
    if kind not in ("default", "llama3") or partial != 1:
        raise ValueError(
            f"{path}: rope scaling of type {kind!r} (partial_rotary_factor {partial}) is not supported, only 'llama3' "
            f"and none; {_REMEDY}, or take the scaling out of the file if your texts are short enough without it."
        )
    if kind == "default":
        return theta, None
    try:
        scaling = RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_length=int(rope["original_max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: rope scaling 'llama3' lacks a number: {error}; fetch the file again.") from error
    return theta, scaling


def _positive(value: Any, name: str, path: pathlib.Path) -> float:
    if not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{path}: {name} must be a positive number, got {value!r}; fetch the file again.")
    return float(value)


def to_fields(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """Writes what config.json says of this shape, in the form that transformers before and since version 5 read.

    Raises:
        ValueError: no family computes it.
    """
    if (config.qkv_bias, config.qk_norm) != (config.family == "qwen2", config.family == "qwen3"):
        raise ValueError(
            f"no Hugging Face architecture is {config.family!r} with qkv_bias={config.qkv_bias} and "
            f"qk_norm={config.qk_norm}; biases are 'qwen2', normalized heads are 'qwen3'."
        )
    scaling = None
    if config.rope_scaling is not None:
        scaling = dataclasses.asdict(config.rope_scaling)
        scaling["original_max_position_embeddings"] = scaling.pop("original_max_length")
        scaling["rope_type"] = "llama3"
    fields = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if config.family != "qwen2":
        fields["attention_bias"] = False
    if config.family == "llama":
        return fields | {"mlp_bias": False}
    return fields | {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_layers}
