"""Workdirs of a small model as training leaves them, and their exports; shared by tests."""

import dataclasses

import jax
import numpy as np
import optax

import smoke_run
from finemem_jax.models import decoder, lora, presets
from finemem_jax.rl import learner
from finemem_jax.runtime import checkpoint
from finemem_jax.serving import export
from finemem_jax.weights import pretrained

# A small Qwen3, with rows beyond its tokenizer's vocabulary as published models have.
SMALL = dataclasses.replace(
    presets.preset("tiny"), name="small", vocab_size=272, family="qwen3", qk_norm=True, max_length=4096
)
STEP = 3
# As transformers takes it.
END = {"eos_token": "<|im_end|>"}


def settings(published, **changes):
    weights = {"model.weights": str(published), "model.name": "auto", "model.tokenizer": "weights"}
    return smoke_run.config(**weights | {"manager.num_examples": 1} | changes)


def trained(workdir, config, model=SMALL):
    """Makes a workdir as training leaves it; returns what was trained."""
    model = pretrained.adapted(config, model)
    params = lora.split(decoder.init(model, 7))[1]
    rng = np.random.default_rng(0)
    # Adapters begin with products of 0, which would show nothing.
    params = jax.tree.map(lambda x: x + 0.02 * rng.normal(size=x.shape).astype(x.dtype), params)
    params = jax.tree.map(lambda x: x.astype(config.model.param_dtype), params)
    checkpoint.claim(workdir, config)
    with checkpoint.Checkpoints(workdir, checkpoint.Retention(1)) as checkpoints:
        checkpoints.save(STEP, learner.init(params, optax.sgd(1.0)), {})
    return params


def exported(workdir, config):
    export.check(config, workdir)
    (line,) = export.run(config, workdir)
    folder = export.folder_of(config, workdir)
    assert str(folder) in line and f"after {STEP} training steps" in line
    return folder
