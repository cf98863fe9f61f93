"""Tests of --mode=evaluate: resumable, shared by processes, refused with a sentence, and what it leaves on file."""

import contextlib
import json
import pathlib

import pytest

import programs
import smoke_run
from finemem_jax.evaluation import benchmark
from finemem_jax.runtime import checkpoint

QUICK = {"evaluate.methods": "none,verbatim,untrained", "reader.kind": "evidence", "data.num_test": 5,
         "evaluate.batch": 2}  # fmt: skip


def run(workdir, **changes):
    settings = smoke_run.config(**QUICK | changes)
    checkpoint.check(workdir, settings)
    benchmark.check(settings, workdir)
    benchmarks = benchmark.load(settings)
    parts = smoke_run.prepare(settings, workdir)[0]
    with contextlib.closing(parts.answering):
        checkpoint.claim(workdir, settings)
        benchmark.run(settings, workdir, parts, benchmarks=benchmarks)
    return json.loads((workdir / "benchmark.json").read_text()), benchmark.read(workdir)


def without_seconds(lines):
    return sorted(json.dumps(line | {"seconds": 0}, sort_keys=True) for line in lines)


def test_shards_and_resumption_give_what_one_run_gives(tmp_path):
    whole, lines = run(tmp_path / "whole")
    assert whole["missing_streams"] == 0 and len(lines) == 15
    assert {line["method"] for line in lines} == {"none", "verbatim", "untrained"}
    first, some = run(tmp_path / "parts", **{"evaluate.shard": "0/2"})
    assert first["missing_streams"] == 6 and len(some) == 9
    # A kill in the middle of a line: it is played again.
    path = tmp_path / "parts" / "benchmark" / "none.0of2.jsonl"
    path.write_text(path.read_text()[:-40])
    _, more = run(tmp_path / "parts", **{"evaluate.shard": "1/2"})
    assert len(more) == 14
    _, again = run(tmp_path / "parts", **{"evaluate.shard": "0/2"})
    assert len(again) == 15
    path.write_text(path.read_text()[:-40])
    then, all_of_them = run(tmp_path / "parts", **{"evaluate.shard": "0/1"})
    assert then["missing_streams"] == 0
    assert without_seconds(all_of_them) == without_seconds(lines)
    assert then["scores"] == whole["scores"] and then["comparisons"] == whole["comparisons"]
    text = (tmp_path / "parts" / "benchmark.md").read_text()
    assert "| verbatim |" in text and "untrained against none" in text


def test_what_is_on_file_is_not_played_again_unless_it_would_be_different(tmp_path):
    run(tmp_path, **{"evaluate.methods": "verbatim"})
    (path,) = (tmp_path / "benchmark").iterdir()
    lines = path.read_text().count("\n")
    run(tmp_path, **{"evaluate.methods": "verbatim,none", "evaluate.data": "num_test=3"})
    assert path.read_text().count("\n") == lines
    summary, _ = run(tmp_path, **{"evaluate.methods": "verbatim", "evaluate.data": "chunks_per_stream=1"})
    assert path.read_text().count("\n") == 2 * lines
    assert summary["scores"]["verbatim"]["average"]["n"] <= 5


def test_a_checkpoint_of_the_workdir(tmp_path):
    smoke_run.run(tmp_path, smoke_run.config(**QUICK, **{"train.num_steps": 1, "train.evaluate_first": False}))
    summary, lines = run(
        tmp_path, **{"evaluate.methods": "untrained,checkpoint", "evaluate.data": "questions_per_chunk=2"}
    )
    assert summary["steps"] == {"untrained": 0, "checkpoint": 1}
    assert {line["step"] for line in lines if line["method"] == "checkpoint"} == {1}
    assert all(len(line["chunk_scores"]) == line["chunks"] for line in lines)
    assert summary["comparisons"][0]["method"] == "checkpoint"


def test_the_command_with_every_method(tmp_path):
    """As a user runs it, with models that answer, judge and summarise; answers in full stand on file."""
    names = ",".join(name for name in benchmark.METHODS if name != "checkpoint")
    done = programs.main(
        f"--workdir={tmp_path}", "--mode=evaluate", f"--config.evaluate.methods={names}",
        "--config.evaluate.data=num_test=1", "--config.evaluate.summary_tokens=8",
        "--config.evaluate.context_tokens=64",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "recurrent" in done.stdout and "mem_alpha against" in done.stdout and "benchmark.md" in done.stdout
    record = json.loads((tmp_path / "benchmark" / "rag.0of1.jsonl").read_text())
    assert record["answers"][0]["evidence"] and record["reader_calls"] == len(record["answers"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.evaluate.methods=ragg"], "got ragg:"),
        (["--config.evaluate.methods="], "got none:"),
        ([], "holds no checkpoint to evaluate; train first"),
        (["--config.evaluate.methods=none", "--config.evaluate.shard=2/2"], "evaluate.shard must be I/N"),
        (["--config.evaluate.methods=none", "--config.evaluate.sources=nonsense"], "data.name must be a builder in"),
        (["--config.evaluate.methods=none", "--config.evaluate.split=dev"], "split must be 'train' or"),
        (["--config.evaluate.methods=none", "--config.evaluate.sources=squad"], "data.source_dir"),
        (["--config.evaluate.methods=none", "--config.evaluate.batch=0"], "evaluate.batch must be at least 1"),
    ],
)  # fmt: skip
def test_bad_settings(tmp_path, flags, message):
    result = programs.main(f"--workdir={tmp_path}", "--mode=evaluate", *flags)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
    assert not (pathlib.Path(tmp_path) / "config.json").exists()
