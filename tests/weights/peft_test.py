"""Adapters come back from PEFT's files, and those of another shape are refused: finemem_jax/weights/peft.py."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from finemem_jax.models import lora, presets
from finemem_jax.weights import peft

BASE = presets.preset("tiny")
ADAPTED = dataclasses.replace(BASE, lora=lora.parse(3, 6.0, "query,value,down"))


@pytest.fixture(scope="module")
def trained():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), lora.init(ADAPTED, 1))


def test_peft_files_come_back(trained, tmp_path):
    peft.save(tmp_path, ADAPTED, trained, base_model="some/base")
    jax.tree.map(np.testing.assert_array_equal, peft.load(tmp_path, ADAPTED), lora.split(trained)[1])
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert about["target_modules"] == ["q_proj", "v_proj", "down_proj"]
    assert (about["r"], about["lora_alpha"], about["base_model_name_or_path"]) == (3, 6.0, "some/base")
    held = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    shapes = {held[f"base_model.model.model.layers.1.self_attn.q_proj.lora_{x}.weight"].shape for x in "AB"}
    assert shapes == {(3, 48), (64, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 4}, "lora.rank=4 needs .* set lora.rank to the adapter's"),
        ({"targets": ("query", "key")}, "k_proj.lora_A.weight' is missing; lora.targets"),
        ({"targets": ("query",)}, "adapts more than lora.targets says"),
    ],
)
def test_adapters_of_another_shape_are_refused(trained, tmp_path, change, message):
    peft.save(tmp_path, ADAPTED, trained, base_model="some/base")
    other = dataclasses.replace(BASE, lora=dataclasses.replace(ADAPTED.lora, **change))
    with pytest.raises(ValueError, match=message):
        peft.load(tmp_path, other)
    with pytest.raises(ValueError, match="adapter_model.safetensors; give the folder"):
        peft.load(tmp_path / "elsewhere", other)
