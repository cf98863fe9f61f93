"""Tests of finemem_jax/weights/hf_weights.py: folders in and out, who reads what, and every way to be wrong."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import parity_cases
from finemem_jax.models import decoder, logical_axes, lora, presets, sharding
from finemem_jax.weights import hf_config, hf_weights
from finemem_jax.weights.hf_weights import HfFolder

CASES = list(parity_cases.CASES.values())
each_case = pytest.mark.parametrize("config", CASES, ids=list(parity_cases.CASES))
QWEN3 = parity_cases.CASES["qwen3_untied"]
LLAMA = parity_cases.CASES["llama_scaled"]
TIED = parity_cases.CASES["qwen2_tied"]
MESHES = {"one": (1, 1, 1), "fsdp": (1, 2, 1), "tensor": (1, 1, 2), "data": (2, 1, 1)}


def mesh_of(sizes):
    if np.prod(sizes) == jax.device_count():
        return sharding.make_mesh(*sizes)
    return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), logical_axes.MESH)


def load(folder, dtype="float32", sizes=(1, 1, 1)):
    found = HfFolder(folder, hf_config.read(folder))
    return found.load(found.config, sharding.param_shardings(found.config, mesh_of(sizes)), dtype)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


class Words:
    """As much of a tokenizer as an export asks for."""

    end_ids = (3, 5)

    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}")


# --------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("num_shards", [1, 3])
def test_loads_published_folders(tmp_path, config, num_shards):
    got = load(parity_cases.publish(tmp_path, config, num_shards))
    assert_same(got, parity_cases.as_params(config, parity_cases.checkpoint(config)))
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("sizes", MESHES.values(), ids=list(MESHES))
def test_parameters_lie_where_they_shall(tmp_path, sizes):
    got = load(parity_cases.publish(tmp_path, LLAMA, 2), sizes=sizes)
    assert_same(got, parity_cases.as_params(LLAMA, parity_cases.checkpoint(LLAMA)))
    expected = sharding.param_shardings(LLAMA, mesh_of(sizes))
    assert jax.tree.map(lambda leaf: leaf.sharding, got) == expected


@pytest.mark.parametrize("sizes", MESHES.values(), ids=list(MESHES))
def test_each_slice_is_read_once(tmp_path, monkeypatch, sizes):
    read = []

    class Counting:
        def __init__(self, inner):
            self.get_shape, self.get_dtype, self.inner = inner.get_shape, inner.get_dtype, inner

        def __getitem__(self, index):
            read.append(self.inner[index].nbytes)
            return self.inner[index]

    opened = hf_weights._open

    @hf_weights.contextlib.contextmanager
    def counting(folder):
        with opened(folder) as tensors:
            yield {name: Counting(tensor) for name, tensor in tensors.items()}

    monkeypatch.setattr(hf_weights, "_open", counting)
    params = load(parity_cases.publish(tmp_path, LLAMA), sizes=sizes)
    # Norms and the like are whole on every device, and read once for all.
    assert sum(read) == 4 * LLAMA.num_parameters == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    # The queries' kernel is the largest; no device reads more of it than its half.
    kernel = 4 * LLAMA.embed_dim * LLAMA.num_heads * LLAMA.head_dim
    assert max(read) == (kernel // 2 if sizes in ((1, 2, 1), (1, 1, 2)) else kernel)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(tmp_path, stored, dtype):
    tensors = {name: t.astype(jnp.dtype(stored)) for name, t in parity_cases.checkpoint(QWEN3).items()}
    got = load(parity_cases.publish(tmp_path, QWEN3, **tensors), dtype)
    expected = parity_cases.as_params(QWEN3, {n: t.astype(jnp.dtype(dtype)) for n, t in tensors.items()})
    assert_same(got, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}


def test_what_follows_from_the_rest_is_passed_over(tmp_path):
    tensors = parity_cases.checkpoint(TIED)
    extra = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    assert_same(load(parity_cases.publish(tmp_path, TIED, **extra)), parity_cases.as_params(TIED, tensors))


def test_the_host_never_holds_the_model_twice(tmp_path):
    """In a process of its own: memory that is no file's, while 200 MB are read, against the same before."""
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("counts memory as Linux does")
    config = dataclasses.replace(
        QWEN3, vocab_size=16_384, embed_dim=768, mlp_dim=2_048, num_layers=4, num_heads=12, num_kv_heads=4, head_dim=64
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), jax.eval_shape(lambda: decoder.init(config, 0)))
    hf_weights.save(tmp_path / "model", config, zeros)
    script = f"""
import pathlib, sys, threading, time
import jax
from finemem_jax.models import sharding
from finemem_jax.weights import hf_config
from finemem_jax.weights.hf_weights import HfFolder

def held():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

folder = pathlib.Path({str(tmp_path / "model")!r})
found = HfFolder(folder, hf_config.read(folder))
shardings = sharding.param_shardings(found.config, sharding.make_mesh(1, -1, 1))
jax.block_until_ready(jax.numpy.zeros(8) + 1)
before, peak, done = held(), [0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], held())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
params = jax.block_until_ready(found.load(found.config, shardings, "float32"))
done.set()
thread.join()
print((peak[0] - before) / (4 * found.config.num_parameters))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ratio = float(result.stdout)
    # The model, and the largest parameter beside it: .25 of this one is the embedding, and another .25 the head.
    assert 0.9 < ratio < 1.5, ratio


# --------------------------------------------------------------------------------------
# Wrong folders
# --------------------------------------------------------------------------------------


def test_missing_shard(tmp_path):
    parity_cases.publish(tmp_path, QWEN3, 3)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"lacks part-1\.safetensors, which model\.safetensors\.index\.json names; fetch"
    ):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_broken_index(tmp_path, text):
    parity_cases.publish(tmp_path, QWEN3, 2)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is no index of shards.*fetch it again"):
        load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.00005, 0.01, 0.5, 0.999])
def test_truncated_file(tmp_path, share):
    path = parity_cases.publish(tmp_path, QWEN3) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors .*fetch it again"):
        load(tmp_path)


def test_other_formats(tmp_path):
    (parity_cases.publish(tmp_path, QWEN3) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor .*convert them with"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.layers.1.mlp.up_proj.weight": np.zeros((88, 47), np.float32)},
            r"'model\.layers\.1\.mlp\.up_proj\.weight' has shape \(88, 47\), but config\.json makes it \(88, 48\)",
        ),
        (
            {"model.embed_tokens.weight": np.zeros((63, 48), np.float32)},
            r"'model\.embed_tokens\.weight' has shape \(63, 48\), but config\.json makes it \(64, 48\)",
        ),
        ({"lm_head.weight": None}, r"'lm_head\.weight' is missing from its safetensors"),
        (
            {f"model.layers.{i}.self_attn.{x}_norm.weight": None for i in range(2) for x in "qk"},
            r"'model\.layers\.0\.self_attn\.q_norm\.weight', .* and 1 more are missing",
        ),
        (
            {"model.layers.0.self_attn.q_proj.bias": np.zeros(160, np.float32)},
            r"hold 'model\.layers\.0\.self_attn\.q_proj\.bias' is unknown to config\.json's architecture",
        ),
        ({"model.norm.weight": np.zeros(48, np.int8)}, r"'model\.norm\.weight' is I8; only F32.*not quantized"),
    ],
    ids=["shape", "vocabulary", "head", "several", "extra", "dtype"],
)
def test_wrong_tensors(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(parity_cases.publish(tmp_path, QWEN3, **changes))
    assert str(tmp_path) in str(caught.value)


# --------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000, 1])
def test_export_then_import_is_exact(tmp_path, config, shard_bytes, monkeypatch):
    monkeypatch.setattr(hf_weights, "SHARD_BYTES", shard_bytes)
    params = parity_cases.as_params(config, parity_cases.checkpoint(config))
    hf_weights.save(tmp_path / "out", config, params)
    assert_same(load(tmp_path / "out"), params)
    assert hf_config.read(tmp_path / "out") == dataclasses.replace(config, name="out")


def test_export_of_sharded_parameters_is_the_same(tmp_path):
    config, tensors = QWEN3, parity_cases.checkpoint(QWEN3)
    parity_cases.publish(tmp_path / "in", config)
    hf_weights.save(tmp_path / "out", config, load(tmp_path / "in", sizes=(1, 2, 1)))
    got = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(got[name], tensor)


def test_bfloat16_rounds_once(tmp_path):
    params = parity_cases.as_params(QWEN3, parity_cases.checkpoint(QWEN3))
    hf_weights.save(tmp_path / "half", QWEN3, params, dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert_same(load(tmp_path / "half", "bfloat16"), rounded)
    hf_weights.save(tmp_path / "again", QWEN3, load(tmp_path / "half"), dtype="bfloat16")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "half" / name).read_bytes()


def test_adapters_are_merged(tmp_path):
    config = dataclasses.replace(QWEN3, lora=presets.Lora(2, 4.0, ("query", "down")))
    rng = np.random.default_rng(0)
    params = parity_cases.as_params(QWEN3, parity_cases.checkpoint(QWEN3))
    shapes = lora.split(decoder.abstract_params(config))[1]
    adapters = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)
    hf_weights.save(tmp_path / "out", config, lora.combine(params, adapters))
    got = load(tmp_path / "out")
    a, b = adapters["layers"]["down_lora_a"], adapters["layers"]["down_lora_b"]
    # Scaled by alpha / rank = 2.
    np.testing.assert_allclose(got["layers"]["down"], params["layers"]["down"] + 2 * a @ b, atol=1e-4)
    np.testing.assert_array_equal(got["layers"]["up"], params["layers"]["up"])


def test_shards_and_their_index(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_weights, "SHARD_BYTES", 50_000)
    params = parity_cases.as_params(QWEN3, parity_cases.checkpoint(QWEN3))
    hf_weights.save(tmp_path / "out", QWEN3, params, tokenizer=Words())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    assert index["metadata"]["total_size"] == 4 * QWEN3.num_parameters
    assert sorted(set(index["weight_map"].values())) == files
    for file in files:
        with safetensors.safe_open(tmp_path / "out" / file, framework="numpy") as handle:
            assert {n for n, f in index["weight_map"].items() if f == file} == set(handle.keys())
            sizes = [4 * np.prod(handle.get_slice(name).get_shape()) for name in handle.keys()]  # noqa: SIM118
            assert sum(sizes) <= 50_000
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == [3, 5]
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_failed_export_leaves_nothing(tmp_path):
    class Broken(Words):
        def save(self, folder):
            raise OSError("disk full")

    params = parity_cases.as_params(QWEN3, parity_cases.checkpoint(QWEN3))
    with pytest.raises(OSError, match="disk full"):
        hf_weights.save(tmp_path / "out", QWEN3, params, tokenizer=Broken())
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_nothing(tmp_path):
    params = parity_cases.as_params(QWEN3, parity_cases.checkpoint(QWEN3))
    with pytest.raises(ValueError, match="exists already; export to another folder"):
        hf_weights.save(tmp_path, QWEN3, params)
    with pytest.raises(ValueError, match=r"dtype must be one of float32, bfloat16; got 'int8'"):
        hf_weights.save(tmp_path / "out", QWEN3, params, dtype="int8")


# --------------------------------------------------------------------------------------
# Another library
# --------------------------------------------------------------------------------------


@each_case
def test_transformers_loads_an_export(tmp_path, config, monkeypatch):
    monkeypatch.setattr(hf_weights, "SHARD_BYTES", 40_000)
    torch = pytest.importorskip("torch", reason="loads exports with transformers' models, which need PyTorch")
    import transformers

    params = parity_cases.as_params(config, parity_cases.checkpoint(config))
    hf_weights.save(tmp_path / "out", config, params)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    rows = parity_cases.token_rows(config)
    with torch.no_grad(), np.load(pathlib.Path(__file__).parents[1] / "parity" / f"{config.name}.npz") as stored:
        got = [torch.log_softmax(model(torch.tensor(row[None])).logits[0], -1).numpy() for row in rows]
        np.testing.assert_allclose(np.concatenate(got), stored["log_probs"], rtol=0, atol=1e-4)


@each_case
def test_loads_what_transformers_saves(tmp_path, config):
    pytest.importorskip("torch", reason="saves transformers' models, which need PyTorch")
    import make_parity_references

    make_parity_references.build(config).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(load(tmp_path), parity_cases.as_params(config, parity_cases.checkpoint(config)))
