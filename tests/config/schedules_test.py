"""Tests of finemem_jax/config/schedules.py: settings that change with the training step."""

import pytest

from finemem_jax import config as config_lib
from finemem_jax.config import schedules
from finemem_jax.config.sections import Config


def curriculum(text):
    config = config_lib.changed(Config(), {"data.chunks_per_stream": 8, "train.curriculum": text})
    return schedules.curriculum(config.train, config.data)


def test_curriculum_by_hand():
    assert curriculum("") == [(0, 8)]
    assert curriculum("0:2, 20:4,60:8") == [(0, 2), (20, 4), (60, 8)]


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
        ("0:2.5", "step:chunks"),
        ("0:0", "got 0 in '0:0'; lower it"),
        ("0:2,5:11", "data.chunks_per_stream=8 chunks.*got 11 .*raise data.chunks_per_stream"),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(text, message):
    with pytest.raises(ValueError, match=rf"train.curriculum must .*{message}"):
        curriculum(text)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.5", {0: 0.5, 9: 0.5}),
        ("0:1,10:0", {0: 1.0, 5: 0.5, 10: 0.0, 11: 0.0}),
        ("0:0,4:1", {0: 0.0, 1: 0.25, 99: 1.0}),
        ("0:1,4:1,8:0.5", {0: 1.0, 4: 1.0, 6: 0.75, 8: 0.5, 99: 0.5}),
    ],
)
def test_shares_of_likelihoods_by_hand(text, values):
    points = schedules.chunk_share(text)
    assert {step: schedules.at(points, step) for step in values} == values


@pytest.mark.parametrize("text", ["", "1.5", "-0.5", "half", "0:2", "0:1,0:0", "3:1", "0:1;5:0", "nan"])
def test_shares_that_cannot_be_are_refused(text):
    wanted = r'likelihood.chunk_share must be a number in \[0, 1\], or "step:share" pairs'
    with pytest.raises(ValueError, match=f"{wanted}.*got '{text}'"):
        config_lib.changed(Config(), {"likelihood.chunk_share": text})
