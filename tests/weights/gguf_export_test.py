"""Tests of export.form='gguf': read back bit for bit, and compared with llama.cpp where that is installed."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import re

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import pre_tokenizers

import hf_folders
import parity_cases
import small_exports
from finemem_jax import MemoryAgent, build
from finemem_jax import config as config_lib
from finemem_jax.models import decoder, lora, presets, sharding, tokenizer
from finemem_jax.serving import export, parity
from finemem_jax.serving import load as load_lib
from finemem_jax.types import Message
from finemem_jax.weights import files, gguf_export, gguf_weights, hf_weights, tokenizer_files

# Rows beyond the tokenizer's vocabulary, as published models have them.
ROWS = 280
MODELS = {name: dataclasses.replace(model, vocab_size=ROWS) for name, model in parity_cases.CASES.items()}
QWEN2, QWEN3 = MODELS["qwen2_untied"], MODELS["qwen3_tied"]
needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="compares with llama.cpp, which needs llama-cpp-python"
)
# As the models' own tokenizer.json have it.
PATTERN = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+"
    "|\\s+(?!\\S)|\\s+"
)
PATTERNS = {"qwen2": PATTERN, "llama-bpe": PATTERN.replace("|\\p{N}|", "|\\p{N}{1,3}|")}
TEXTS = (
    "In 2024, the man's 12345 things!\n\n\nAnd then",
    "  the  theme \r\n x",
    "ünï 🙂 \u4f60\u597d",
    "<|im_end|> <tool_call>",
    "",
)
OPENING = [Message("system", ('Keep "facts": {{ no }}\n🙂',)), Message("user", ("a",)), Message("assistant", ("b",))]


def words(folder, kind, template=hf_folders.CHATML, **changes):
    """A tokenizer as that of SmolLM2, Llama 3 or Qwen2, read from a folder as published models have it."""
    folder.mkdir(exist_ok=True)
    hf_folders.write_tokenizer(folder, template, **changes)
    made = hf_folders.backend(ignore_merges=kind == "llama-bpe")
    if kind == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        split = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[kind]), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    fields = json.loads(made.to_str()) | ({} if kind == "qwen2" else {"normalizer": None})
    # An empty line is one token, except where it stands before a word in SmolLM2's rule.
    fields["model"]["vocab"]["ĊĊ"] = len(fields["model"]["vocab"])
    fields["model"]["merges"].append(["Ċ", "Ċ"])
    ids = {token["content"]: token["id"] + 1 for token in fields["added_tokens"]}
    fields["added_tokens"] = [token | {"id": ids[token["content"]]} for token in fields["added_tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return tokenizer_files.from_folder(folder)


@dataclasses.dataclass
class Opened:
    """Saves itself with a chat that comes first."""

    tokens: tokenizer.BpeTokenizer

    @property
    def end_ids(self):
        return self.tokens.end_ids

    def save(self, folder):
        self.tokens.save(folder, OPENING)


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    return words(tmp_path_factory.mktemp("words") / "smollm", "smollm")


def params_of(model):
    return parity_cases.as_params(model, parity_cases.checkpoint(model))


def mesh():
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def load(path, dtype="float32"):
    found = gguf_weights.open_file(path)
    return found.load(found.config, sharding.param_shardings(found.config, mesh()), dtype)


def field(path, name):
    return gguf.GGUFReader(path).fields[name].contents()


@pytest.fixture
def known_scaling(monkeypatch):
    # Files hold what the scaling amounts to, so that it must be that of a known model.
    scaled = MODELS["llama_scaled"]
    monkeypatch.setitem(presets.PRESETS, scaled.name, scaled)


# --------------------------------------------------------------------------------------
# The file
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_read_back_bit_for_bit(tmp_path, known_scaling, smollm, model):
    path = tmp_path / "a_model.gguf"
    params = params_of(model)
    gguf_export.save(path, model, params, tokenizer=smollm)
    assert gguf_weights.open_file(path).config == dataclasses.replace(model, name="a_model")
    got = load(path)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, got, params)
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_mode & 0o777 == 0o644


def test_interleaved_by_hand():
    # One head of four channels: we rotate (0 2)(1 3) together, llama.cpp the neighbors.
    kernel = np.arange(8.0)[:, None] * np.ones((1, 2))
    np.testing.assert_array_equal(gguf_export._interleaved(kernel, 2)[:, 0], [0, 2, 1, 3, 4, 6, 5, 7])


@pytest.mark.parametrize(("dtype", "file_type"), [("float16", 1), ("bfloat16", 32)])
def test_matrices_are_rounded_and_vectors_are_not(tmp_path, smollm, dtype, file_type):
    path, params = tmp_path / "half.gguf", params_of(QWEN2)
    gguf_export.save(path, QWEN2, params, tokenizer=smollm, dtype=dtype)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    half = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert all(kind == ("F32" if "norm" in name or "bias" in name else half) for name, kind in kinds.items())
    assert field(path, "general.file_type") == file_type
    vectors = [*gguf_weights._VECTORS, "final_norm"]
    wanted = jax.tree.map_with_path(
        lambda at, x: x if at[-1].key in vectors else x.astype(dtype).astype(jnp.float32), params
    )
    jax.tree.map(np.testing.assert_array_equal, load(path), wanted)


def test_adapters_are_merged(tmp_path, smollm):
    model = dataclasses.replace(QWEN3, lora=presets.Lora(2, 4.0, ("query", "down")))
    rng = np.random.default_rng(0)
    shapes = lora.split(decoder.abstract_params(model))[1]
    adapters = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)
    params = lora.combine(params_of(QWEN3), adapters)
    gguf_export.save(tmp_path / "m.gguf", model, params, tokenizer=smollm)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "m.gguf"), lora.merge(model, params))


# --------------------------------------------------------------------------------------
# The tokenizer
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["smollm", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("template", [hf_folders.CHATML, hf_folders.LLAMA], ids=["chatml", "llama"])
def test_the_tokenizer_is_read_back(tmp_path, kind, template):
    tokens = words(tmp_path / "words", kind, template)
    gguf_export.save(tmp_path / "m.gguf", QWEN3, params_of(QWEN3), tokenizer=Opened(tokens))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    again = tokenizer_files.from_gguf(reader)
    assert (again.vocab_size, again.end_ids) == (tokens.vocab_size, tokens.end_ids)
    assert again._named_tokens == tokens._named_tokens
    for text in TEXTS:
        assert again.encode(text) == tokens.encode(text)
        assert again.encode_template(text) == tokens.encode_template(text)
    assert [again.token_bytes(i) for i in range(ROWS)] == [tokens.token_bytes(i) for i in range(ROWS)]
    chat = [Message("system", ("Be brief.",)), Message("user", ("Hello.",))]
    assert tokenizer.encode_chat(again, chat) == tokenizer.encode_chat(tokens, chat)
    assert field(tmp_path / "m.gguf", "tokenizer.chat_template") == tokenizer.opened(template, OPENING)
    assert field(tmp_path / "m.gguf", "tokenizer.ggml.pre") == kind
    assert field(tmp_path / "m.gguf", "tokenizer.ggml.add_bos_token") == (kind == "llama-bpe")
    # What was read from such a file is written again as it is.
    gguf_export.save(tmp_path / "again.gguf", QWEN3, params_of(QWEN3), tokenizer=Opened(again))
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_the_embedded_models_tokenizer(tmp_path):
    """All that its file says of tokens is said again."""
    reader = gguf.GGUFReader(files.locate("embedded"))
    found = gguf_export.vocabulary(tokenizer_files.from_gguf(reader), 49_152)
    own = {name.rpartition(".")[2]: f for name, f in reader.fields.items() if name.startswith("tokenizer.")}
    assert (found.kind, found.begins) == (own["pre"].contents(), own["add_bos_token"].contents())
    for name, got in (("tokens", found.tokens), ("merges", found.merges)):
        # All of them would take seconds.
        some = range(0, len(own[name].data), 97)
        assert len(got) == len(own[name].data)
        assert [got[i] for i in some] == [bytes(own[name].parts[own[name].data[i]]).decode() for i in some]
    assert (found.types, found.template) == (own["token_type"].contents(), own["chat_template"].contents())
    assert found.ids == {"bos": 1, "eos": 2, "pad": 2}


def test_ends_of_turns(smollm):
    names = {"eos": "<|endoftext|>", "eom": "<|head|>", "eot": "<|im_end|>"}
    made = hf_folders.backend()
    ends = [made.token_to_id(name) for name in names.values()]
    tokens = {i: text for text, i in made.get_vocab().items()} | {ends[1]: "<|eom_id|>"}
    assert gguf_export._ids(made, tokens, {}, end_ids=ends) == dict(zip(names, ends, strict=True))


# --------------------------------------------------------------------------------------
# What cannot be written
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "dtype", "message"),
    [
        ({}, "int8", r"must be one of float32, float16, bfloat16; got 'int8'"),
        ({"qkv_bias": True}, "float32", r"no architecture of this shape .*qkv_bias=True.*set export\.form='merged'"),
        ({"rope_scaling": presets.RopeScaling(8.0, 1.0, 4.0, 32)}, "float32", r"no architecture of this shape"),
        ({"vocab_size": 100}, "float32", r"ids up to 267, but the model only 100 embeddings; choose the tokenizer"),
    ],
)
def test_bad_models(tmp_path, smollm, changes, dtype, message):
    model = dataclasses.replace(QWEN3, **changes)
    with pytest.raises(ValueError, match=message):
        gguf_export.save(tmp_path / "m.gguf", model, params_of(QWEN3), tokenizer=smollm, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_numbers_beyond_float16(tmp_path, smollm):
    params = params_of(QWEN3)
    params["layers"]["up"] = params["layers"]["up"].at[1, 2, 3].set(1e5)
    with pytest.raises(ValueError, match=r"'blk\.1\.ffn_up\.weight' has entries beyond what float16 holds.*'bfloat16'"):
        gguf_export.save(tmp_path / "m.gguf", QWEN3, params, tokenizer=smollm, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_file_replaces_nothing(tmp_path, smollm):
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(ValueError, match=r"m\.gguf exists already; export to another folder"):
        gguf_export.save(tmp_path / "m.gguf", QWEN3, params_of(QWEN3), tokenizer=smollm)
    assert (tmp_path / "m.gguf").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f | {"pre_tokenizer": f["pre_tokenizer"]["pretokenizers"][1]}, r"splits texts by .*ByteLevel"),
        (lambda f: f | {"pre_tokenizer": None}, r"splits texts by .*set export\.form='merged'"),
        (lambda f: f | {"model": f["model"] | {"ignore_merges": True}}, r"tokenizers of SmolLM2, Llama 3, Qwen2 and"),
        (lambda f: f | {"added_tokens": [t | {"lstrip": True} for t in f["added_tokens"]]}, r"white space around them"),
    ],
    ids=["gpt2", "none", "ignore_merges", "lstrip"],
)
def test_other_tokenizers(tmp_path, change, message):
    words(tmp_path / "words", "smollm")
    path = tmp_path / "words" / "tokenizer.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        gguf_export.vocabulary(tokenizer_files.from_folder(path.parent), ROWS)


# --------------------------------------------------------------------------------------
# A run's export
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir, its config, what it has trained, and its export."""
    base = tmp_path_factory.mktemp("base") / "small"
    tokens = words(base.parent / "words", "smollm", **small_exports.END)
    hf_weights.save(base, small_exports.SMALL, decoder.init(small_exports.SMALL, 0), tokenizer=tokens)
    workdir = tmp_path_factory.mktemp("run")
    config = small_exports.settings(base, **{"export.form": "gguf"})
    params = small_exports.trained(workdir, config)
    return workdir, config, params, small_exports.exported(workdir, config)


