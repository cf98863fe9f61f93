"""Tests of finemem_jax/config: what each setting may be, names and values, and how configs are compared."""

import dataclasses
import json
import re

import pytest

from finemem_jax import config as config_lib
from finemem_jax.config import fields
from finemem_jax.config.sections import Config, Server

FIELDS = sorted(config_lib.flatten(Config()))

# A value just outside of what each field takes.
BAD = {
    "export.form": "onnx",
    "export.dtype": "int8",
    "train.barrier_seconds": 0.0,
    "train.keep_best": -1,
    "train.max_skipped_updates": 0,
    "train.max_memory_gigabytes": -1.0,
    "rollout.group_size": 1,
    "rollout.streams_per_step": 0,
    "rollout.max_new_tokens": 0,
    "rollout.temperature": 0.0,
    "rollout.top_k": -1,
    "rollout.top_p": 0.0,
    "rollout.global_question_fraction": 1.01,
    "data.chunks_per_stream": 0,
    "data.chunk_words": 0,
    "data.questions_per_chunk": -1,
    "data.questions_per_stream": -1,
    "data.num_train": -1,
    "data.num_test": -1,
    "memory.top_k": 0,
    "memory.view_tokens": 0,
    "memory.view_top_k": 0,
    "memory.budget_tokens": -1,
    "follow.idle_seconds": -1.0,
    "evaluate.context_tokens": 0,
    "evaluate.summary_tokens": 0,
    "evaluate.batch": 0,
    "memory.view_items": -1,
    "memory.core_tokens": 0,
    "memory.layout": "tree",
    "memory.retrieval": "tfidf",
    "memory.embedder": "bert",
    "manager.chunk_tokens": 0,
    "manager.long_chunk": "cut",
    "manager.num_examples": 3,
    "manager.tool_call_format": "xml",
    "sampler.num_slots": 0,
    "sampler.steps_per_call": 0,
    "sampler.prefill_tokens": 0,
    "sampler.dtype": "float16",
    "reader.max_new_tokens": 0,
    "reader.num_slots": 0,
    "objective.clip_low": 1.5,
    "objective.clip_high": -0.1,
    "objective.advantage_epsilon": -1e-6,
    "optimizer.weight_decay": -0.1,
    "optimizer.b1": 1.0,
    "optimizer.b2": 1.0,
    "rollout.global_question_threshold": -1,
    "reader.num_examples": -1,
    "reader.temperature": -0.1,
    "reader.kind": "oracle",
    "judge.kind": "jury",
    "questions.generator.kind": "reader",
    "questions.verifier.kind": "evidence",
    "judge.max_new_tokens": 0,
    "judge.temperature": -0.1,
    "judge.tries": 0,
    "likelihood.check_every": -1,
    "likelihood.batch_tokens": 0,
    "answers.max_megabytes": 0,
    "credit.beta": 1.5,
    "credit.rule": "Full",
    "objective.ratio": "turn",
    "objective.kl_weight": -0.1,
    "objective.importance_cap": -1.0,
    "objective.std_floor": -0.1,
    "objective.advantage_scale": "mad",
    "objective.advantage_ddof": 2,
    "model.tokenizer": "words",
    "model.param_dtype": "float16",
    "model.remat": "all",
    "model.compute_dtype": "float16",
    "model.attention": "flash",
    "lora.rank": -1,
    "objective.aggregation": "mean",
    "optimizer.warmup_steps": -1,
    "optimizer.learning_rate": -1e-6,
    "optimizer.clip_norm": -1.0,
    "train.num_steps": -1,
    "train.minibatches": 0,
    "train.epochs": 0,
    "train.groups_per_microbatch": 0,
    "train.length_multiple": 0,
    "train.checkpoint_every": 0,
    "train.keep_checkpoints": 0,
    "train.evaluate_every": -1,
    "train.stop_after_seconds": -1,
    "memory.view": "all",
    "memory.eviction": "random",
    "questions.keep": 0,
    "questions.proposals": 0,
    "questions.rounds": 0,
    "questions.temperature": -0.1,
    "questions.max_answer_words": 0,
    "questions.duplicate": 0.0,
    "questions.min_score": 1.5,
    "questions.num_examples": 2,
    "questions.proposal_tokens": 0,
    "questions.answer_tokens": 0,
    "questions.max_tokens": -1,
    "questions.max_money": -1.0,
    "servers.main.concurrency": 0,
    "servers.main.requests_per_minute": -1.0,
    "servers.main.tokens_per_minute": -1.0,
    "servers.main.call_seconds": 0.0,
    "servers.main.total_seconds": -1.0,
}


def with_value(name, value):
    return config_lib.changed(Config(), {name: value})


# --------------------------------------------------------------------------------------
# What each setting may be
# --------------------------------------------------------------------------------------


def test_the_default_is_valid():
    assert config_lib.parse(config_lib.default()) == Config()


def test_the_shrunken_default_is_valid():
    config = config_lib.parse(config_lib.shrink(config_lib.default()))
    assert sorted(config_lib.flatten(config)) == FIELDS


@pytest.mark.parametrize(("name", "value"), BAD.items())
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=rf"{re.escape(name)} must .*(got|;) ?.*{re.escape(str(value))}"):
        with_value(name, value)


def test_all_ranges_and_choices_are_tried():
    infos = {name: fields.info(config_lib._fields_to(name)[-1]) for name in FIELDS}
    checked = {name for name, about in infos.items() if about.choices or about.range()}
    # Entries of a table are alike.
    assert {name for name in checked if not name.startswith("servers.second.")} == set(BAD)


