"""Tests of finemem_jax/weights/gguf_weights.py: files of every family written here, and every way to be wrong."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parity_cases
from finemem_jax.models import decoder, logical_axes, presets, sharding
from finemem_jax.weights import gguf_weights

TINY = presets.preset("tiny")
CASES = {config.name: config for config in (TINY, *parity_cases.CASES.values())}
KERNELS = dict(query="attn_q", key="attn_k", value="attn_v", out="attn_output")
KERNELS |= dict(gate="ffn_gate", up="ffn_up", down="ffn_down")
VECTORS = dict(attention_norm="attn_norm.weight", mlp_norm="ffn_norm.weight")
VECTORS |= dict(query_bias="attn_q.bias", key_bias="attn_k.bias", value_bias="attn_v.bias")
VECTORS |= dict(query_norm="attn_q_norm.weight", key_norm="attn_k_norm.weight")


def interleave(kernel, num_heads):
    """Reorders the rows of a [out, in] kernel as llama.cpp does: of each head, rows 0, C/2, 1, C/2 + 1, …"""
    width = len(kernel) // num_heads
    within = [i + half for i in range(width // 2) for half in (0, width // 2)]
    return kernel[[head * width + row for head in range(num_heads) for row in within]]


def tensors_of(config, params):
    tensors = {"token_embd.weight": params["embedding"], "output_norm.weight": params["final_norm"]}
    if not config.tie_embeddings:
        tensors["output.weight"] = params["head"]
    if config.rope_scaling:
        plain = decoder.rotary_frequencies(dataclasses.replace(config, rope_scaling=None))
        tensors["rope_freqs.weight"] = plain / decoder.rotary_frequencies(config)
    # Only Llama's files have their rows reordered.
    heads = dict(query=config.num_heads, key=config.num_kv_heads) if config.family == "llama" else {}
    for i in range(config.num_layers):
        for ours, leaf in params["layers"].items():
            array = np.asarray(leaf[i])
            if ours in KERNELS:
                array = interleave(array.T, heads[ours]) if ours in heads else array.T
                tensors[f"blk.{i}.{KERNELS[ours]}.weight"] = array
            else:
                tensors[f"blk.{i}.{VECTORS[ours]}"] = array
    return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}


def write(path, config, tensors, architecture=None, quantise=(), **fields):
    writer = gguf.GGUFWriter(path, architecture or config.family)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rope_theta)
    if config.head_dim * config.num_heads != config.embed_dim:
        writer.add_key_length(config.head_dim)
    for name, value in fields.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(name, value)
    for name, tensor in tensors.items():
        if name in quantise:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path, dtype="float32", sizes=None):
    found = gguf_weights.open_file(path)
    mesh = sharding.make_mesh(*sizes) if sizes else jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1),
                                                                      logical_axes.MESH)  # fmt: skip
    return found.load(found.config, sharding.param_shardings(found.config, mesh), dtype)


def random_params(config):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: decoder.init(config, 0))
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


@pytest.fixture(scope="module")
def tensors(params):
    return tensors_of(TINY, params)


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory, tensors):
    return write(tmp_path_factory.mktemp("weights") / "tiny.gguf", TINY, tensors)


# --------------------------------------------------------------------------------------
# Right files
# --------------------------------------------------------------------------------------


@pytest.fixture
def known_scaling(monkeypatch):
    # Files hold what the scaling amounts to, so that it must be that of a known model.
    scaled = parity_cases.CASES["llama_scaled"]
    monkeypatch.setitem(presets.PRESETS, scaled.name, scaled)


@pytest.mark.parametrize("config", CASES.values(), ids=list(CASES))
def test_loads_what_was_written(tmp_path, known_scaling, config):
    params = random_params(config)
    path = write(tmp_path / "a_model.gguf", config, tensors_of(config, params))
    assert gguf_weights.open_file(path).config == dataclasses.replace(config, name="a_model")
    got = load(path)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, got, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("sizes", [(1, 2, 1), (1, 1, 2)])
def test_parameters_are_spread_over_devices(tiny_file, params, sizes):
    got = load(tiny_file, sizes=sizes)
    jax.tree.map(np.testing.assert_array_equal, got, params)
    assert got["embedding"].addressable_shards[0].data.size == got["embedding"].size // 2


def test_bfloat16(tiny_file, params):
    got = load(tiny_file, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_half_rotation_by_hand():
    # One head of four channels. llama.cpp pairs neighbors (0 1)(2 3); we pair (0 2)(1 3): rows 0, 2, 1, 3.
    kernel = np.arange(4.0)[:, None] * np.ones((1, 2))
    np.testing.assert_array_equal(gguf_weights._half_rotation(kernel, 1)[:, 0], [0, 2, 1, 3])
    # Two heads of four: each alone.
    kernel = np.arange(8.0)[:, None] * np.ones((1, 2))
    np.testing.assert_array_equal(gguf_weights._half_rotation(kernel, 2)[:, 0], [0, 2, 1, 3, 4, 6, 5, 7])


def test_quantized_tensors_are_dequantized(tmp_path, tensors, params):
    # Q8_0 works on blocks of 32, so it takes a kernel whose inputs come in thirty-twos: mlp_dim, not embed_dim.
    name = "blk.1.ffn_down.weight"
    got = load(write(tmp_path / "q8.gguf", TINY, tensors, quantise=[name]))
    error = np.abs(got["layers"]["down"][1] - params["layers"]["down"][1])
    # A block's step is its largest entry over 127: at most 4 / 127 for normal entries, and half of it is the error.
    assert 0 < error.max() < 0.02
    np.testing.assert_array_equal(got["layers"]["down"][0], params["layers"]["down"][0])


# --------------------------------------------------------------------------------------
# Wrong files
# --------------------------------------------------------------------------------------

REMEDY = r"cannot be read as a GGUF file .*fetch it again, or set model\.weights to another file"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("head", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00"], ids=["random", "magic", "magic and version"])
def test_random_bytes(tmp_path, head, seed):
    path = tmp_path / "random.gguf"
    path.write_bytes(head + np.random.default_rng(seed).bytes(5000))
    with pytest.raises(ValueError, match=REMEDY):
        gguf_weights.open_file(path)


@pytest.mark.parametrize(
    "text", [b"", b"G", b"<html>404 Not Found</html>", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_other_formats(tmp_path, text):
    path = tmp_path / "other.gguf"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=REMEDY):
        gguf_weights.open_file(path)


@pytest.mark.parametrize("share", [0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file(tmp_path, tiny_file, share):
    path, whole = tmp_path / "cut.gguf", tiny_file.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=REMEDY):
        gguf_weights.open_file(path)


@pytest.mark.parametrize("changed", ["output_norm.weight", "blk.1.ffn_up.weight", "blk.0.attn_k.weight"])
def test_wrong_shape(tmp_path, tensors, changed):
    path = write(tmp_path / "shape.gguf", TINY, tensors | {changed: np.ones((7, 3), np.float32)})
    with pytest.raises(ValueError, match=rf"'{changed}' has shape \(7, 3\), but the file's own fields make it \("):
        load(path)


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.attn_k.weight"])
def test_missing_tensor(tmp_path, tensors, name):
    path = write(tmp_path / "part.gguf", TINY, {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(ValueError, match=f"tensor '{name}' is missing; the file is not a whole model"):
        load(path)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("gpt2", {}, r"architecture 'gpt2'; model\.weights must be a GGUF file of llama, qwen2, qwen3"),
        ("llama", {"llama.expert_count": 8}, r"llama\.expert_count=8 is not supported; use a dense model"),
        ("qwen2", {"qwen2.attention.sliding_window": 4096}, r"attention\.sliding_window=4096 is not supported"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, r"rope\.scaling\.type='yarn' is not supported"),
        ("llama", {"llama.rope.dimension_count": 8}, r"rope\.dimension_count is not the heads' width"),
    ],
)
def test_other_models(tmp_path, tensors, architecture, fields, message):
    path = write(tmp_path / "other.gguf", TINY, tensors, architecture, **fields)
    with pytest.raises(ValueError, match=message):
        gguf_weights.open_file(path)


def test_missing_field(tmp_path, tensors):
    writer = gguf.GGUFWriter(tmp_path / "poor.gguf", "llama")
    writer.add_tensor("token_embd.weight", tensors["token_embd.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"llama\.attention\.head_count must be a positive number, got None"):
        gguf_weights.open_file(tmp_path / "poor.gguf")


def test_unknown_rope_scaling(tmp_path, tensors):
    path = write(tmp_path / "slow.gguf", TINY, tensors | {"rope_freqs.weight": np.full(8, 3.0, np.float32)})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight \(divided by up to 3\) are of no rope scaling"):
        gguf_weights.open_file(path)
