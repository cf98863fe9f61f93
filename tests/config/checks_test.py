"""Tests of finemem_jax/config/checks.py: settings that cannot work together, and what several of them say together."""

import pytest

from finemem_jax import config as config_lib
from finemem_jax.config import checks
from finemem_jax.config.rules import RULE_NAMES, RuleArgs
from finemem_jax.config.sections import Config, Prices


def changed(**values):
    return config_lib.changed(Config(), values)


@pytest.mark.parametrize("cut", [{"rollout.top_k": 5}, {"rollout.top_p": 0.9}])
def test_divergence_in_the_reward_needs_the_whole_distribution(cut):
    config = changed(**cut)
    with pytest.raises(ValueError, match=r"credit.kl_weight .* set rollout.top_k=0 and rollout.top_p=1"):
        config_lib.changed(config, {"credit.kl_weight": 0.1})


@pytest.mark.parametrize("change", [{"sampler.int8": True}, {"sampler.dtype": "bfloat16"}])
def test_in_place_is_as_the_trainer_has_it(change):
    config = changed(**{"sampler.in_place": True})
    with pytest.raises(ValueError, match=r"set sampler.int8=False and sampler.dtype='float32' \(model.param_dtype\)"):
        config_lib.changed(config, change)


def test_float16_is_for_llama_cpp():
    with pytest.raises(ValueError, match="export.dtype='float16' is for export.form='gguf' only, got .*'merged'"):
        changed(**{"export.dtype": "float16"})
    assert changed(**{"export.dtype": "float16", "export.form": "gguf"}).export.dtype == "float16"


# --------------------------------------------------------------------------------------
# Servers
# --------------------------------------------------------------------------------------

SERVERS = {"reader.kind": "server", "servers.main.urls": "http://localhost/v1", "servers.main.model": "m"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"servers.main.urls": ""},
            r"servers.main.urls must not be empty where reader.kind .*urls=http://localhost:8000",
        ),
        ({"servers.main.model": " "}, "servers.main.model must not be empty"),
        ({"servers.main.extra": "{"}, r"servers.main.extra must be a JSON object \(.*got '{'"),
        ({"servers.main.extra": "[1]"}, r"servers.main.extra must be a JSON object; got '\[1\]'"),
        ({"reader.server": "large"}, "reader.server must be an entry of servers, main, second; got 'large'"),
        ({"judge.kind": "server", "judge.server": "second"}, "servers.second.urls must not be empty where judge.kind"),
        ({"questions.verifier.kind": "server", "questions.verifier.server": "x"}, "questions.verifier.server must be"),
    ],
)
def test_servers_that_cannot_be(changes, message):
    config = changed(**SERVERS)
    with pytest.raises(ValueError, match=message):
        config_lib.changed(config, changes)


def test_one_entry_serves_all_roles():
    roles = {f"{role}.kind": "server" for role in ("judge", "questions.generator", "questions.verifier")}
    config = changed(**SERVERS | roles | {"servers.main.extra": '{"a": 1}'})
    assert checks.extra_fields(config, config.judge.server) == {"a": 1}


def test_the_judge_may_have_another_server():
    other = {"judge.kind": "server", "judge.server": "second", "servers.second.urls": "http://b/v1"}
    config = changed(**SERVERS | other | {"servers.second.model": "j"})
    assert (config.servers[config.reader.server].model, config.servers[config.judge.server].model) == ("m", "j")


# --------------------------------------------------------------------------------------
# Several values in one text
# --------------------------------------------------------------------------------------


def test_arguments_of_a_rule():
    config = changed(**{"credit.rule": "type_weight", "credit.rule_args": "type_factor=2, type_factor_on=unclipped"})
    assert checks.rule_args(config) == RuleArgs(type_factor=2.0, type_factor_on="unclipped")
    config = changed(**{"credit.rule": "ablation", "credit.rule_args": "ablation_conserves=True"})
    assert checks.rule_args(config).ablation_conserves is True
    for rule in RULE_NAMES:
        assert checks.rule_args(changed(**{"credit.rule": rule})) == RuleArgs()


@pytest.mark.parametrize(
    ("rule", "text", "message"),
    [
        ("full", "bloat_weight=0.3", "credit.rule_args must be empty for credit.rule='full'; got 'bloat_weight=0.3'"),
        (
            "persession",
            "bloat=1",
            "must be .*bloat_weight=0.3 for credit.rule='persession'; got 'bloat=1'",
        ),
        ("persession", "bloat_weight", "got 'bloat_weight'"),
        ("persession", "bloat_weight=1,bloat_weight=2", "'bloat_weight' twice"),
        ("persession", "bloat_weight=-1", "credit.rule_args: bloat_weight must be at least 0, got -1.0"),
        ("persession", "bloat_weight=much", "credit.rule_args: bloat_weight must be a number, got 'much'"),
        ("type_weight", "type_factor=-1", "type_factor must be at least 0"),
        ("type_weight", "type_factor_on=loss", "type_factor_on must be one of advantage, unclipped; got 'loss'"),
        ("step_gain", "gain_transform=square", "gain_transform must be one of prob, log; got 'square'"),
        ("cited", "cited_by=judge", "cited_by must be one of reader, overlap; got 'judge'"),
    ],
)
def test_arguments_that_cannot_be(rule, text, message):
    with pytest.raises(ValueError, match=message):
        changed(**{"credit.rule": rule, "credit.rule_args": text})


def test_prices():
    config = changed(**{"questions.prices": "generator_prompt=2.5,verifier_new=1"})
    assert checks.prices(config) == Prices(generator_prompt=2.5, verifier_new=1.0)
    with pytest.raises(ValueError, match="questions.prices must be .*generator_new=0.0.*; got 'reader=1'"):
        changed(**{"questions.prices": "reader=1"})


def test_data_of_benchmarks():
    values = {"data.num_test": 7, "data.test_name": "squad", "data.questions_per_chunk": 3}
    config = changed(**values)
    assert checks.benchmark_data(config) == config_lib.changed(config, {"data.questions_per_chunk": 0}).data
    config = changed(**values, **{"evaluate.data": "num_test=0,questions_per_chunk=2", "evaluate.sources": "nlu,trec"})
    data = checks.benchmark_data(config)
    assert (data.num_test, data.questions_per_chunk, data.test_name, data.chunk_words) == (0, 2, "nlu,trec", 700)
    with pytest.raises(ValueError, match="evaluate.data: chunk_words must be at least 1, got 0"):
        changed(**{"evaluate.data": "chunk_words=0"})
    with pytest.raises(ValueError, match="evaluate.data must be .*got 'name=squad'"):
        changed(**{"evaluate.data": "name=squad"})