def test_an_export_holds_what_was_trained(run):
    _, config, params, folder = run
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "finemem.json", "model.gguf"]
    jax.tree.map(np.testing.assert_array_equal, load(folder / "model.gguf"), params)
    tokens = build.load(config).tokenizer
    own = tokenizer_files.from_gguf(gguf.GGUFReader(folder / "model.gguf"))
    chat = export.conversation(config, tokens, "A text.")
    assert tokenizer.encode_chat(own, chat) == tokenizer.encode_chat(tokens, chat)
    assert "keep the memory" in field(folder / "model.gguf", "tokenizer.chat_template")
    card = (folder / "README.md").read_text()
    assert "library_name: llama.cpp" in card and "llama-server -m model.gguf" in card and "-n 24" in card
    assert str(folder.parent) not in card and "transformers" not in card


def test_a_run_that_began_with_an_export(run, tmp_path):
    """There the tokenizer knows where text and memory meet, which a GGUF file cannot say."""
    workdir, config, _, folder = run
    whole = config_lib.changed(config, {"export.form": "merged", "export.folder": str(tmp_path / "whole")})
    again = small_exports.settings(small_exports.exported(workdir, whole), **{"export.form": "gguf"})
    assert "Memory" in (tmp_path / "whole" / "tokenizer.json").read_text()
    small_exports.trained(tmp_path, again)
    names = ("tokenizer.ggml.pre", "tokenizer.chat_template", "tokenizer.ggml.merges")
    exports = [path / "model.gguf" for path in (folder, small_exports.exported(tmp_path, again))]
    assert len({str([field(path, name) for name in names]) for path in exports}) == 1


