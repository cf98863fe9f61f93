"""Tests of finemem_jax/models/presets.py: sizes of the published models, and shapes that disagree."""

import dataclasses

import pytest

from finemem_jax.models import presets

# Totals that the models' own files state (safetensors' metadata), tied embeddings counted once.
TOTALS = {
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "llama31_8b": 8_030_261_248,
    "llama31_70b": 70_553_706_496,
    "llama31_405b": 405_853_388_800,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "llama33_70b": 70_553_706_496,
    "qwen25_0_5b": 494_032_768,
    "qwen25_1_5b": 1_543_714_304,
    "qwen25_3b": 3_085_938_688,
    "qwen25_7b": 7_615_616_512,
    "qwen25_14b": 14_770_033_664,
    "qwen25_32b": 32_763_876_352,
    "qwen25_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
}


@pytest.mark.parametrize("name", TOTALS)
def test_published_totals(name):
    assert presets.preset(name).num_parameters == TOTALS[name]


@pytest.mark.parametrize("config", presets.PRESETS.values(), ids=list(presets.PRESETS))
def test_every_preset_is_of_one_family(config):
    assert (config.qkv_bias, config.qk_norm) == (config.family == "qwen2", config.family == "qwen3")
    assert config.num_heads % config.num_kv_heads == 0
    assert (config.rope_scaling is not None) == config.name.startswith(("llama31", "llama32", "llama33"))


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"model\.name must be one of tiny, .*or 'auto' to read .*; got 'gpt2'"):
        presets.preset("gpt2")


def test_auto_takes_what_is_found_and_knows_its_name():
    found = dataclasses.replace(presets.preset("qwen3_4b"), name="Qwen3-4B", max_length=123)
    assert presets.resolve("auto", found, "a folder") == dataclasses.replace(found, name="qwen3_4b")
    unknown = dataclasses.replace(found, mlp_dim=7)
    assert presets.resolve("auto", unknown, "a folder") is unknown
    # Qwen2 and Qwen2.5 share shapes, so that their files' own name says more.
    both = dataclasses.replace(presets.preset("qwen25_7b"), name="Qwen2.5-7B-Instruct")
    assert presets.resolve("auto", both, "a folder").name == "Qwen2.5-7B-Instruct"
    assert presets.resolve("qwen25_7b", both, "a folder").name == "qwen25_7b"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_dim": 97}, r"mlp_dim is 97 there and 96 here\. .*set model\.name='auto'"),
        ({"num_layers": 3, "rope_theta": 1e6}, r"num_layers is 3 there and 2 here; rope_theta is 1000000\.0 there"),
        ({"rope_scaling": presets.RopeScaling(8.0, 1.0, 4.0, 32)}, r"rope_scaling is RopeScaling\(.*and None here"),
    ],
)
def test_a_preset_that_disagrees_is_refused_with_both_values(changes, message):
    found = dataclasses.replace(presets.preset("tiny"), **changes)
    with pytest.raises(ValueError, match=r"some/folder is no tiny \(model\.name\): " + message):
        presets.resolve("tiny", found, "some/folder")


def test_the_right_preset_is_named():
    with pytest.raises(ValueError, match=r"set model\.name='smollm2_360m'"):
        presets.resolve("smollm2_135m", presets.preset("smollm2_360m"), "some/folder")
