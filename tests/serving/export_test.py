"""Tests of --mode=export: what the folder holds, that its prompts are training's, and that others compute the same."""

import contextlib
import importlib.util
import io
import json
import re
import shutil
import warnings

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import hf_folders
from finemem_jax import build as build_lib
from finemem_jax import config as config_lib
from finemem_jax import input_pipeline
from finemem_jax.config.sections import Config
from finemem_jax.memory import build
from finemem_jax.models import decoder, lora, sharding, tokenizer
from finemem_jax.serving import export, model_card, parity
from finemem_jax.types import Chunk, Memory, Message
from finemem_jax.weights import hf_weights, peft, pretrained, tokenizer_files
from small_exports import END, SMALL, STEP, exported, settings, trained

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="compares with transformers' models, which need PyTorch"
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A base model's folder."""
    folder = tmp_path_factory.mktemp("published") / "small"
    tokens = tokenizer_files.from_folder(hf_folders.write_tokenizer(folder.parent, **END))
    hf_weights.save(folder, SMALL, decoder.init(SMALL, 0), tokenizer=tokens)
    return folder


@pytest.fixture(scope="module")
def merged(published, tmp_path_factory):
    """A workdir, its config, what it has trained, and its export."""
    workdir = tmp_path_factory.mktemp("merged")
    config = settings(published)
    (workdir / "evaluation.json").write_text(json.dumps({"before": evaluation(0), "after": evaluation(STEP)}))
    table = {"header": ["score", "narrative"], "rows": [["checkpoint", "0.250 ± 0.125"]]}
    (workdir / "benchmark.json").write_text(
        json.dumps({"steps": {"checkpoint": STEP}, "tables": [table], "notes": ["± is one standard error."]})
    )
    params = trained(workdir, config)
    return workdir, config, params, exported(workdir, config)


def evaluation(step):
    metrics = ("score", "chunk_score", "valid_operations", "memory_tokens")
    return {
        "step": step,
        "estimates": {name: {"mean": 0.5 + step / 100, "standard_error": 0.1, "n": 2} for name in metrics},
        "per_stream": {name: {"a": 0.4 + step / 100, "b": 0.6 + step / 50} for name in metrics},
    }


def mesh():
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def loaded(folder, config):
    return pretrained.find(export.with_weights(config, folder)).params(mesh())


def assert_same(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


# --------------------------------------------------------------------------------------
# The folder
# --------------------------------------------------------------------------------------


def test_a_merged_export_holds_what_was_trained(merged):
    workdir, config, params, folder = merged
    assert_same(loaded(folder, config), params)
    about = json.loads((folder / "finemem.json").read_text())
    assert (about["format"], about["step"], about["config"]) == (1, STEP, config_lib.flatten(config))
    assert {"finemem_jax", "jax", "python"} <= about["versions"].keys()
    # As evaluated: the base model's own folder says nothing of how to draw.
    ends = list(build_lib.load(config).tokenizer.end_ids)
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "pad_token_id": ends[0], "eos_token_id": ends, "do_sample": False, "max_new_tokens": 24
    }  # fmt: skip
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == ends
    assert sorted(path.name for path in workdir.iterdir()) == [
        "benchmark.json", "checkpoints", "config.json", "evaluation.json", "export"
    ]  # fmt: skip
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.rglob("*"))


def test_an_export_is_exported_again_as_it_is(merged, tmp_path):
    """A run that begins with an export opens its template once more, and for nothing."""
    _, config, _, folder = merged
    again = settings(folder)
    trained(tmp_path, again)
    template = (exported(tmp_path, again) / "chat_template.jinja").read_text()
    assert template == (folder / "chat_template.jinja").read_text()
    tokens = [build_lib.load(c).tokenizer for c in (config, again)]
    chat = export.conversation(config, tokens[0], "A text.")
    assert tokenizer.encode_chat(tokens[0], chat) == tokenizer.encode_chat(tokens[1], chat)


