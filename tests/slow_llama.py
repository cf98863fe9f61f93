"""A second Llama, in NumPy and float64, that others are held to; and a row that goes through the cache."""

import jax
import jax.numpy as jnp
import numpy as np

from finemem_jax.models import decoder, kv_cache
from finemem_jax.models.kv_cache import Context, NewTokens

extend = jax.jit(kv_cache.extend, static_argnums=0, donate_argnums=2)


def slow_hidden(config, model, ids, interleaved=False):
    """Final hidden states of one row, in float64, as the Llama paper and RoFormer write them.

    Args:
        model: "embedding", "norm" and "layers"; kernels are [out, in], as in checkpoints.
        interleaved: Whether rotary pairs are channels (2i, 2i + 1), as in RoFormer and llama.cpp, not (i, i + C/2).
    """
    c, group = config.head_dim, config.num_heads // config.num_kv_heads

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale

    def rotated(x):
        out = x.copy()
        for i in range(c // 2):
            angle = np.arange(len(x))[:, None] * config.rope_theta ** (-2 * i / c)
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + c // 2)
            out[..., a] = x[..., a] * np.cos(angle) - x[..., b] * np.sin(angle)
            out[..., b] = x[..., a] * np.sin(angle) + x[..., b] * np.cos(angle)
        return out

    x = model["embedding"][ids].astype(np.float64)
    for layer in model["layers"]:
        layer = {name: np.asarray(kernel, np.float64) for name, kernel in layer.items()}
        h = norm(x, layer["attention_norm"])
        queries = rotated((h @ layer["query"].T).reshape(len(ids), config.num_heads, c))
        keys = rotated((h @ layer["key"].T).reshape(len(ids), config.num_kv_heads, c))
        values = (h @ layer["value"].T).reshape(len(ids), config.num_kv_heads, c)
        mixed = np.zeros(queries.shape)
        for head in range(config.num_heads):
            logits = queries[:, head] @ keys[:, head // group].T / np.sqrt(c)
            logits[np.triu_indices(len(ids), 1)] = -np.inf
            probabilities = np.exp(logits - logits.max(-1, keepdims=True))
            probabilities /= probabilities.sum(-1, keepdims=True)
            mixed[:, head] = probabilities @ values[:, head // group]
        x = x + mixed.reshape(len(ids), -1) @ layer["out"].T
        h = norm(x, layer["mlp_norm"])
        gate = h @ layer["gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["up"].T)) @ layer["down"].T
    return norm(x, np.asarray(model["norm"], np.float64))


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def as_checkpoint(params):
    """Our parameters as [out, in] kernels, layer by layer."""
    layers = {name: np.asarray(leaf) for name, leaf in params["layers"].items()}
    return {
        "embedding": np.asarray(params["embedding"]),
        "norm": np.asarray(params["final_norm"]),
        "layers": [{name: leaf[i].T for name, leaf in layers.items()} for i in range(len(layers["query"]))],
    }


def strong_params(config):
    """Random parameters, larger than what `init` gives: attention is far from uniform, and no norm is one."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.3) + (x == 1), jnp.float32), decoder.init(config, 0)
    )


def cached_rows(config, params, ids, num_prefilled, prefix_tokens=0):
    """States of one row from `kv_cache.extend`: shared prefix, prefill with garbage behind it, then token by token."""
    laid_out = kv_cache.layout(config, params, "float32")

    def call(prefix, cache, tokens, prefix_length, start):
        context = Context(laid_out, prefix, np.asarray(prefix_length))
        return extend(config, context, cache, new=NewTokens(np.array([tokens]), np.array([start])))

    prefix, parts = kv_cache.empty(config, 1, 0), []
    if prefix_tokens:
        # The shared prefix is padded as well: what stands behind its length must stay unseen.
        padded = np.concatenate([ids[:prefix_tokens], [1, 2, 3]])
        states, prefix = call(prefix, kv_cache.empty(config, 1, len(padded)), padded, 0, 0)
        parts.append(states[0, :prefix_tokens])
    own = ids[prefix_tokens:]
    garbage = np.full(3, 5)
    own_and_garbage = np.concatenate([own[:num_prefilled], garbage])
    states, cache = call(prefix, kv_cache.empty(config, 1, len(own) + 3), own_and_garbage, prefix_tokens, 0)
    parts.append(states[0, :num_prefilled])
    for start in range(num_prefilled, len(own)):
        states, cache = call(prefix, cache, own[start : start + 1], prefix_tokens, start)
        parts.append(states[0])
    return np.concatenate(parts)
