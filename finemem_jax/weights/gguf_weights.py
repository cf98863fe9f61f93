"""Reads GGUF files of Llama, Qwen2 and Qwen3 models into the parameters of a Decoder."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from typing import Any

import gguf
import jax
import numpy as np

from finemem_jax.models import decoder, presets
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.weights import hf_weights

FAMILIES = ("llama", "qwen2", "qwen3")
# Our names of a layer's parameters → llama.cpp's.
KERNELS = {
    "query": "attn_q.weight",
    "key": "attn_k.weight",
    "value": "attn_v.weight",
    "out": "attn_output.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
_VECTORS = {
    "query_bias": "attn_q.bias",
    "key_bias": "attn_k.bias",
    "value_bias": "attn_v.bias",
    "query_norm": "attn_q_norm.weight",
    "key_norm": "attn_k_norm.weight",
    "attention_norm": "attn_norm.weight",
    "mlp_norm": "ffn_norm.weight",
}
_OUTER = {"embedding": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}
ROPE_FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """An open GGUF file.

    Attributes:
        path: The file.
        reader: What the gguf library makes of it.
        config: The shape that its fields state.
    """

    path: pathlib.Path
    reader: gguf.GGUFReader
    config: DecoderConfig

    def load(self, config: DecoderConfig, shardings: Params, dtype: str) -> Params:
        """Reads the weights one parameter after the other; quantized tensors are dequantized.

        Args:
            config: `self.config`, or the preset that it is.
            shardings: Where each parameter is to lie.
            dtype: Of the parameters: "float32" or "bfloat16".

        Raises:
            ValueError: a tensor is missing or of another shape.
        """
        tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        found = places(config)
        for name, shape in found.values():
            _check(self.path, name, tensors.get(name), shape=shape)

        # Several devices ask for slices of one parameter, whose tensors can only be dequantized as a whole.
        @functools.lru_cache(maxsize=config.num_layers if jax.device_count() > 1 else 0)
        def whole(parameter: str, layer: int | None) -> np.ndarray:
            tensor = tensors[found[parameter, layer][0]]
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
            # llama.cpp interleaves the halves that we rotate together, of Llama's models only.
            heads = {"query": config.num_heads, "key": config.num_kv_heads}.get(parameter)
            if heads and config.family == "llama":
                array = _half_rotation(array, heads)
            return array.T if parameter in KERNELS else array

        return hf_weights.build(config, shardings, dtype, read=lambda name, layer, index: whole(name, layer)[index])


def places(config: DecoderConfig) -> dict[tuple[str, int | None], tuple[str, tuple[int, ...]]]:
    """Lists {(parameter, layer): (name, shape)} of all tensors of a model; files hold kernels as [out, in].

    Layer None: of parameters that are not a layer's.
    """
    state = decoder.abstract_params(config)
    found: dict[tuple[str, int | None], tuple[str, tuple[int, ...]]] = {
        (name, None): (_OUTER[name], state[name].shape) for name in _OUTER if name in state
    }
    for name, leaf in state["layers"].items():
        for i in range(config.num_layers):
            if name in KERNELS:
                found[name, i] = f"blk.{i}.{KERNELS[name]}", leaf.shape[:0:-1]
            else:
                found[name, i] = f"blk.{i}.{_VECTORS[name]}", leaf.shape[1:]
    return found


def _check(path: pathlib.Path, name: str, tensor: gguf.ReaderTensor | None, *, shape: tuple[int, ...]) -> None:
    if tensor is None:
        raise ValueError(f"{path}: tensor {name!r} is missing; the file is not a whole model: fetch it again.")
    found = tuple(int(size) for size in tensor.shape[::-1])
    if found != shape:
        raise ValueError(
            f"{path}: tensor {name!r} has shape {found}, but the file's own fields make it {shape}; fetch it again."
        )


def _half_rotation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes llama.cpp's row order for queries and keys, which interleaves the halves that we rotate together."""
    out_dim, in_dim = weight.shape
    pairs = weight.reshape(num_heads, out_dim // num_heads // 2, 2, in_dim)
    return pairs.swapaxes(1, 2).reshape(out_dim, in_dim)


def open_file(path: pathlib.Path) -> GgufFile:
    """Opens a GGUF file and reads its shape.

    Raises:
        ValueError: it is none, cut short, or of a model that the decoder does not compute.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as a GGUF file ({type(error).__name__}: {error}); "
            "it may be cut short or of another format: fetch it again, or set model.weights to another file."
        ) from error
    return GgufFile(path, reader, _read_config(reader, path))


def _read_config(reader: gguf.GGUFReader, path: pathlib.Path) -> DecoderConfig:
    """The shape that a file's fields and tensors state."""

    def field(name: str, default: Any = None) -> Any:
        found = reader.fields.get(name)
        return default if found is None else found.contents()

    family = field("general.architecture")
    if family not in FAMILIES:
        raise ValueError(
            f"{path} holds architecture {family!r}; model.weights must be a GGUF file of {', '.join(FAMILIES)}."
        )
    for name in ("expert_count", "attention.sliding_window", "rope.scaling.type"):
        if field(f"{family}.{name}") not in (None, 0, "none"):
            raise ValueError(
                f"{path}: {family}.{name}={field(f'{family}.{name}')!r} is not supported; use a dense model with full "
                "attention and no such scaling."
            )

    def number(name: str, default: float | None = None) -> Any:
        value = field(f"{family}.{name}", default)
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{path}: {family}.{name} must be a positive number, got {value!r}; fetch the file again.")
        return value

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if _OUTER["embedding"] not in tensors:
        raise ValueError(f"{path}: tensor {_OUTER['embedding']!r} is missing; the file is not a whole model.")
    heads, width = number("attention.head_count"), number("embedding_length")
    config = DecoderConfig(
        name=path.stem,
        vocab_size=int(tensors[_OUTER["embedding"]].shape[1]),
        embed_dim=width,
        mlp_dim=number("feed_forward_length"),
        num_layers=number("block_count"),
        num_heads=heads,
        num_kv_heads=number("attention.head_count_kv", heads),
        head_dim=number("attention.key_length", width // heads),
        rope_theta=_as_written(number("rope.freq_base", 10_000.0)),
        norm_epsilon=_as_written(number("attention.layer_norm_rms_epsilon")),
        tie_embeddings=_OUTER["head"] not in tensors,
        max_length=number("context_length"),
        family=family,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )
    if number("rope.dimension_count", config.head_dim) != config.head_dim:
        raise ValueError(
            f"{path}: {family}.rope.dimension_count is not the heads' width; such models are not supported."
        )
    if ROPE_FACTORS not in tensors:
        return config
    factors = gguf.dequantize(tensors[ROPE_FACTORS].data, tensors[ROPE_FACTORS].tensor_type)
    return _with_scaling(config, factors, path)


def _as_written(value: float) -> float:
    """The decimal number that was rounded to a float32: 1e-5, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _with_scaling(config: DecoderConfig, factors: np.ndarray, path: pathlib.Path) -> DecoderConfig:
    """The config with the rope scaling whose result, instead of its numbers, the file holds."""
    plain = decoder.rotary_frequencies(config)
    for scaling in {preset.rope_scaling for preset in presets.PRESETS.values()}:
        scaled = dataclasses.replace(config, rope_scaling=scaling)
        expected = plain / decoder.rotary_frequencies(scaled)
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4):
            return scaled
    raise ValueError(
        f"{path}: its {ROPE_FACTORS} (divided by up to {math.ceil(float(factors.max()))}) are of no rope scaling that "
        "is known here (Llama 3.1 to 3.3); use the model's safetensors instead."
    )
