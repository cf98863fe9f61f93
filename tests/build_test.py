"""Tests of finemem_jax/build.py: what a config chooses, and choices that do not go together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hf_folders
import smoke_run
from finemem_jax import build, input_pipeline
from finemem_jax.config.sections import Config
from finemem_jax.memory.operations import Dialect, parse
from finemem_jax.models import decoder, presets, sharding
from finemem_jax.rl import credit_rules
from finemem_jax.rl.method import Method, rollout_options
from finemem_jax.runtime import files
from finemem_jax.types import Action, Operation
from finemem_jax.weights import hf_weights, tokenizer_files


def config(**changes):
    return smoke_run.config(**changes)


def test_the_default_is_the_paper():
    method = Method.from_config(Config())
    assert method.rule is credit_rules.RULES["full"]
    assert method.credit == credit_rules.CreditConfig()
    assert (method.credit.beta, method.credit.chunk_weight, method.credit.compression_weight) == (0.5, 0.5, 0.05)
    assert (method.normalizer.scale, method.normalizer.ddof, method.normalizer.epsilon) == ("std", 1, 1e-6)
    assert method.objective.kl_weight == method.objective.dual_clip == method.objective.importance_cap == 0
    assert (method.objective.clip_low, method.objective.clip_high, method.objective.ratio) == (0.2, 0.2, "token")


@pytest.mark.parametrize("rule", list(credit_rules.RULES))
def test_every_rule_can_be_chosen(rule):
    settings = config(**{"credit.rule": rule, "memory.layout": "typed" if rule == "type_weight" else "flat"})
    assert Method.from_config(settings).rule is credit_rules.RULES[rule]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.kl_estimator": "k1"}, r"credit\.kl_weight"),
        ({"objective.dual_clip": 0.5}, r"objective\.dual_clip must be above 1"),
        ({"credit.rule": "type_weight"}, r"memory\.layout='typed'"),
        ({"credit.rule": "shapley", "memory.top_k": 20}, r"Lower memory\.top_k, or use credit\.rule='ablation'"),
        ({"credit.rule": "mem-alpha"}, r"credit\.rule must be one of outcome, .*got 'mem-alpha'"),
    ],
)
def test_choices_that_cannot_work_are_refused_with_the_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        Method.from_config(config(**changes))


def test_evaluation_measures_nothing_that_only_credit_needs():
    settings = config(**{"credit.rule": "shapley"})
    assert rollout_options(settings, evaluation=False).needs == {"subsets"}
    assert rollout_options(settings, evaluation=True).needs == frozenset()
    # But a reader that is asked to cite writes citations there too, and they must come off its answers.
    settings = config(**{"credit.rule": "cited"})
    assert rollout_options(settings, evaluation=True).needs == {"citations"}


@pytest.mark.parametrize("layout", ["flat", "typed"])
@pytest.mark.parametrize("call_format", ["json_lines", "hermes", "qwen_agent"])
def test_test_phrases_are_operations_of_the_dialect(layout, call_format):
    settings = config(**{"memory.layout": layout, "manager.tool_call_format": call_format})
    parts = build.build(settings)
    phrases = [parts.tokenizer.token_bytes(i).decode() for i in range(258, parts.tokenizer.vocab_size)]
    assert parts.tokenizer.vocab_size == parts.model.vocab_size
    found = [parse(phrase, dialect=Dialect(layout, call_format)) for phrase in phrases]
    assert all(len(one) == 1 and isinstance(one[0], Operation) for one in found)
    actions = {one[0].action for one in found if isinstance(one[0], Operation)}
    assert actions == set(Action) - ({Action.SKIP} if layout == "typed" else set())


def test_test_phrases_answer_questions_of_both_splits():
    settings = config()
    parts = build.build(settings)
    known = "".join(parts.tokenizer.token_bytes(i).decode() for i in range(258, parts.tokenizer.vocab_size))
    for split in ("train", "test"):
        stream = input_pipeline.streams(settings, split, parts.environment)[0]
        question = stream.chunks[0].questions[0]
        assert question.answers[0] in known


def test_a_judge_and_an_embedder_come_only_where_they_are_needed():
    plain = build.build(config())
    assert plain.answering.content_judge is None and plain.embed is None
    full = build.build(config(**{"credit.rule": "mem_alpha", "memory.retrieval": "dense", "memory.embedder": "model"}))
    assert full.answering.content_judge is not None and full.embed is not None


# --------------------------------------------------------------------------------------
# Models from files
# --------------------------------------------------------------------------------------

# Qwen3 in small, with rows beyond its tokenizer's vocabulary as published models have.
SMALL = dataclasses.replace(
    presets.preset("tiny"), name="small", vocab_size=272, num_layers=1, family="qwen3", qk_norm=True, max_length=2048
)


def export(folder, model=SMALL):
    source = hf_folders.write_tokenizer(folder.parent)
    hf_weights.save(folder, model, decoder.init(model, 0), tokenizer=tokenizer_files.from_folder(source))
    return folder


def from_folder(folder, **changes):
    settings = {"model.weights": str(folder), "model.name": "auto", "model.tokenizer": "weights"}
    return config(**settings | changes)


def test_a_folder_is_all_that_a_run_needs(tmp_path):
    folder = export(tmp_path / "small")
    changes = {"train.num_steps": 1, "train.evaluate_first": False, "data.chunks_per_stream": 1}
    smoke_run.run(tmp_path / "run", from_folder(folder, **changes))
    (metrics,) = files.read_metrics(tmp_path / "run")
    assert metrics["operations/valid_fraction"] == 0


def test_a_folders_weights_and_tokens_come_through(tmp_path):
    parts = build.build(from_folder(export(tmp_path / "small")))
    assert parts.model == SMALL
    jax.tree.map(np.testing.assert_array_equal, parts.params, decoder.init(SMALL, 0))
    assert parts.tokenizer.frame(("user",))[0] == "<|im_start|>user\n"
    half = build.build(from_folder(tmp_path / "small", **{"model.param_dtype": "bfloat16"}))
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.name": "tiny"},
            r"small \(model\.weights\) is no tiny \(model\.name\): vocab_size is 272 there",
        ),
        ({"model.weights": "random"}, r"model\.weights is 'random'.*set model\.name to one of tiny, "),
        (
            {"model.weights": "random", "model.name": "tiny"},
            r"'weights', but model\.weights is 'random'; set",
        ),
        ({"model.tokenizer": "bytes_and_operations"}, r"has 384 tokens, but the model \(small\) only 272 embeddings"),
    ],
)
def test_models_that_cannot_be_are_refused_before_anything_is_compiled(tmp_path, changes, message):
    settings = from_folder(export(tmp_path / "small"), **changes)
    with pytest.raises(ValueError, match=message):
        build.build(settings)


def test_a_larger_tokenizer_than_its_model_is_refused(tmp_path):
    folder = export(tmp_path / "small", dataclasses.replace(SMALL, vocab_size=200))
    with pytest.raises(ValueError, match=r"model\.weights=.*has 267 tokens, but the model \(small\) only 200"):
        build.build(from_folder(folder))


def test_devices_train_on_whole_groups():
    """mesh.fsdp=-1, the default, takes all devices: only the mesh tells how many share out a micro-batch."""
    mesh = sharding.make_mesh(1, -1, 1)
    with pytest.raises(ValueError, match=r"groups_per_microbatch=3 must be a multiple of .* = 2.*or move devices"):
        build.compute(config(**{"train.groups_per_microbatch": 3}), mesh)
