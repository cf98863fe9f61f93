"""Tests of finemem_jax/weights/hf_config.py: published forms of config.json, and what is refused by name."""

import dataclasses
import json

import pytest

import parity_cases
from finemem_jax.models import presets
from finemem_jax.weights import hf_config

CASES = list(parity_cases.CASES.values())
SCALED = parity_cases.CASES["llama_scaled"]


def write(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("config", CASES, ids=list(parity_cases.CASES))
def test_reads_what_published_files_say(tmp_path, config):
    assert hf_config.read(write(tmp_path, parity_cases.config_json(config))) == _named(config, tmp_path)


@pytest.mark.parametrize("config", presets.PRESETS.values(), ids=list(presets.PRESETS))
def test_reads_what_it_writes(tmp_path, config):
    assert hf_config.read(write(tmp_path, hf_config.to_fields(config, "bfloat16"))) == _named(config, tmp_path)


def _named(config, folder):
    return dataclasses.replace(config, name=folder.name)


def test_reads_what_transformers_writes(tmp_path):
    # Version 5 has "rope_parameters" with θ inside, "dtype", and a type for every layer.
    fields = parity_cases.config_json(SCALED)
    fields["rope_parameters"] = fields.pop("rope_scaling") | {"rope_theta": fields.pop("rope_theta")}
    fields |= {"dtype": fields.pop("torch_dtype"), "layer_types": ["full_attention"] * 2}
    assert hf_config.read(write(tmp_path, fields)) == _named(SCALED, tmp_path)


@pytest.mark.parametrize("config", CASES, ids=list(parity_cases.CASES))
def test_transformers_reads_what_it_writes(tmp_path, config):
    transformers = pytest.importorskip("transformers")
    found = transformers.AutoConfig.from_pretrained(write(tmp_path, hf_config.to_fields(config, "float32")))
    assert hf_config.from_fields(found.to_dict(), tmp_path / "config.json") == _named(config, tmp_path)


def test_what_old_files_leave_out(tmp_path):
    # Llama 2 and Qwen2 say nothing of head_dim, Llama 1 nothing of grouped keys and θ.
    fields = parity_cases.config_json(dataclasses.replace(SCALED, rope_scaling=None))
    for name in ("head_dim", "num_key_value_heads", "rope_theta", "tie_word_embeddings"):
        fields.pop(name)
    got = hf_config.read(write(tmp_path, fields))
    assert (got.head_dim, got.num_kv_heads, got.rope_theta, got.tie_embeddings) == (8, 6, 10_000.0, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "model_type 'qwen3_moe' with arch"),
        (
            {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]},
            "'Gemma2ForCausalLM' is not supported",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture 'LlamaForSequenceClassification' is not"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' is not supported; .*\(hidden_act='silu'\)"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types=.*sliding_attention.* is not",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*fp8.* is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling of type 'yarn'.* is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling of type 'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' lacks a number: 'low_freq_factor'"),
        ({"hidden_size": None}, "hidden_size must be a positive whole number, got None"),
        ({"vocab_size": "64"}, "vocab_size must be a positive whole number, got '64'"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4 must divide num_attention_heads=6"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number, got 'small'"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        hf_config.read(write(tmp_path, parity_cases.config_json(SCALED) | changes))
    assert str(tmp_path / "config.json") in str(caught.value)


def test_broken_files(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json.*set model\.weights to a folder with"):
        hf_config.read(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json .*JSON.*fetch it again"):
            hf_config.read(tmp_path)


def test_a_shape_of_no_family_is_not_written():
    with pytest.raises(ValueError, match="biases are 'qwen2', normalized heads are 'qwen3'"):
        hf_config.to_fields(dataclasses.replace(SCALED, qkv_bias=True), "float32")