def test_weights_are_rounded_and_cut_into_files(merged, tmp_path, monkeypatch):
    workdir, config, params, _ = merged
    monkeypatch.setattr(hf_weights, "SHARD_BYTES", 100_000)
    changed = config_lib.changed(config, {"export.folder": str(tmp_path / "half"), "export.dtype": "bfloat16"})
    folder = exported(workdir, changed)
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and (folder / "model.safetensors.index.json").is_file()
    assert_same(loaded(folder, config), jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_goes_alone_if_its_base_can_be_found(published, tmp_path, dtype):
    config = settings(published, **{"lora.rank": 2, "export.form": "lora", "model.param_dtype": dtype})
    adapters = trained(tmp_path, config)
    folder = exported(tmp_path, config)
    assert_same(peft.load(folder, pretrained.adapted(config, SMALL)), adapters)
    about = json.loads((folder / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(published)
    assert not (folder / "base").exists() and not list(folder.glob("model*"))
    # And merged, it is what training computed with.
    config = config_lib.changed(config, {"export.form": "merged", "export.folder": str(tmp_path / "whole")})
    base = pretrained.find(config).params(mesh())
    whole = lora.merge(pretrained.adapted(config, SMALL), lora.combine(base, adapters))
    # Devices that share the work round otherwise.
    rtol = {"float32": 1e-5, "bfloat16": 0.01}[dtype]
    got = loaded(exported(tmp_path, config), config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), rtol, 1e-6), got, whole)


def test_a_base_that_is_nowhere_comes_along(merged, tmp_path):
    """Weights that another run has trained have no name that PEFT knows."""
    workdir, _, params, _ = merged
    config = settings(workdir, **{"lora.rank": 2, "export.form": "lora"})
    trained(tmp_path, config)
    folder = exported(tmp_path, config)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert_same(loaded(folder / "base", config), params)


def test_a_failed_export_leaves_nothing(merged, monkeypatch):
    workdir, config, _, _ = merged
    changed = config_lib.changed(config, {"export.folder": str(workdir / "other" / "export")})
    monkeypatch.setattr(model_card, "write", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.run(changed, workdir)
    assert list((workdir / "other").iterdir()) == []
    shutil.rmtree(workdir / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"export exists already; export to another folder \(export\.folder\), or remove it first"),
        ({"export.folder": "/nowhere/x", "export.form": "lora"}, r"lora\.rank is 0; set export\.form='merged'"),
        ({"export.folder": "/nowhere/x", "model.tokenizer": "bytes"}, r"model\.tokenizer='bytes' is for tests"),
    ],
)
def test_bad_settings(merged, changes, message):
    workdir, config, _, _ = merged
    changed = config_lib.changed(config, changes)
    with pytest.raises(ValueError, match=message):
        export.check(changed, workdir)


def test_nothing_to_export(published, tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoint to export; train first"):
        export.check(settings(published), tmp_path)


# --------------------------------------------------------------------------------------
# Prompts
# --------------------------------------------------------------------------------------

# Qwen3's has the assistant begin with an empty thought unless it is told that it may think.
THINKING = hf_folders.CHATML + (
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
# transformers drops the newline after a block, and what stands before one on its line.
INDENTED = "\n  {% for m in messages %}\n" + hf_folders.CHATML[len("{% for message in messages %}") :].replace(
    "message[", "m["
)
CHUNKS = (
    "[Day 3] Ada: I moved to Bern.",
    '{"a": "b"} {% raw %} {{ x }} \\ \'quoted\' ünï 🙂 \u2028',
    "",
    "two\n\nparts\n\n",
)


def rendered(folder, chat, **options):
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    return tokens.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, **options)


@pytest.mark.parametrize("template", [hf_folders.CHATML, hf_folders.LLAMA, THINKING, INDENTED])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"manager.num_examples": 0, "memory.budget_tokens": 99, "memory.eviction": "stale"},
        {"memory.layout": "typed"},
        {"manager.tool_call_format": "hermes", "model.thinking": True},
        {"memory.layout": "typed", "manager.tool_call_format": "qwen_agent", "manager.num_examples": 1},
        {"manager.system": 'Keep "facts": {% endif %} {{ messages }} \\n {# no #} 🙂\n\tas JSON.'},
    ],
    ids=["plain", "budget", "typed", "hermes", "qwen_agent", "own words"],
)
def test_the_template_says_what_training_said(tmp_path, template, changes):
    config = config_lib.changed(Config(), {"manager.num_examples": 2, "memory.view_tokens": 600} | changes)
    hf_folders.write_tokenizer(tmp_path, template, **END)
    tokens = tokenizer_files.from_folder(tmp_path, config.model.thinking)
    environment = build.environment(config, tokens)
    out = tmp_path / "out"
    out.mkdir()
    tokens.save(out, export.conversation(config, tokens, "")[:-1], export.SEAM)
    for chunk in CHUNKS:
        message = "".join(export.conversation(config, tokens, chunk)[-1].parts)
        got = rendered(out, [{"role": "user", "content": message}])
        assert tuple(got) == environment.observe(Chunk(chunk), Memory()).ids
    # A chat with a system message of its own is as it was, and we read the same from the folder.
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
    kept = {"date_string": tokenizer.DATE, "enable_thinking": config.model.thinking}
    assert rendered(out, chat) == rendered(tmp_path, chat, **kept)
    ours = [Message(message["role"], (message["content"],)) for message in chat]
    again = tokenizer_files.from_folder(out, config.model.thinking)
    assert tokenizer.encode_chat(again, ours) == tokenizer.encode_chat(tokens, ours)


