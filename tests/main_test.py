"""Tests of the command line: bad input gets a sentence that names the field or file and the remedy."""

import gzip
import json
import re

import pytest

import smoke_run
from programs import main as command


def squad_file(folder, *, broken=False):
    lines = []
    for i, place in enumerate(("Bern", "Oslo", "Lima")):
        question = {"id": str(i), "question": "Where does Ada live?", "answers": [place]}
        paragraph = {"context": f"Ada lives in {place}.", "qas": [question]}
        lines.append(json.dumps({"title": f"T{i}", "paragraphs": [paragraph]}))
    (folder / "some.jsonl").write_text("\n".join([*lines, '{"title": "T9", "paragra'] if broken else lines))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.rollout.group_size=1"], "rollout.group_size must be at least 2"),
        (["--config.data.name=nonsense"], "data.name must be a builder in"),
        (["--config.data.name=squad"], "data.source_dir"),
        (["--config.data.name=squad", "--config.data.source_dir=/nowhere/at/all"], "/nowhere/at/all"),
        (["--config.model.weights=/nowhere/model.gguf"], "there is no such file"),
        (["--config.rollout.max_new_tokens=100000"], "lower one of them"),
        (["--config.rollout.streams_per_step=17"], "raise data.num_train"),
        (["--config.manager.chunk_tokens=20", "--config.manager.long_chunk=refuse"], "manager.long_chunk='split'"),
        (["--config.mesh.tensor=3"], "does not fit"),
        (["--config.train.curriculum=0:1,9:3"], "raise data.chunks_per_stream"),
        (["--sweep=seed=0,1"], "--sweep needs --mode=sweep"),
        (["--mode=sweep"], "has no function sweep()"),
        (["--mode=sweep", "--sweep=sead=0,1"], "no setting 'sead'"),
    ],
)
def test_bad_settings(tmp_path, arguments, message):
    result = command(f"--workdir={tmp_path / 'run'}", *arguments)
    assert result.returncode == 1, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    # Refused before it became a run.
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("rollout.grupp_size=4", "there is no setting 'rollout.grupp_size'; is it rollout.group_size"),
        ("reader.endpoint.urls=x", "there is no setting 'reader.endpoint.urls' any more; .* it is servers.main.urls"),
        ("prompts.manager=x", "there is no setting 'prompts.manager' any more; it is manager.system now"),
    ],
)
def test_a_setting_that_is_none(tmp_path, flag, message):
    result = command(f"--workdir={tmp_path}", f"--config.{flag}")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(message, result.stderr)


@pytest.mark.parametrize("line", ["config.prompts.manager = 'x'", "config.reader.endpoint.urls = 'x'"])
def test_an_experiment_with_settings_of_an_earlier_version(tmp_path, line):
    file = tmp_path / "old.py"
    body = ("config = c.default()", line, "return config")
    file.write_text(
        "from finemem_jax import config as c\ndef get_config():\n" + "".join(f"    {one}\n" for one in body)
    )
    result = command(f"--workdir={tmp_path / 'run'}", config=str(file))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search("there is no setting .* any more; .*it is (manager.system|servers.main)", result.stderr)


def test_broken_line_is_named(tmp_path):
    squad_file(tmp_path, broken=True)
    result = command(
        f"--workdir={tmp_path / 'run'}", "--config.data.name=squad", f"--config.data.source_dir={tmp_path}"
    )
    assert result.returncode == 1
    assert "some.jsonl:4" in result.stderr


def test_other_architecture_is_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = command(
        f"--workdir={tmp_path / 'run'}",
        f"--config.model.weights={tmp_path / 'other.gguf'}",
        "--config.model.tokenizer=bytes",
    )
    assert result.returncode == 1
    assert "'mamba'" in result.stderr


def test_runs_evaluates_and_reports(tmp_path):
    workdir = tmp_path / "run"
    result = command(f"--workdir={workdir}", "--config.train.num_steps=1")
    assert result.returncode == 0, result.stderr
    assert "held-out score" in result.stdout
    assert "± is one standard error" in result.stdout
    result = command(f"--workdir={workdir}", "--mode=evaluate")
    assert result.returncode == 0, result.stderr
    assert json.loads((workdir / "benchmark.json").read_text())["steps"] == {"checkpoint": 1}
    result = command(f"--workdir={workdir}", "--mode=report")
    assert result.returncode == 0, result.stderr
    assert (workdir / "report.html").stat().st_size > 1000


def test_real_text_from_a_folder(tmp_path):
    squad_file(tmp_path)
    arguments = ["--config.data.name=squad", f"--config.data.source_dir={tmp_path}", "--config.train.num_steps=1"]
    # Two training articles of one paragraph each.
    result = command(f"--workdir={tmp_path / 'run'}", *arguments, "--config.rollout.streams_per_step=1")
    assert result.returncode == 0, result.stderr + result.stdout


def test_a_curriculum_lengthens_the_streams_and_resumes_at_its_border(tmp_path):
    def run(name, num_steps):
        changes = {"train.num_steps": num_steps, "train.curriculum": "0:1,1:2", "train.evaluate_first": False}
        smoke_run.run(tmp_path / name, smoke_run.config(**changes))

    def trajectories(name, step):
        with gzip.open(tmp_path / name / "trajectories" / f"step_{step:06d}.jsonl.gz", "rt", encoding="utf-8") as file:
            return file.read().splitlines()

    run("whole", 2)
    run("halves", 1)
    run("halves", 2)
    lengths = [{len(json.loads(line)["steps"]) for line in trajectories("whole", step)} for step in (1, 2)]
    assert lengths == [{1}, {2}]
    assert trajectories("halves", 2) == trajectories("whole", 2)
