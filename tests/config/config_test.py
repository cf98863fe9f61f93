"""Tests of finemem_jax/config.py: what is refused, that every field says what it is, and how configs are compared."""

import inspect
import json
import re

import pytest

from finemem_jax import config as config_lib
from finemem_jax.config import checks

FIELDS = sorted(config_lib.flatten(config_lib.default()))

# A value just outside of what each field takes.
BAD = {
    "export.form": "onnx",
    "export.dtype": "int8",
    "export.shard_gigabytes": 0.0,
    "export.verify_tokens": 0,
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
    "follow.poll_seconds": -1.0,
    "evaluate.num_streams": -2,
    "evaluate.chunks_per_stream": -1,
    "evaluate.chunk_words": -1,
    "evaluate.questions_per_stream": -1,
    "evaluate.context_tokens": 0,
    "evaluate.rag_top_k": 0,
    "evaluate.summary_tokens": 0,
    "evaluate.batch": 0,
    "evaluate.resamples": 0,
    "memory.view_items": -1,
    "memory.core_tokens": 0,
    "memory.layout": "tree",
    "memory.retrieval": "tfidf",
    "memory.embedder": "bert",
    "manager.chunk_tokens": 0,
    "manager.long_chunk": "cut",
    "manager.num_examples": 3,
    "manager.wire": "xml",
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
    "likelihood.chunk_share": 1.5,
    "likelihood.final_chunk_share": -0.5,
    "likelihood.anneal_steps": -1,
    "likelihood.check_every": -1,
    "likelihood.batch_tokens": 0,
    "answers.max_megabytes": 0,
    "credit.beta": 1.5,
    "credit.rule": "Full",
    "credit.bloat_weight": -0.1,
    "credit.type_factor": -1.0,
    "credit.type_factor_on": "loss",
    "credit.gain_transform": "square",
    "credit.cited_by": "judge",
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
}


def with_value(name, value):
    config = config_lib.default()
    config.update_from_flattened_dict({name: value})
    return config


def test_the_default_is_valid():
    checks.validate(config_lib.default())


def test_the_shrunken_default_is_valid():
    config = config_lib.shrink(config_lib.default())
    checks.validate(config)
    assert sorted(config_lib.flatten(config)) == FIELDS


@pytest.mark.parametrize(("name", "value"), BAD.items())
def test_validate_names_field_and_value(name, value):
    with pytest.raises(ValueError, match=rf"{re.escape(name)} must .*(got|;) ?.*{re.escape(str(value))}"):
        checks.validate(with_value(name, value))


@pytest.mark.parametrize("name", ["optimizer.learning_rate", "credit.beta", "rollout.temperature"])
def test_validate_refuses_nan(name):
    with pytest.raises(ValueError, match=re.escape(name)):
        checks.validate(with_value(name, float("nan")))


@pytest.mark.parametrize("cut", [{"rollout.top_k": 5}, {"rollout.top_p": 0.9}])
def test_divergence_in_the_reward_needs_the_whole_distribution(cut):
    config = config_lib.default()
    config.update_from_flattened_dict(cut)
    checks.validate(config)
    config.credit.kl_weight = 0.1
    with pytest.raises(ValueError, match=r"credit.kl_weight .* set rollout.top_k=0 and rollout.top_p=1"):
        checks.validate(config)


@pytest.mark.parametrize("change", [{"sampler.int8": True}, {"sampler.dtype": "bfloat16"}])
def test_in_place_is_as_the_trainer_has_it(change):
    config = config_lib.default()
    config.sampler.in_place = True
    checks.validate(config)
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=r"set sampler.int8=False and sampler.dtype='float32' \(model.param_dtype\)"):
        checks.validate(config)


