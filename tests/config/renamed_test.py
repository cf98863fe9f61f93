"""Tests of finemem_jax/config/renamed.py: earlier names are answered, and configs of earlier versions still hold."""

import json
import pathlib

import pytest

import smoke_run
from finemem_jax import config as config_lib
from finemem_jax.config import renamed
from finemem_jax.config.sections import Config

# What a smoke run saved before settings were renamed.
EARLIER = json.loads((pathlib.Path(__file__).parent / "earlier_smoke.json").read_text())
KNOWN = config_lib.flatten(Config())


def test_an_earlier_run_goes_on():
    config = smoke_run.config(**{"train.num_steps": 9})
    assert config_lib.differences(config, EARLIER) == ["train.num_steps: 3 → 9"]
    assert config_lib.conflicts(config, EARLIER) == []
    assert config_lib.from_saved(EARLIER) == smoke_run.config()


def test_every_earlier_name_is_answered():
    gone = EARLIER.keys() - KNOWN.keys()
    assert len(gone) > 60
    for name in gone:
        assert f"there is no setting '{name}' any more; " in config_lib.no_setting(name)
    # And no name of now.
    assert not [name for name in KNOWN if renamed.successor(name)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("prompts.manager", "it is manager.system now"),
        ("prompts", "it is manager.system now"),
        ("reader.endpoint.urls", "it is servers.main.urls .*with reader.kind=server and reader.server=main"),
        ("questions.verifier.endpoint.model", "servers.main.model .*questions.verifier.server=main"),
        ("credit.bloat_weight", 'say credit.rule_args="bloat_weight=…"'),
        ("likelihood.anneal_steps", "likelihood.chunk_share takes a schedule"),
        ("questions.prices.verifier_new", 'say questions.prices="verifier_new=…"'),
        ("evaluate.num_streams", 'say evaluate.data="num_test=…"'),
        ("evaluate.resamples", "it is always 10,000 now"),
    ],
)
def test_what_is_said_of_earlier_names(name, said):
    with pytest.raises(ValueError, match=f"there is no setting '{name}' any more; .*{said}"):
        config_lib.changed(Config(), {name: "x"})


def test_what_is_said_of_earlier_values():
    with pytest.raises(ValueError, match="reader.kind must be one of .*got 'endpoint', which is called 'server' now"):
        config_lib.changed(Config(), {"reader.kind": "endpoint"})


def translated(**changes):
    """What differs now of a config that an earlier version saved with these values."""
    found = renamed.translate(EARLIER | changes)
    plain = renamed.translate(EARLIER)
    assert found.keys() - KNOWN.keys() <= {name for name in found if name.startswith("servers.")}
    return {name: value for name, value in found.items() if value != plain.get(name)}


def endpoint(role, **fields):
    return {f"{role}.kind": "endpoint"} | {f"{role}.endpoint.{name}": value for name, value in fields.items()}


def test_servers_of_roles_become_entries():
    reader = endpoint("reader", urls="http://a/v1", model="m")
    moved = {"reader.kind": "server", "servers.main.urls": "http://a/v1", "servers.main.model": "m"}
    assert translated(**reader) == moved
    # Equal ones are one entry; another one is the second, and a third has its role's name.
    judge = endpoint("judge", urls="http://a/v1", model="m")
    assert translated(**reader | judge) == moved | {"judge.kind": "server"}
    judge = endpoint("judge", urls="http://b/v1", model="j")
    second = {"judge.kind": "server", "judge.server": "second"}
    second |= {"servers.second.urls": "http://b/v1", "servers.second.model": "j"}
    assert translated(**reader | judge) == moved | second
    verifier = endpoint("questions.verifier", urls="http://c/v1", model="v")
    found = translated(**reader | judge | verifier)
    assert found["questions.verifier.server"] == "verifier" and found["servers.verifier.model"] == "v"
    config = config_lib.from_saved(EARLIER | reader | judge | verifier)
    assert config.servers["verifier"].urls == "http://c/v1" and config.servers["verifier"].concurrency == 32
    # Those that nobody asked decided nothing.
    assert translated(**{"judge.endpoint.model": "j"}) == {}


def test_values_that_are_part_of_a_text_now():
    assert translated(**{"credit.bloat_weight": 0.5}) == {}
    assert translated(**{"credit.rule": "persession", "credit.bloat_weight": 0.5, "credit.gain_floor": -1.0}) == {
        "credit.rule": "persession", "credit.rule_args": "bloat_weight=0.5",
    }  # fmt: skip
    assert translated(**{"likelihood.chunk_share": 0.5}) == {"likelihood.chunk_share": "0.5"}
    schedule = {"likelihood.chunk_share": 1.0, "likelihood.anneal_steps": 200}
    assert translated(**schedule) == {"likelihood.chunk_share": "0:1,200:0"}
    prices = {"questions.prices.generator_prompt": 2.5, "questions.prices.verifier_new": 1.0}
    assert translated(**prices) == {"questions.prices": "generator_prompt=2.5,verifier_new=1"}
    benchmarks = {"evaluate.num_streams": 6, "evaluate.chunk_words": 160, "evaluate.chunk_questions": True}
    assert translated(**benchmarks) == {"evaluate.data": "num_test=6,chunk_words=160,questions_per_chunk=2"}
    assert translated(**{"prompts.summary": "Sum up."}) == {"evaluate.summary_system": "Sum up."}
    assert translated(**{"evaluate.resamples": 5}) == {}