def test_the_embedded_models_prompts(tmp_path):
    """Its tokenizer would join the white space where our parts of a message meet."""
    config = config_lib.changed(Config(), {"manager.num_examples": 2})
    tokens = build_lib.load(config).tokenizer
    environment = build.environment(config, tokens)
    tokens.save(tmp_path, export.conversation(config, tokens, "")[:-1], export.SEAM)
    for chunk in CHUNKS:
        wanted = environment.observe(Chunk(chunk), Memory()).ids
        assert tokens.encode_template(tokens.decode(wanted)) != list(wanted)
        message = "".join(export.conversation(config, tokens, chunk)[-1].parts)
        assert tuple(rendered(tmp_path, [{"role": "user", "content": message}])) == wanted
    texts = ["A text.\n\nAnother: 1234 \n\n\n x", "Memory: none", "\n\nMemory", 'def f():\n    return "é"']
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs(text)["input_ids"] for text in texts] == [tokens.encode(text) for text in texts]


# --------------------------------------------------------------------------------------
# The card
# --------------------------------------------------------------------------------------


def test_the_card(merged, tmp_path):
    _, config, _, folder = merged
    text = (folder / "README.md").read_text()
    assert huggingface_hub.metadata_load(folder / "README.md") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["finemem_jax", "memory", "reinforcement-learning", "grpo"],
    }
    assert "trained for 3 training steps" in text and "- Base model: `small`" in text
    # 0.4 and 0.6 have become 0.43 and 0.66: by 0.045 on average, with a standard error of 0.015.
    assert "| on held-out streams | before (step 0) | after (step 3) | difference | n |" in text
    assert "| held-out score | 0.500 ± 0.100 | 0.530 ± 0.100 | +0.045 ± 0.015 | 2 |" in text
    assert "| checkpoint | 0.250 ± 0.125 |" in text and "Training steps of each method: checkpoint 3." in text
    assert "manager.num_examples: 1" in text and "rollout.max_new_tokens: 24" in text
    # It may be published, so it says nothing of this machine.
    assert str(folder.parent) not in text and config.model.weights not in text


