"""Tests of finemem_jax/models/decoder.py: against a second Llama in NumPy, and laws that hold for trees of rows."""

import dataclasses
import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finemem_jax.models import decoder, logical_axes, presets, sharding
from finemem_jax.weights import files

from slow_llama import as_checkpoint, cached_rows, log_softmax, slow_hidden, strong_params  # isort: skip

TINY = presets.preset("tiny")
SMOLLM = presets.preset("smollm2_135m")

hidden_states = jax.jit(decoder.hidden_states, static_argnames=("config", "compute"))
# For what runs once on tiny arrays: half the compile time, which is all the time there is.
UNOPTIMISED = {"xla_backend_optimization_level": 0}


# --------------------------------------------------------------------------------------
# Cases: a tree of shared prefix, group prefixes and suffixes, with the plain row behind each leaf
# --------------------------------------------------------------------------------------

# One shared prefix, two group prefixes, four leaves, all shorter than their arrays.
TREE_LENGTHS = [np.array([7]), np.array([3, 5]), np.array([4, 6, 1, 5])]
TREE_SHAPES = [(1, 8), (2, 5), (4, 6)]


def tree(tokens_of_path, filler):
    """Pads the pieces of each path into arrays; `filler(shape)` gives the padding."""
    tokens = [filler(shape) for shape in TREE_SHAPES]
    for leaf, ids in enumerate(tokens_of_path):
        start = 0
        for level, rows in enumerate((0, leaf // 2, leaf)):
            length = TREE_LENGTHS[level][rows]
            tokens[level][rows, :length] = ids[start : start + length]
            start += length
    return tokens


def paths_of(rng, ids):
    """The plain row behind each leaf: prefixes in common, leaves of `ids` in random order."""
    shared_prefix, rest = ids[: TREE_LENGTHS[0][0]], ids[TREE_LENGTHS[0][0] :]
    group_prefixes = [rng.permutation(rest)[:n] for n in TREE_LENGTHS[1]]
    return [
        np.concatenate([shared_prefix, group_prefixes[leaf // 2], rng.permutation(rest)[:n]])
        for leaf, n in enumerate(TREE_LENGTHS[2])
    ]


def assert_tree_agrees(states, rows, atol):
    """Compares each path's states, level by level, with those of its plain row."""
    for leaf, row in enumerate(rows):
        start = 0
        for level, place in enumerate((0, leaf // 2, leaf)):
            length = TREE_LENGTHS[level][place]
            np.testing.assert_allclose(states[level][place, :length], row[start : start + length], rtol=0, atol=atol)
            start += length


@pytest.fixture(scope="module")
def tiny_params():
    return strong_params(TINY)


@pytest.fixture(scope="module")
def tiny_paths():
    rng = np.random.default_rng(1)
    return paths_of(rng, rng.integers(0, TINY.vocab_size, 24))


@pytest.fixture(scope="module")
def tiny_rows(tiny_params, tiny_paths):
    return [slow_hidden(TINY, as_checkpoint(tiny_params), ids) for ids in tiny_paths]


# --------------------------------------------------------------------------------------
# Tiny, random weights
# --------------------------------------------------------------------------------------


def test_plain_rows_agree_with_numpy(tiny_params, tiny_paths, tiny_rows):
    length = max(map(len, tiny_paths)) + 2
    tokens = np.stack([np.pad(ids, (0, length - len(ids)), constant_values=3) for ids in tiny_paths])
    (states,) = hidden_states(TINY, tiny_params, [tokens], lengths=[np.array([len(ids) for ids in tiny_paths])])
    for got, expected in zip(states, tiny_rows, strict=True):
        np.testing.assert_allclose(got[: len(expected)], expected, rtol=0, atol=1e-4)


def test_tree_agrees_with_numpy(tiny_params, tiny_paths, tiny_rows):
    tokens = tree(tiny_paths, lambda shape: np.zeros(shape, int))
    assert_tree_agrees(hidden_states(TINY, tiny_params, tokens, lengths=TREE_LENGTHS), tiny_rows, atol=1e-4)


# The loss runs over the leaves' tokens, as in training; their prefixes get gradient through attention alone.
DIRECTIONS = [np.random.default_rng(2).normal(size=(n, TINY.embed_dim)).astype(np.float32) for n in TREE_LENGTHS[2]]


@pytest.fixture(scope="module")
def plain_gradient(tiny_params, tiny_paths):
    lengths = np.array([len(ids) for ids in tiny_paths])
    rows = np.stack([np.pad(ids, (0, lengths.max() - len(ids))) for ids in tiny_paths])

    def loss(params):
        (states,) = decoder.hidden_states(TINY, params, [rows], lengths=[lengths], compute=decoder.Compute("none"))
        return sum((row[n - len(d) : n] * d).sum() for row, n, d in zip(states, lengths, DIRECTIONS, strict=True))

    return jax.jit(jax.value_and_grad(loss), compiler_options=UNOPTIMISED)(tiny_params)


@pytest.mark.parametrize("remat", ["attention", "full"])
def test_tree_has_the_gradient_of_plain_rows(tiny_params, tiny_paths, plain_gradient, remat):
    tokens = tree(tiny_paths, lambda shape: np.zeros(shape, int))

    def loss(params):
        leaves = decoder.hidden_states(TINY, params, tokens, lengths=TREE_LENGTHS, compute=decoder.Compute(remat))[-1]
        return sum((leaf[: len(d)] * d).sum() for leaf, d in zip(leaves, DIRECTIONS, strict=True))

    got, slopes = jax.jit(jax.value_and_grad(loss), compiler_options=UNOPTIMISED)(tiny_params)
    np.testing.assert_allclose(got, plain_gradient[0], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(plain_gradient[1]), strict=True):
        scale = np.abs(b).max()
        assert scale > 0
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=1e-4)


def test_padding_contents_change_nothing(tiny_params, tiny_paths):
    rng = np.random.default_rng(3)
    zeros = tree(tiny_paths, lambda shape: np.zeros(shape, int))
    noise = tree(tiny_paths, lambda shape: rng.integers(0, TINY.vocab_size, shape))
    expected, got = (hidden_states(TINY, tiny_params, tokens, lengths=TREE_LENGTHS) for tokens in (zeros, noise))
    for level, lengths in enumerate(TREE_LENGTHS):
        assert np.isfinite(got[level]).all()
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(got[level][row, :length], expected[level][row, :length])


def test_later_tokens_do_not_reach_back(tiny_params):
    tokens = np.arange(12)[None]
    other = np.where(np.arange(12) < 6, tokens, 99)
    (a,), (b,) = (hidden_states(TINY, tiny_params, [ids], lengths=[np.array([12])]) for ids in (tokens, other))
    np.testing.assert_array_equal(a[:, :6], b[:, :6])
    assert np.abs(a[:, 6:] - b[:, 6:]).max(-1).min() > 1e-3


def test_untied_head():
    config = dataclasses.replace(TINY, name="untied", tie_embeddings=False)
    params = decoder.init(config, 0)
    np.testing.assert_array_equal(decoder.output_head(config, params), params["head"])
    assert not np.array_equal(params["head"], params["embedding"])
    np.testing.assert_array_equal(decoder.output_head(TINY, decoder.init(TINY, 0)), decoder.init(TINY, 0)["embedding"])


def test_init_depends_on_the_seed_alone():
    a, b, other = (decoder.init(TINY, seed) for seed in (1, 1, 2))
    assert all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
    assert not np.array_equal(a["embedding"], other["embedding"])
    # Layers are drawn apart, or they would all compute the same.
    assert not np.array_equal(a["layers"]["query"][0], a["layers"]["query"][1])


@pytest.mark.parametrize("name", presets.PRESETS)
def test_num_parameters_counts_them_all(name):
    config = presets.preset(name)
    shapes = jax.eval_shape(functools.partial(decoder.init, config, 0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == config.num_parameters


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"model\.name must be one of tiny, .*; got 'smollm3'"):
        presets.preset("smollm3")


# --------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------


def test_rms_norm_by_hand():
    # Mean square of (3, 4) is 12.5; with ε = 3.5 its root is 4. Scaled by (2, 1).
    got = decoder.rms_norm(jnp.array([[3.0, 4.0]]), jnp.array([2.0, 1.0]), 3.5)
    np.testing.assert_allclose(got, [[1.5, 1.0]], rtol=1e-6)


def test_rotary_depends_on_distance_alone():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, TINY.head_dim)).astype(np.float32)

    def product(query_position, key_position):
        at = [decoder.rotary(TINY, jnp.array([[p]])) for p in (query_position, key_position)]
        return (decoder.rotate(query[:, None, None], at[0]) * decoder.rotate(key[:, None, None], at[1])).sum()

    np.testing.assert_allclose(product(0, 0), (query * key).sum(), rtol=1e-5)
    np.testing.assert_allclose(product(105, 100), product(5, 0), rtol=1e-3)
    assert abs(product(6, 0) - product(5, 0)) > 1e-2


# --------------------------------------------------------------------------------------
# SmolLM2, published weights
# --------------------------------------------------------------------------------------


def read_checkpoint(reader):
    """A GGUF file's own tensors, in llama.cpp's order of channels."""
    names = dict(query="attn_q", key="attn_k", value="attn_v", out="attn_output", gate="ffn_gate", up="ffn_up")
    names |= dict(down="ffn_down", attention_norm="attn_norm", mlp_norm="ffn_norm")
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return {
        "tokens": reader.fields["tokenizer.ggml.tokens"].contents(),
        "embedding": tensors["token_embd.weight"],
        "norm": tensors["output_norm.weight"],
        "layers": [
            {ours: tensors[f"blk.{i}.{theirs}.weight"] for ours, theirs in names.items()}
            for i in range(SMOLLM.num_layers)
        ],
    }


# Made with tokenizer.from_gguf(...).encode(text); to be made anew for other weights.
# "The capital of France is"
FRANCE_IDS = [504, 3575, 282, 4649, 314]
# "Paris is the capital and largest city of France. It stands on the river Seine, in the north of the country. About
# two million people live in the city, and many more in the region around it."
TEXT_IDS = (
    "38634 314 260 3575 284 3995 2240 282 4649 30 657 6443 335 260 4626 1268 462 28 281 260 4081 282 260 1798 30 "
    "6810 827 2215 701 2330 281 260 2240 28 284 800 540 281 260 2695 1130 357 30"
)
TEXT_IDS = [int(i) for i in TEXT_IDS.split()]


@pytest.fixture(scope="module")
def smollm_reader():
    try:
        return gguf.GGUFReader(files.locate("embedded"))
    except ValueError as error:
        pytest.skip(f"needs SmolLM2's weights: {error}")


@pytest.fixture(scope="module")
def smollm_params(smollm_reader):
    with pytest.MonkeyPatch.context() as patch:
        # Opening the file takes three seconds: once is enough.
        patch.setattr(gguf, "GGUFReader", lambda path: smollm_reader)
        found = files.open_checkpoint("embedded")
    assert not presets.differences(found.config, SMOLLM)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), logical_axes.MESH)
    return found.load(SMOLLM, sharding.param_shardings(SMOLLM, mesh), "float32")


@pytest.fixture(scope="module")
def smollm_checkpoint(smollm_reader):
    return read_checkpoint(smollm_reader)


def assert_log_probs_agree(embedding, got, expected):
    a, b = (log_softmax(np.asarray(states, np.float64) @ embedding.T) for states in (got, expected))
    assert np.abs(a - b).max() < 2e-3


def test_smollm_agrees_with_numpy_on_the_files_own_tensors(smollm_params, smollm_checkpoint):
    # NumPy rotates interleaved channels, as the file stores them: loading must have put them into halves.
    embedding = smollm_checkpoint["embedding"].astype(np.float64)
    ids = np.array(TEXT_IDS)
    expected = slow_hidden(SMOLLM, smollm_checkpoint, ids, interleaved=True)
    (states,) = hidden_states(SMOLLM, smollm_params, [ids[None]], lengths=[np.array([len(ids)])])
    assert_log_probs_agree(embedding, states[0], expected)
    # The text is likely to the model as a whole: NumPy alone gives -2.28 nats a token, and chance -ln 49152 = -10.8.
    chosen = log_softmax(expected @ embedding.T)[np.arange(len(ids) - 1), ids[1:]]
    assert chosen.mean() > -2.5


@pytest.fixture(scope="module")
def shallow(smollm_params, smollm_checkpoint):
    """The first layers alone: the other 26 would add a minute (`extend` unrolls them), and no other code."""
    config = dataclasses.replace(SMOLLM, num_layers=4)
    params = smollm_params | {"layers": jax.tree.map(lambda x: x[:4], smollm_params["layers"])}
    return config, params, smollm_checkpoint | {"layers": smollm_checkpoint["layers"][:4]}


def test_smollm_tree_agrees_with_numpy(shallow):
    config, params, checkpoint = shallow
    embedding = checkpoint["embedding"].astype(np.float64)
    paths = paths_of(np.random.default_rng(0), np.array(TEXT_IDS))
    states = hidden_states(config, params, tree(paths, lambda shape: np.zeros(shape, int)), lengths=TREE_LENGTHS)
    for leaf, ids in enumerate(paths):
        expected = slow_hidden(config, checkpoint, ids, interleaved=True)
        parts = [states[level][row, : TREE_LENGTHS[level][row]] for level, row in enumerate((0, leaf // 2, leaf))]
        assert_log_probs_agree(embedding, np.concatenate(parts), expected)


def test_smollm_with_a_cache_agrees_with_numpy(shallow):
    config, params, checkpoint = shallow
    ids = np.array(TEXT_IDS)
    expected = slow_hidden(config, checkpoint, ids, interleaved=True)
    states = cached_rows(config, params, ids, num_prefilled=20, prefix_tokens=14)
    assert_log_probs_agree(checkpoint["embedding"].astype(np.float64), states, expected)


def test_smollm_knows_the_capital_of_france(smollm_params, smollm_checkpoint):
    tokens = smollm_checkpoint["tokens"]
    ids, length = np.zeros((1, 12), int), len(FRANCE_IDS)
    ids[0, :length] = FRANCE_IDS
    assert [tokens[i] for i in FRANCE_IDS] == ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"]
    while length < ids.shape[1]:
        (states,) = hidden_states(SMOLLM, smollm_params, [ids], lengths=[np.array([length])])
        ids[0, length] = int(jnp.argmax(smollm_params["embedding"] @ states[0, length - 1]))
        length += 1
    assert "Paris" in "".join(tokens[i] for i in ids[0, len(FRANCE_IDS) :])


# --------------------------------------------------------------------------------------
# Another library
# --------------------------------------------------------------------------------------


def test_agrees_with_transformers(tiny_params, tiny_paths, tiny_rows):
    torch = pytest.importorskip("torch")
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=TINY.vocab_size,
        hidden_size=TINY.embed_dim,
        intermediate_size=TINY.mlp_dim,
        num_hidden_layers=TINY.num_layers,
        num_attention_heads=TINY.num_heads,
        num_key_value_heads=TINY.num_kv_heads,
        head_dim=TINY.head_dim,
        rms_norm_eps=TINY.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": TINY.rope_theta},
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    checkpoint = as_checkpoint(tiny_params)
    names = dict(query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj", out="self_attn.o_proj")
    names |= dict(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
    names |= dict(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
    state = {"model.embed_tokens.weight": checkpoint["embedding"], "model.norm.weight": checkpoint["norm"]}
    for i, layer in enumerate(checkpoint["layers"]):
        state |= {f"model.layers.{i}.{theirs}.weight": layer[ours] for ours, theirs in names.items()}
    state["lm_head.weight"] = checkpoint["embedding"]
    model.load_state_dict({name: torch.tensor(np.array(array)) for name, array in state.items()})
    for ids, expected in zip(tiny_paths, tiny_rows, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor(ids[None])).logits[0].numpy()
        np.testing.assert_allclose(logits, expected @ checkpoint["embedding"].T, rtol=0, atol=1e-3)