def test_an_export_is_an_agent(run, monkeypatch):
    *_, folder = run
    config, workdir = load_lib.find(str(folder))
    assert (config.model.weights, workdir) == (str(folder / "model.gguf"), None)
    monkeypatch.chdir(folder)
    program = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    assert MemoryAgent.__name__ in program
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(program, "README.md", "exec"), {})
    assert out.getvalue()


def test_verify_says_what_to_install(run, monkeypatch):
    _, config, _, _ = run
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--verify needs llama-cpp-python.* `pip install llama-cpp-python`"):
        parity.check(config)


# --------------------------------------------------------------------------------------
# llama.cpp
# --------------------------------------------------------------------------------------


def theirs(folder, ids):
    return np.concatenate(parity._llama_log_probs(folder, ids))


@needs_llama
@pytest.mark.parametrize("name", ["llama_scaled", "llama_odd_heads", "qwen2_untied", "qwen3_tied"])
def test_llama_cpp_computes_the_same(tmp_path, smollm, name):
    model, params = MODELS[name], params_of(MODELS[name])
    gguf_export.save(tmp_path / "model.gguf", model, params, tokenizer=smollm)
    ids = [row.tolist() for row in parity_cases.token_rows(model)]
    ours = np.concatenate(parity.our_log_probs(model, params, ids))
    np.testing.assert_allclose(theirs(tmp_path, ids), ours, rtol=1e-5, atol=1e-4)