SERVERS = {"reader.kind": "endpoint", "reader.endpoint.urls": "http://localhost/v1", "reader.endpoint.model": "m"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reader.endpoint.urls": ""}, r"reader.endpoint.urls must not be empty.*urls=http://localhost:8000/v1"),
        ({"reader.endpoint.model": " "}, "reader.endpoint.model must not be empty"),
        ({"reader.endpoint.concurrency": 0}, "reader.endpoint.concurrency must be above 0, got 0"),
        ({"reader.endpoint.call_seconds": 0.0}, "reader.endpoint.call_seconds must be above 0"),
        ({"reader.endpoint.total_seconds": -1.0}, "reader.endpoint.total_seconds must be above 0"),
        ({"reader.endpoint.requests_per_minute": -1.0}, "reader.endpoint.requests_per_minute must be at least 0"),
        ({"reader.endpoint.tokens_per_minute": float("nan")}, "reader.endpoint.tokens_per_minute must be at least 0"),
        ({"reader.endpoint.extra": "{"}, r"reader.endpoint.extra must be a JSON object \(.*got '{'"),
        ({"reader.endpoint.extra": "[1]"}, r"reader.endpoint.extra must be a JSON object; got '\[1\]'"),
        ({"judge.kind": "endpoint"}, "judge.endpoint.urls must not be empty where judge.kind is 'endpoint'"),
    ],
)
def test_endpoints_that_cannot_be(changes, message):
    config = config_lib.default()
    config.update_from_flattened_dict(SERVERS)
    checks.validate(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        checks.validate(config)


def test_float16_is_for_llama_cpp():
    config = with_value("export.dtype", "float16")
    with pytest.raises(ValueError, match="export.dtype='float16' is for export.form='gguf' only, got .*'merged'"):
        checks.validate(config)
    config.export.form = "gguf"
    checks.validate(config)


def test_servers_may_move():
    config = config_lib.default()
    config.update_from_flattened_dict(SERVERS)
    saved = config_lib.flatten(config)
    config.reader.endpoint.urls, config.reader.endpoint.concurrency = "http://other/v1", 5
    config.judge.endpoint.key_variable = "MY_KEY"
    config.answers.file = "/tmp/shared.sqlite"
    assert config_lib.conflicts(config, saved) == []
    config.reader.endpoint.model = "another"
    assert config_lib.conflicts(config, saved) == ["reader.endpoint.model: 'm' → 'another'"]


def test_prompts_from_files(tmp_path):
    (tmp_path / "reader.txt").write_text("Be brief – now.\n", encoding="utf-8")
    (tmp_path / "other").write_bytes(b"\xff\xfe")
    config = with_value("prompts.reader", f"@{tmp_path}/reader.txt")
    config.prompts.manager = "Keep all."
    config_lib.read_prompts(config)
    assert (config.prompts.reader, config.prompts.manager) == ("Be brief – now.", "Keep all.")
    for name in ("missing", "other"):
        config.prompts.answer_judge = f"@{tmp_path}/{name}"
        with pytest.raises(ValueError, match=rf"prompts.answer_judge='@.*/{name}' cannot be read"):
            config_lib.read_prompts(config)


def test_all_that_validate_checks_is_tried():
    # Names of fields in that module's source, quoted or as attributes.
    source = inspect.getsource(checks)
    checked = {name for name in FIELDS if f'"{name}"' in source or f"config.{name}" in source}
    # Tests of their own try the last ones, which are wrong only beside another, and endpoints.
    assert checked == set(BAD) | {"credit.kl_weight", "sampler.in_place", "sampler.int8"}


@pytest.mark.parametrize(
    "name",
    FIELDS,
)
def test_every_field_has_a_comment(name):
    of_endpoints = ".endpoint." in name
    source = inspect.getsource(config_lib._endpoint if of_endpoints else config_lib.default)
    lines, name = source.splitlines(), name.rpartition(".")[2] if of_endpoints else name

    def comment(of):
        (line,) = [line for line in lines if line.strip().startswith(f"config.{of} = ")]
        return line.partition("  # ")[2]

    # A group of fields with one meaning may have it on the group's line.
    group = name.rpartition(".")[0]
    assert comment(name) or (group and comment(group))


def test_curriculum_by_hand():
    config = with_value("data.chunks_per_stream", 8)
    assert config_lib.curriculum(config) == [(0, 8)]
    config.train.curriculum = "0:2, 20:4,60:8"
    assert config_lib.curriculum(config) == [(0, 2), (20, 4), (60, 8)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5:2", "ascend from 0.*got '5:2'"),
        ("0:2,20:4,20:8", "ascend from 0"),
        ("0:2,20:4,10:8", "ascend from 0"),
        ("0:2,", "step:chunks.*'0:2,'"),
        ("0-2", "step:chunks"),
        ("2", "step:chunks"),
        ("0:-2", "step:chunks"),
        ("0:0", "got 0 in '0:0'; lower it"),
        ("0:2,5:11", "data.chunks_per_stream=10 chunks.*got 11 .*raise data.chunks_per_stream"),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(text, message):
    with pytest.raises(ValueError, match=rf"train.curriculum must .*{message}"):
        checks.validate(with_value("train.curriculum", text))


def test_conflicts_leave_out_how_long_a_run_is():
    config = config_lib.default()
    saved = config_lib.flatten(config)
    config.train.num_steps += 1
    config.credit.beta = 0.25
    assert config_lib.conflicts(config, saved) == ["credit.beta: 0.5 → 0.25"]


def test_misspelt_fields_fail():
    with pytest.raises((KeyError, AttributeError)):
        _ = config_lib.default().rollout.groupsize
    with pytest.raises(KeyError):
        config_lib.value_of(config_lib.default(), "rollout.groupsize")


def test_default_is_made_anew():
    config_lib.default().rollout.group_size = 99
    assert config_lib.default().rollout.group_size != 99


def test_flatten_and_value_of_agree():
    config = config_lib.default()
    flat = config_lib.flatten(config)
    assert flat["seed"] == 0
    assert flat["rollout.group_size"] == config.rollout.group_size
    assert all(config_lib.value_of(config, name) == value for name, value in flat.items())
    assert not any(hasattr(value, "items") for value in flat.values())


def test_equal_configs_do_not_differ():
    config = config_lib.default()
    assert config_lib.differences(config, json.loads(json.dumps(config_lib.flatten(config)))) == []


def test_differences_by_hand():
    saved = config_lib.flatten(config_lib.default())
    saved["train.old_field"] = 1
    del saved["seed"]
    config = config_lib.default()
    config.rollout.group_size = 4
    assert config_lib.differences(config, saved) == [
        f"rollout.group_size: {saved['rollout.group_size']} → 4",
        "seed: '(absent)' → 0",
        "train.old_field: 1 → '(absent)'",
    ]
