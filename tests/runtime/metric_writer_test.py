"""Tests of finemem_jax/runtime/metric_writer.py: whole files, resumed runs, lines in pipes."""

import gzip
import hashlib
import json
import os
import time

import pytest

from finemem_jax.runtime import files
from finemem_jax.runtime import metric_writer as metric_writer_lib
from finemem_jax.runtime.display import Display, print_table


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


def test_no_metrics_yet(tmp_path):
    assert files.read_metrics(tmp_path) == []
    with metric_writer_lib.MetricWriter(tmp_path) as metric_writer:
        metric_writer.rewind(3)
    assert files.read_metrics(tmp_path) == []


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


def test_replace_text_replaces(tmp_path):
    path = tmp_path / "a.json"
    files.replace_text(path, "old, and longer")
    files.replace_text(path, "new ÆØÅ")
    assert path.read_text(encoding="utf-8") == "new ÆØÅ"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_replace_text_that_fails_leaves_the_old(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.replace_text(path, "old")

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        files.replace_text(path, "new")
    assert path.read_text() == "old"


RECORDS = [{"text": "Ana «moved»\nto Oslo", "scores": [0.1, 1.0]}, {"text": "漢字", "n": None}]


def test_records_come_back_as_written(tmp_path):
    path = tmp_path / "deep" / "er" / "step_000001.jsonl.gz"
    files.write_records(path, RECORDS)
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        assert [json.loads(line) for line in file] == RECORDS
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_equal_records_give_equal_bytes(tmp_path, monkeypatch):
    def digest(name):
        files.write_records(tmp_path / name, iter(RECORDS))
        return hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()

    first = digest("a.jsonl.gz")
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert digest("b.jsonl.gz") == first


def test_lone_surrogates_do_not_stop_a_run(tmp_path):
    # JSON can spell them, so data sets can hold them; the tokenizer reads them as U+FFFD.
    files.write_records(tmp_path / "a.jsonl.gz", [{"question": "\ud800?"}])


def test_metrics_can_be_read_while_they_are_written(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "rew')
    assert files.read_metrics(tmp_path) == [{"step": 0}]


def test_records_that_fail_leave_the_old(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    files.write_records(path, RECORDS)
    old = path.read_bytes()

    def failing():
        yield RECORDS[0]
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        files.write_records(path, failing())
    assert path.read_bytes() == old


METRICS = {
    "reward/total": 0.12345,
    "reward/outcome": 0.5,
    "reward/chunk": 0.25,
    "operations/valid_fraction": 1.0,
    "memory/tokens": 41.6,
    "loss/entropy": 2.0,
    "time/new_tokens_per_second": 99.5,
    "time/step_seconds": 60.04,
}


def test_display_writes_lines_to_a_pipe(capsys):
    with Display(num_steps=3) as display:
        display.phase("step 1: rollouts and reader")
        display.step(0, METRICS)
        display.say("held-out: [bold]0.5[/bold]")
        display.step(1, METRICS | {"time/step_seconds": 90.0})
        display.step(2, {"time/step_seconds": 1.0})
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == (
        "step 1/3 · reward 0.123 · global 0.500 · chunk 0.250 · valid ops 1.000 · memory tok 42 · entropy 2.00 · "
        "tok/s 100 · s/step 60.0 · left 2:00"
    )
    assert shown[1] == "held-out: [bold]0.5[/bold]"
    # The upper of two medians: 90 s for the one step left.
    assert shown[2].endswith("left 1:30")
    # What was not measured is a dash, not a zero.
    assert shown[3] == (
        "step 3/3 · reward - · global - · chunk - · valid ops - · memory tok - · entropy - · tok/s - · s/step 1.0 · "
        "left 0:00"
    )
    assert len(shown) == 4


def test_print_table_to_a_pipe(capsys):
    print_table("a run", ["what", "before"], [["held-out score", "0.250 ± 0.125"], ["[red]x[/red]", "1"]])
    shown = capsys.readouterr().out
    assert "a run" in shown
    assert "held-out score" in shown
    assert "0.250 ± 0.125" in shown
    assert "\x1b" not in shown
