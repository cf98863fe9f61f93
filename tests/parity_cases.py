"""Tiny models of every family with weights from a seed: what our decoder and transformers are compared on.

`make_parity_references.py` feeds these to transformers, `parity_test.py` to us.
"""

import dataclasses
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from finemem_jax.models.presets import DecoderConfig, RopeScaling

# Two rows; the longer one goes beyond `original_max_length` of the scaled model.
LENGTHS = (40, 21)
# Entries of each parameter's gradient that are stored beside its norm.
NUM_STORED = 12

# Ours → Hugging Face's, of one layer.
KERNELS = dict(query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj", out="self_attn.o_proj")
KERNELS |= dict(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
VECTORS = dict(attention_norm="input_layernorm.weight", mlp_norm="post_attention_layernorm.weight")
BIASES = {f"{name}_bias": f"self_attn.{name[0]}_proj.bias" for name in ("query", "key", "value")}
NORMS = dict(query_norm="self_attn.q_norm.weight", key_norm="self_attn.k_norm.weight")


def _shape(name, embed_dim, heads, kv_heads, head_dim, theta, epsilon, tied, **family):
    return DecoderConfig(name, 64, embed_dim, 88, 2, heads, kv_heads, head_dim, theta, epsilon, tied, 128, **family)


CASES = {
    config.name: config
    for config in (
        # Rotations of these channels: kept, slowed in part, and slowed in full. head_dim is not embed_dim / heads.
        _shape("llama_scaled", 48, 6, 2, 16, 10_000.0, 1e-5, True, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)),
        _shape("llama_odd_heads", 72, 9, 3, 8, 10_000.0, 1e-5, False),
        _shape("qwen2_tied", 56, 7, 1, 8, 1e6, 1e-6, True, family="qwen2", qkv_bias=True),
        _shape("qwen2_untied", 64, 4, 4, 16, 1e6, 1e-6, False, family="qwen2", qkv_bias=True),
        _shape("qwen3_tied", 40, 4, 2, 16, 1e6, 1e-6, True, family="qwen3", qk_norm=True),
        _shape("qwen3_untied", 48, 5, 1, 32, 5e6, 1e-6, False, family="qwen3", qk_norm=True),
    )
}


def config_json(config):
    """What a published config.json of this model says, written down by family."""
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
    }
    if config.family == "qwen2":
        # Qwen2's files say nothing of head_dim, and of sliding windows that they are not used.
        fields |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
        return fields | {"use_sliding_window": False, "sliding_window": 32_768, "max_window_layers": 2}
    fields |= {"head_dim": config.head_dim, "attention_bias": False}
    if config.family == "qwen3":
        fields |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
        return fields | {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 2}
    fields |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": False, "rope_scaling": None}
    if config.rope_scaling:
        scaling = dataclasses.asdict(config.rope_scaling)
        original = scaling.pop("original_max_length")
        fields["rope_scaling"] = scaling | {"rope_type": "llama3", "original_max_position_embeddings": original}
    return fields


def checkpoint(config):
    """Hugging Face's tensors {name: float32 array}, each drawn by its own name: order does not matter."""

    def draw(name, *shape):
        rng = np.random.default_rng(zlib.crc32(f"{config.name}/{name}".encode()))
        noise = rng.normal(size=shape).astype(np.float32)
        if name.endswith("norm.weight"):
            return (1 + 0.3 * noise).astype(np.float32)
        # Larger than what training starts with, so that attention is far from uniform.
        return (noise * (0.5 if len(shape) == 1 or "embed" in name else 1.5 * shape[1] ** -0.5)).astype(np.float32)

    d, f, c = config.embed_dim, config.mlp_dim, config.head_dim
    queries, keys = config.num_heads * c, config.num_kv_heads * c
    shapes = {"model.embed_tokens.weight": (config.vocab_size, d), "model.norm.weight": (d,)}
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    for i in range(config.num_layers):
        layer = {"self_attn.q_proj": (queries, d), "self_attn.k_proj": (keys, d), "self_attn.v_proj": (keys, d)}
        layer |= {"self_attn.o_proj": (d, queries), "input_layernorm": (d,), "post_attention_layernorm": (d,)}
        layer |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
        if config.family == "qwen3":
            layer |= {"self_attn.q_norm": (c,), "self_attn.k_norm": (c,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        if config.family == "qwen2":
            for letter, size in zip("qkv", (queries, keys, keys), strict=True):
                shapes[f"model.layers.{i}.self_attn.{letter}_proj.bias"] = (size,)
    return {name: draw(name, *shape) for name, shape in shapes.items()}


def publish(folder, config, num_shards=1, **changes):
    """Writes a checkpoint as published models have it, with the library's own writer."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(config)))
    tensors = checkpoint(config) | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if num_shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"part-{i % num_shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        safetensors.numpy.save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def token_rows(config):
    """One array of token ids per row."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, config.vocab_size, length) for length in LENGTHS]


# Of greedy generation: how many prompts, what ends a completion, and the longest one.
NUM_PROMPTS, END_IDS, NEW_TOKENS = 34, (3, 7), 12


def prompts(config):
    """Prompts of all lengths that leave room to answer; every third goes on where the one before ended."""
    rng = np.random.default_rng(11)
    found: list[list[int]] = []
    for i in range(NUM_PROMPTS):
        length = int(rng.integers(1, 60 if i % 3 else config.max_length - NEW_TOKENS - 60))
        fresh = rng.integers(0, config.vocab_size, length).tolist()
        found.append(found[-1] + fresh if i % 3 == 2 else fresh)
    return found


def stored_entries(name, size):
    """Which entries of a parameter's flat gradient [out, in] the reference holds."""
    return np.random.default_rng(zlib.crc32(name.encode())).integers(0, size, NUM_STORED)


def vectors_of(config):
    return VECTORS | (BIASES if config.qkv_bias else {}) | (NORMS if config.qk_norm else {})


def as_params(config, tensors):
    """A checkpoint as our parameters; written apart from the loader, whose tests compare with it."""

    def stacked(name):
        return np.stack([tensors[f"model.layers.{i}.{name}"] for i in range(config.num_layers)])

    layers = {ours: stacked(f"{theirs}.weight").swapaxes(1, 2) for ours, theirs in KERNELS.items()}
    layers |= {ours: stacked(theirs) for ours, theirs in vectors_of(config).items()}
    params = {"embedding": tensors["model.embed_tokens.weight"], "final_norm": tensors["model.norm.weight"]}
    params |= {} if config.tie_embeddings else {"head": tensors["lm_head.weight"]}
    return jax.tree.map(jnp.asarray, params | {"layers": layers})


def as_checkpoint(config, params):
    """Undoes `as_params`."""
    tensors = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["final_norm"]}
    if not config.tie_embeddings:
        tensors["lm_head.weight"] = params["head"]
    for i in range(config.num_layers):
        for ours, theirs in KERNELS.items():
            tensors[f"model.layers.{i}.{theirs}.weight"] = params["layers"][ours][i].T
        for ours, theirs in vectors_of(config).items():
            tensors[f"model.layers.{i}.{theirs}"] = params["layers"][ours][i]
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}
