"""Tests of experiments/: every file gives a config that can be run, under every argument it documents."""

import pathlib
import runpy

import pytest

import smoke_run
from finemem_jax import build
from finemem_jax import config as config_lib
from finemem_jax.rl.method import Method

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
ARGUMENTS = {
    "smoke": [None],
    "smollm2_135m": ["", "long", "smoke"],
    "smollm2_benchmarks": ["", "books", "smoke"],
    "mem_alpha": ["", "smoke"],
    "qwen3_4b": ["", "smoke"],
    "qwen3_1p7b": ["", "smoke"],
    "llama32_3b": ["", "smoke"],
    "qwen7b": ["", "smoke"],
    "ablations": ["", "smoke", "smoke,credit=mem_alpha", "credit=chunk,beta=0"],
}


def get_config(name, argument=None):
    function = runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"]
    return function() if argument is None else function(argument)


def test_every_experiment_is_tried():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize(("name", "argument"), [(n, a) for n, given in ARGUMENTS.items() for a in given])
def test_configs_are_valid(name, argument):
    config = config_lib.parse(get_config(name, argument))
    Method.from_config(config)
    assert set(config_lib.flatten(config)) == set(config_lib.flatten(config_lib.default()))
    assert config.experiment


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name not in ("smoke", "ablations")])
def test_unknown_arguments_are_refused(name):
    with pytest.raises(ValueError, match="got 'tiny'"):
        get_config(name, "tiny")


@pytest.mark.parametrize("name", ["mem_alpha", "smollm2_135m"])
def test_small_versions_fit_together(name):
    settings = config_lib.parse(get_config(name, "smoke"))
    parts, train_streams, test_streams = smoke_run.prepare(settings)
    build.check(settings, parts, train_streams, test_streams)


def test_experiments_say_what_they_need():
    for path in FOLDER.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in ("--config=experiments/", "Hardware:", "Time:", "Expected:"):
            assert word in text.partition('"""\n\n')[0], f"{path.name}: its docstring lacks {word}"
