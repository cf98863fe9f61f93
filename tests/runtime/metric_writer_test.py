"""Tests of finemem_jax/runtime/metric_writer.py: whole files, resumed runs, lines in pipes."""

import json

import pytest

from finemem_jax.runtime import files
from finemem_jax.runtime import metric_writer as metric_writer_lib


def lines_of(workdir):
    return (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def test_metrics_come_back_as_written(tmp_path):
    with metric_writer_lib.MetricWriter(tmp_path / "new") as metric_writer:
        metric_writer.write(0, {"reward/total": 0.25})
        metric_writer.write(1, {"reward/total": 1e-9})
    assert files.read_metrics(tmp_path / "new") == [
        {"step": 0, "reward/total": 0.25},
        {"step": 1, "reward/total": 1e-9},
    ]
    assert list((tmp_path / "new" / "tensorboard").iterdir())


@pytest.mark.parametrize("step", [0, 2, 5])
def test_rewind_drops_what_will_be_written_again(tmp_path, step):
    with metric_writer_lib.MetricWriter(tmp_path) as metric_writer:
        for t in range(4):
            metric_writer.write(t, {"x": t / 10})
        kept = lines_of(tmp_path)[:step]
        metric_writer.rewind(step)
        assert lines_of(tmp_path) == kept
        metric_writer.write(step, {"x": 9.0})
    assert lines_of(tmp_path) == [*kept, json.dumps({"step": step, "x": 9.0})]


@pytest.mark.parametrize("half", ['{"step": 2, "x": 0.', "{", "{}", "\n"])
def test_rewind_mends_a_half_written_line(tmp_path, half):
    with metric_writer_lib.MetricWriter(tmp_path) as metric_writer:
        metric_writer.write(0, {"x": 0.0})
        metric_writer.write(1, {"x": 0.1})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(half)
        metric_writer.rewind(2)
        metric_writer.write(2, {"x": 0.2})
    assert [line["step"] for line in files.read_metrics(tmp_path)] == [0, 1, 2]
