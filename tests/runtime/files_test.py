"""Tests of finemem_jax/runtime/files.py: files are whole or not there, and records come back as written."""

import gzip
import hashlib
import json
import os
import time

import pytest

from finemem_jax.runtime import files
from finemem_jax.runtime import metric_writer as metric_writer_lib


def test_no_metrics_yet(tmp_path):
    assert files.read_metrics(tmp_path) == []
    with metric_writer_lib.MetricWriter(tmp_path) as metric_writer:
        metric_writer.rewind(3)
    assert files.read_metrics(tmp_path) == []


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