@pytest.mark.parametrize(
    ("changes", "front", "base"),
    [
        (
            {"model.weights": "embedded"},
            {
                "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
                "license": "apache-2.0",
                "library_name": "transformers",
            },
            "rounded to 4 bits",
        ),
        (
            {"model.weights": "Qwen/Qwen3-4B", "export.form": "lora", "lora.rank": 8},
            {"base_model": "Qwen/Qwen3-4B", "base_model_relation": "adapter", "library_name": "peft"},
            "https://huggingface.co/Qwen/Qwen3-4B",
        ),
        ({"model.weights": "random", "model.name": "tiny"}, {}, "random weights in the shape of tiny"),
    ],
)
def test_the_card_names_the_base(tmp_path, changes, front, base):
    elsewhere = {"data.source_dir": "/private/originals", "data.name": "squad"}
    config = config_lib.changed(Config(), changes | elsewhere)
    text = model_card.write(config, 1, message="a ```` b", with_base=False, results={"evaluation": {}, "benchmark": {}})
    (tmp_path / "README.md").write_text(text)
    found = huggingface_hub.metadata_load(tmp_path / "README.md") or {}
    assert front.items() <= found.items() and ("base_model" in found) == ("base_model" in front)
    assert base in text and "## Results" not in text and "/private/originals" not in text and "1 training step " in text
    assert "`````text\na ```` b\n`````" in text
    assert ("PeftModel" in text, "MemoryAgent" in text) == ((True, False) if "lora.rank" in changes else (False, True))


# --------------------------------------------------------------------------------------
# Another library
# --------------------------------------------------------------------------------------


def test_what_is_missing_is_named(monkeypatch):
    config = Config()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else name)
    monkeypatch.setattr(importlib, "import_module", lambda name: name)
    parity.check(config)
    config = config_lib.changed(config, {"export.form": "lora"})
    with pytest.raises(ValueError, match=r"--verify needs peft, .* run `pip install peft`"):
        parity.check(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--verify needs torch, .* run `pip install torch --index-url https"):
        parity.check(config)


def test_rows_to_verify_on(merged):
    _, config, _, _ = merged
    tokens = build_lib.load(config).tokenizer
    environment = build.environment(config, tokens)
    rows = parity.rows(config, tokens, environment)
    assert sum(len(row.ids) - 1 for row in rows) == 2000
    chunks = [chunk for stream in input_pipeline.streams(config, "test", environment) for chunk in stream.chunks]
    assert [row.prompt for row in rows] == [environment.observe(chunk, Memory()).ids for chunk in chunks[: len(rows)]]
    ended = tokens.decode(rows[0].ids)
    assert ended.endswith('has label 14."}}<|im_end|>') and chunks[0].text in ended


@needs_torch
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"export.dtype": "bfloat16"},
        {"lora.rank": 2, "export.form": "lora"},
        {"lora.rank": 2, "export.form": "lora", "lora.targets": "query,down", "model.param_dtype": "bfloat16"},
        {"lora.rank": 2},
    ],
    ids=["merged", "bfloat16", "adapter", "bfloat16 adapter", "merged adapter"],
)
def test_transformers_computes_the_same(published, merged, tmp_path, changes):
    if changes.get("export.form") == "lora":
        pytest.importorskip("peft", reason="compares adapters with PEFT's")
    # Of the second adapter the base comes along.
    config = settings(merged[0] if "lora.targets" in changes else published, **changes)
    trained(tmp_path, config)
    folder = exported(tmp_path, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (line,) = parity.verify(folder, config, tmp_path)
    origin = "our reading of the same files" if "bfloat16" in changes.values() else "the checkpoint"
    assert re.search(rf"2,500 tokens in \d prompts differ by at most \d\.\de-0[5-9] nats .* and {origin}$", line), line


@needs_torch
def test_a_wrong_export_is_noticed(merged, tmp_path):
    workdir, config, params, folder = merged
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    worse = params | {"final_norm": params["final_norm"] * 1.001}
    hf_weights.save(tmp_path / "worse", SMALL, worse, tokenizer=None)
    shutil.copy(tmp_path / "worse" / "model.safetensors", copy)
    with pytest.raises(ValueError, match=r"between transformers and the checkpoint, more than 0\.0001 .*do not use"):
        parity.verify(copy, config, workdir)
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text(template.replace("keep the memory", "keep a memory"))
    with pytest.raises(ValueError, match=r"encodes a prompt otherwise than training did, from token \d+ on: ' ?a"):
        parity.verify(copy, config, workdir)


@pytest.mark.parametrize("number", [pytest.param(0, marks=needs_torch, id="transformers"), pytest.param(1, id="ours")])
def test_the_cards_programs_run(merged, monkeypatch, number):
    *_, folder = merged
    monkeypatch.chdir(folder)
    program = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[number]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, "README.md", "exec"), {})
    assert out.getvalue()