@needs_llama
@pytest.mark.parametrize("kind", ["smollm", "llama-bpe", "qwen2"])
def test_llama_cpp_cuts_the_same_tokens(tmp_path, kind):
    tokens = words(tmp_path / "words", kind)
    gguf_export.save(tmp_path / "model.gguf", QWEN3, params_of(QWEN3), tokenizer=tokens)
    llama = parity._llama(tmp_path, vocab_only=True)
    for text in TEXTS:
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == tokens.encode_template(text)
    assert {llama.token_eos(), *tokens.end_ids[1:]} == set(tokens.end_ids)
    llama.close()


@needs_llama
def test_verify(run, tmp_path):
    workdir, config, _, folder = run
    (line,) = parity.verify(folder, config, workdir)
    assert re.search(
        r"ids but where text and memory meet, .* of 400 tokens in \d prompts? differ by .* llama\.cpp and the check",
        line,
    )
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    reader = gguf.GGUFReader(broken / "model.gguf", "r+")
    tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    tensor.data[...] *= 1.5
    reader.data.flush()
    with pytest.raises(ValueError, match=r"between llama\.cpp and the checkpoint, more than 0\.0001 .*do not use"):
        parity.verify(broken, config, workdir)


@needs_llama
def test_verify_of_rounded_weights(run, tmp_path):
    workdir, config, _, _ = run
    rounded = config_lib.changed(config, {"export.dtype": "bfloat16", "export.folder": str(tmp_path / "half")})
    (line,) = parity.verify(small_exports.exported(workdir, rounded), rounded, workdir)
    assert "on average; llama.cpp computes with rounded numbers, too) between llama.cpp and our reading" in line