@pytest.mark.parametrize("name", ["optimizer.learning_rate", "credit.beta", "rollout.temperature"])
def test_nan_is_refused(name):
    with pytest.raises(ValueError, match=re.escape(name)):
        with_value(name, float("nan"))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("rollout.group_size", 2.0, "a whole number"),
        ("rollout.group_size", True, "a whole number"),
        ("rollout.temperature", "1", "a number"),
        ("data.name", 1, "a text"),
        ("model.thinking", 1, "True or False"),
    ],
)
def test_a_value_of_another_type_is_named(name, value, wanted):
    with pytest.raises(ValueError, match=rf"{name} must be {wanted}, got {value!r}"):
        with_value(name, value)


def test_whole_numbers_are_numbers():
    assert repr(with_value("rollout.temperature", 1).rollout.temperature) == "1.0"


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_says_what_it_means(name):
    assert all(fields.info(one).doc or fields.info(one).of for one in config_lib._fields_to(name))


def test_values_as_texts():
    texts = {"train.epochs": "3", "optimizer.b1": "0.5", "model.thinking": "true", "data.name": "squad"}
    expected = {"train.epochs": 3, "optimizer.b1": 0.5, "model.thinking": True, "data.name": "squad"}
    assert config_lib.from_texts(texts) == expected
    with pytest.raises(ValueError, match="train.epochs must be a whole number, got 'many'"):
        config_lib.from_texts({"train.epochs": "many"})
    with pytest.raises(ValueError, match="there is no setting 'train.epoch'; is it train.epochs"):
        config_lib.from_texts({"train.epoch": "3"})


def test_system_messages_from_files(tmp_path):
    (tmp_path / "reader.txt").write_text("Be brief – now.\n", encoding="utf-8")
    (tmp_path / "other").write_bytes(b"\xff\xfe")
    config = config_lib.changed(
        Config(), {"reader.system": f"@{tmp_path}/reader.txt", "manager.system": "Keep all.", "data.name": "@a"}
    )
    assert (config.reader.system, config.manager.system, config.data.name) == ("Be brief – now.", "Keep all.", "@a")
    for name in ("missing", "other"):
        with pytest.raises(ValueError, match=rf"judge.answer_system='@.*/{name}' cannot be read"):
            with_value("judge.answer_system", f"@{tmp_path}/{name}")


def test_more_servers_in_code():
    values = config_lib.default()
    values.servers.large = config_lib.server(urls="http://large/v1", model="large")
    values.reader.kind, values.reader.server = "server", "large"
    config = config_lib.parse(values)
    assert config.servers["large"] == Server(urls="http://large/v1", model="large")
    assert config_lib.from_saved(json.loads(json.dumps(config_lib.flatten(config)))) == config


# --------------------------------------------------------------------------------------
# Names, and comparing configs
# --------------------------------------------------------------------------------------


def test_misspelt_fields_fail():
    with pytest.raises((KeyError, AttributeError)):
        _ = config_lib.default().rollout.groupsize
    with pytest.raises(ValueError, match="there is no setting 'rollout.groupsize'; is it rollout.group_size"):
        with_value("rollout.groupsize", 4)
    values = config_lib.default()
    values.rollout.groupsize = 4
    with pytest.raises(ValueError, match="there is no setting 'rollout.groupsize'"):
        config_lib.parse(values)


def test_default_is_made_anew():
    config_lib.default().rollout.group_size = 99
    assert config_lib.default().rollout.group_size != 99


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().rollout.group_size = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_flatten_of_both_forms():
    flat = config_lib.flatten(Config())
    assert flat == config_lib.flatten(config_lib.default())
    assert (flat["seed"], flat["rollout.group_size"], flat["servers.main.model"]) == (0, 8, "")
    assert not any(hasattr(value, "items") or dataclasses.is_dataclass(value) for value in flat.values())


def test_equal_configs_do_not_differ():
    assert config_lib.differences(Config(), json.loads(json.dumps(config_lib.flatten(Config())))) == []


def test_differences_by_hand():
    saved = config_lib.flatten(Config())
    saved["train.old_field"] = 1
    del saved["seed"]
    assert config_lib.differences(with_value("rollout.group_size", 4), saved) == [
        "rollout.group_size: 8 → 4",
        "seed: '(absent)' → 0",
        "train.old_field: 1 → '(absent)'",
    ]


def test_conflicts_leave_out_how_long_a_run_is():
    config = config_lib.changed(Config(), {"train.num_steps": 86, "credit.beta": 0.25, "evaluate.batch": 3})
    assert config_lib.conflicts(config, config_lib.flatten(Config())) == ["credit.beta: 0.5 → 0.25"]


def test_servers_may_move():
    there = {"reader.kind": "server", "servers.main.urls": "http://localhost/v1", "servers.main.model": "m"}
    config = config_lib.changed(Config(), there)
    saved = config_lib.flatten(config)
    moved = {"servers.main.urls": "http://other/v1", "servers.main.concurrency": 5, "servers.main.key_variable": "KEY"}
    moved |= {"answers.file": "/tmp/shared.sqlite"}
    assert config_lib.conflicts(config_lib.changed(config, moved), saved) == []
    other = config_lib.changed(config, {"servers.main.model": "another"})
    assert config_lib.conflicts(other, saved) == ["servers.main.model: 'm' → 'another'"]
