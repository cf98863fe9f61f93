"""Tests of finemem_jax/training/sweep.py: members, how they are run, skipped and stopped, and the table by hand."""

import fcntl
import json
import math
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import programs
from finemem_jax import config as config_lib
from finemem_jax.evaluation import evaluate
from finemem_jax.rl import credit_rules
from finemem_jax.training import sweep, sweep_members

ROOT = pathlib.Path(__file__).parents[2]
SMOKE = str(ROOT / "experiments" / "smoke.py")
ABLATIONS = str(ROOT / "experiments" / "ablations.py")


# --------------------------------------------------------------------------------------
# Who is in it
# --------------------------------------------------------------------------------------


def names(members):
    return [member.name for member in members]


def test_all_combinations_of_fields():
    members = sweep_members.find(SMOKE, {"train.num_steps": 7}, "credit.beta=0,0.5; seed=1,2")
    assert names(members) == [f"credit.beta={beta},seed={seed}" for beta in ("0", "0.5") for seed in (1, 2)]
    assert [(m.config.credit.beta, m.config.seed) for m in members] == [(0.0, 1), (0.0, 2), (0.5, 1), (0.5, 2)]
    assert all(member.config.train.num_steps == 7 for member in members)
    assert members[1].arguments == (
        f"--config={SMOKE}", "--config.train.num_steps=7", "--config.credit.beta=0", "--config.seed=2",
    )  # fmt: skip


def test_quotes_keep_a_value_together():
    members = sweep_members.find(SMOKE, {}, "train.curriculum='','0:1,1:2'; experiment=\"a;b\"")
    assert [member.config.train.curriculum for member in members] == ["", "0:1,1:2"]
    assert [member.config.experiment for member in members] == ["a;b", "a;b"]
    # A folder's name.
    assert names(members) == ["train.curriculum=,experiment=a_b", "train.curriculum=0_1,1_2,experiment=a_b"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("credit.bta=0,1", "no setting 'credit.bta'"),
        ("credit=0", "no setting 'credit'"),
        ("credit.beta=high", "credit.beta=high"),
        ("credit.beta=0,2", r"member credit.beta=2 of the sweep: credit.beta must lie in \[0, 1\]"),
        ("credit.beta", "must look like"),
        ("credit.beta=0;", "must look like"),
        ("credit.beta=0,,1", "write '' for an empty text"),
        ("experiment='a", "lacks a quote"),
        ("credit.beta=0;credit.beta=1", "has credit.beta twice"),
        ("credit.beta=0,0", "a value of credit.beta twice"),
        ("seed=1,2", "--sweep and --config.seed both set seed"),
        ("experiment=a:b,a;b", "must look like"),
        ("experiment=a:b,a?b", "two members of the sweep are called 'experiment=a_b'"),
    ],
)
def test_fields_that_cannot_be_swept_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        sweep_members.find(SMOKE, {"seed": 3}, fields)


def experiment(folder, body):
    path = folder / "made_up.py"
    path.write_text(f"from experiments.smoke import get_config as base\n{body}")
    return str(path)


def test_an_experiment_lists_its_members(tmp_path):
    file = experiment(
        tmp_path,
        """
def get_config(arg=""):
    config = base()
    config.experiment = arg
    return config

def sweep(arg="none"):
    return ["", f"{arg},x=1", "../y"]
""",
    )
    members = sweep_members.find(file, {}, "")
    assert [(m.name, m.arguments, m.config.experiment) for m in members] == [
        ("default", (f"--config={file}",), ""),
        ("none,x=1", (f"--config={file}:none,x=1",), "none,x=1"),
        ("_y", (f"--config={file}:../y",), "../y"),
    ]
    # What stands after the colon is passed on, and need not be said again in each name.
    assert names(sweep_members.find(f"{file}:z", {}, "")) == ["default", "x=1", "_y"]


def test_experiments_that_cannot_be_swept_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no function sweep\(\).*--sweep="):
        sweep_members.find(SMOKE, {}, "")
    with pytest.raises(ValueError, match="no such file"):
        sweep_members.find(str(tmp_path / "none.py"), {}, "")
    file = experiment(tmp_path, "def get_config():\n    return base()\n\ndef sweep():\n    return []\n")
    with pytest.raises(ValueError, match="no members"):
        sweep_members.find(file, {}, "")
    with pytest.raises(ValueError, match="cannot be called with"):
        sweep_members.find(f"{file}:x", {}, "")


def test_the_ablations():
    module = runpy.run_path(ABLATIONS)
    members = sweep_members.find(f"{ABLATIONS}:smoke,steps=2", {"data.num_test": 3}, "")
    every = module["PAPER"] + module["RIVALS"]
    assert names(members) == [f"credit={rule}" for rule in every]
    assert [member.config.credit.rule for member in members] == list(every)
    assert {member.config.train.num_steps for member in members} == {2}
    assert {member.config.data.num_test for member in members} == {3}
    assert [m.config.credit.rule for m in members if m.config.memory.layout == "typed"] == ["type_weight", "mem_alpha"]
    # The default base is the real model; nothing but the named settings differs from it but for the clock.
    real = module["get_config"]("credit=chunk,beta=0.25,chunk_weight=1,seed=3,top_k=5,retrieval=okapi,steps=9")
    base = runpy.run_path(str(ROOT / "experiments" / "smollm2_135m.py"))["get_config"]()
    changed = [line.split(":")[0] for line in config_lib.differences(real, config_lib.flatten(base))]
    assert changed == [
        "credit.beta", "credit.chunk_weight", "credit.rule", "data.num_test", "experiment", "memory.retrieval",
        "memory.top_k", "seed", "train.num_steps", "train.stop_after_seconds",
    ]  # fmt: skip


def test_the_ablations_know_every_rule():
    module = runpy.run_path(ABLATIONS)
    assert sorted(module["PAPER"] + module["RIVALS"]) == sorted(credit_rules.RULES)
    typed = {name for name, rule in credit_rules.RULES.items() if rule.weighs_types}
    assert typed <= set(module["TYPED"])


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("colour=red", "keys base, credit, .*got 'colour=red'"),
        ("long", "keys base"),
        ("credit=best", "credit of .* is one of outcome, .*got 'best'"),
        ("base=tiny", "base of .* is one of smollm2_135m, smoke"),
        ("beta=high", "beta of .* takes a number.*'high'"),
        ("seed=1.5", "seed of .* takes a number"),
        ("beta=0,beta=1", "beta twice"),
        ("smoke,base=smoke", "base twice"),
    ],
)
def test_ablations_that_do_not_exist(arg, message):
    with pytest.raises(ValueError, match=message):
        runpy.run_path(ABLATIONS)["get_config"](arg)


def test_the_ablations_choose_the_rule():
    with pytest.raises(ValueError, match="chooses credit itself"):
        sweep_members.find(f"{ABLATIONS}:smoke,credit=full", {}, "")


# --------------------------------------------------------------------------------------
# Running them. Instead of training, a process copies a folder that looks like a finished run.
# --------------------------------------------------------------------------------------


def evaluation(step, **per_stream):
    values = {
        metric: dict(zip("abc", per_stream.get(metric, (0.0, 0.0, 0.0)), strict=True)) for metric in evaluate.METRICS
    }
    return {"step": step, "per_stream": values, "estimates": {}, "by_kind": {}}


def leave(folder, member, steps=3, before=None, after=None):
    """Leaves what a run of a member leaves after `steps` steps."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_lib.flatten(member.config)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(steps)))
    found = {"before": before or evaluation(0), "after": after or evaluation(steps)}
    (folder / "evaluation.json").write_text(json.dumps(found))


def script(*lines):
    return [sys.executable, "-c", "\n".join(lines)]


def copying(results):
    """A command that "trains" a member by copying what `results` holds under its name."""

    def command(member, folder):
        return script(
            "import shutil", f"shutil.copytree({str(results / member.name)!r}, {str(folder)!r}, dirs_exist_ok=True)"
        )

    return command


@pytest.fixture
def members():
    return sweep_members.find(SMOKE, {}, "credit.beta=0,0.5,1")


def must_not_run(member, folder):
    raise AssertionError(f"{member.name} is finished")


def test_failed_members_do_not_stop_the_rest_and_finished_ones_are_not_run_again(tmp_path, members, capsys):
    for member in members:
        leave(tmp_path / "results" / member.name, member)
    copy = copying(tmp_path / "results")

    def command(member, folder):
        if member is members[1]:
            return script("print('first'); print('it [broke]'); raise SystemExit(7)")
        return copy(member, folder)

    workdir = tmp_path / "sweep"
    assert sweep.run(members, workdir, command=command) == 1
    output = capsys.readouterr().out
    assert "member 2 of 3 · credit.beta=0.5 · failed with exit code 7" in output
    assert "member 3 of 3 · credit.beta=1 · finished" in output
    assert "  first\n  it [broke]" in output
    assert (workdir / "credit.beta=0.5" / "log.txt").read_text().startswith("$ ")
    saved = json.loads((workdir / "sweep.json").read_text())
    assert [one["finished"] for one in saved["members"]] == [True, False, True]
    assert "exit code 7" in saved["members"][1]["failure"]
    assert "exit code 7" in (workdir / "sweep.md").read_text()

    assert sweep.run(members, workdir, command=lambda m, f: copy(m, f) if m is members[1] else must_not_run(m, f)) == 0
    output = capsys.readouterr().out
    assert "member 1 of 3 · credit.beta=0 · finished before" in output
    assert "member 2 of 3 · credit.beta=0.5 · finished · " in output
    assert sweep.run(members, workdir, command=must_not_run) == 0
    assert json.loads((workdir / "sweep.json").read_text())["members"][1]["failure"] is None


def test_a_member_that_ends_too_early_has_failed(tmp_path, members, capsys):
    assert sweep.run(members[:1], tmp_path, command=lambda *_: script("pass")) == 1
    assert "ended without an evaluation after its last step" in capsys.readouterr().out


def test_a_program_that_is_not_there_is_a_failure(tmp_path, members, capsys):
    assert sweep.run(members[:1], tmp_path, command=lambda *_: ["/nowhere/python"]) == 1
    assert "could not be started" in capsys.readouterr().out


def test_several_at_once(tmp_path, members):
    """Each waits for the other's sign: one after the other they would wait for ever."""
    for member in members:
        leave(tmp_path / "results" / member.name, member)

    def command(member, folder):
        signs = [str(tmp_path / name) for name in ("0", "1")]
        own, other = signs if member is members[0] else signs[::-1]
        wait = ("import os, time", f"open({own!r}, 'w')", f"while not os.path.exists({other!r}): time.sleep(0.01)")
        return script(*wait, copying(tmp_path / "results")(member, folder)[-1])

    assert sweep.run(members[:2], tmp_path / "sweep", jobs=2, command=command) == 0


@pytest.mark.parametrize(
    ("changes", "is_finished"),
    [
        ({}, True),
        ({"train.checkpoint_every": 5}, True),
        ({"train.num_steps": 4}, False),
        ({"train.num_steps": 4, "train.stop_after_seconds": 9}, False),
    ],
)
def test_finished_means_evaluated_after_the_last_step(tmp_path, changes, is_finished):
    (member,) = sweep_members.find(SMOKE, {}, "seed=0")
    assert not sweep.finished(member, tmp_path)
    leave(tmp_path, member)
    (now,) = sweep_members.find(SMOKE, changes, "seed=0")
    assert sweep.finished(now, tmp_path) == is_finished


def test_training_that_went_on_after_its_evaluation_is_not_finished(tmp_path, members):
    leave(tmp_path, members[0], steps=3, after=evaluation(2))
    assert not sweep.finished(members[0], tmp_path)


def test_a_run_that_the_clock_ended_is_finished_until_it_is_asked_for_more(tmp_path):
    (member,) = sweep_members.find(SMOKE, {"train.stop_after_seconds": 60}, "seed=0")
    leave(tmp_path, member, steps=2)
    assert sweep.finished(member, tmp_path)
    (longer,) = sweep_members.find(SMOKE, {"train.stop_after_seconds": 120}, "seed=0")
    assert not sweep.finished(longer, tmp_path)


def test_other_runs_are_not_taken_for_members(tmp_path, members):
    leave(tmp_path / members[0].name, members[1])
    with pytest.raises(ValueError, match=r"another config(.|\n)*credit.beta: 0.5 → 0.0(.|\n)*delete that folder"):
        sweep.run(members, tmp_path, command=must_not_run)
    leave(tmp_path / members[0].name, members[0], steps=4)
    with pytest.raises(ValueError, match="4 steps, more than train.num_steps=3"):
        sweep.run(members, tmp_path, command=must_not_run)
    (tmp_path / members[0].name / "config.json").write_text("{half")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        sweep.run(members, tmp_path, command=must_not_run)


def test_going_on_with_another_config_is_no_comparison(tmp_path):
    members = sweep_members.find(SMOKE, {"train.continue_workdir": True}, "seed=0,1")
    with pytest.raises(ValueError, match="leave out train.continue_workdir"):
        sweep.run(members, tmp_path, command=must_not_run)


def test_a_member_that_another_process_trains_is_left_alone(tmp_path, members, capsys):
    folder = tmp_path / members[0].name
    folder.mkdir()
    with (folder / "log.txt").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert sweep.run(members[:1], tmp_path, command=lambda *_: script("pass")) == 1
    assert "another process is training in" in capsys.readouterr().out


def interrupt_when(ready):
    """Sends this process one Ctrl-C as soon as a file exists."""

    def wait():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


def test_an_interrupt_lets_the_running_member_save_and_a_second_start_goes_on(tmp_path, members, capsys):
    ready, saved = tmp_path / "ready", tmp_path / "saved"

    def command(member, folder):
        return script(
            "import signal, sys, time",
            "def save(*_):",
            f"    open({str(saved)!r}, 'a').write('once ')",
            "    time.sleep(0.5)",
            "    sys.exit(130)",
            "signal.signal(signal.SIGINT, save)",
            f"open({str(ready)!r}, 'w')",
            "time.sleep(60)",
        )

    before = signal.getsignal(signal.SIGINT)
    interrupt_when(ready)
    assert sweep.run(members, tmp_path / "sweep", command=command) == 130
    assert saved.read_text() == "once "
    assert signal.getsignal(signal.SIGINT) is before
    output = capsys.readouterr().out
    assert "member 1 of 3 · credit.beta=0 · stopped" in output
    assert "0 of 3 members are finished; the same command goes on" in output
    assert not (tmp_path / "sweep" / members[1].name).exists()
    for member in members:
        leave(tmp_path / "results" / member.name, member)
    assert sweep.run(members, tmp_path / "sweep", command=copying(tmp_path / "results")) == 0


# --------------------------------------------------------------------------------------
# Comparing them
# --------------------------------------------------------------------------------------


def test_the_table_by_hand(tmp_path, members):
    # Of the first: 0, 1/2, 1: mean 1/2, variance 1/4, standard error 1/√12.
    leave(tmp_path / members[0].name, members[0], after=evaluation(3, score=(0, 0.5, 1), memory_tokens=(10, 20, 30)))
    # Of the second: 1/2, 3/4, 1: mean 3/4, variance 1/16. Against the first +1/2, +1/4, 0: mean 1/4, variance 1/16.
    leave(
        tmp_path / members[1].name,
        members[1],
        before=evaluation(0, score=(0.25, 0.25, 0.25)),
        after=evaluation(3, score=(0.5, 0.75, 1), memory_tokens=(10, 10, 10)),
    )
    done = {members[0].name: True, members[1].name: True, members[2].name: False}
    found = sweep.compare(members, tmp_path, done, failures={})
    score = found["members"][1]["metrics"]["score"]
    assert score["before"] == {"mean": 0.25, "standard_error": 0.0, "n": 3}
    assert score["after"] == {"mean": 0.75, "standard_error": pytest.approx(1 / math.sqrt(48)), "n": 3}
    assert score["against_first"] == {"mean": 0.25, "standard_error": pytest.approx(1 / math.sqrt(48)), "n": 3}
    assert found["members"][0]["metrics"]["score"]["against_first"] is None

    header, rows = sweep.table(found)
    assert header == ["on held-out streams", "steps", "before", "after", "against the first", "n"]
    assert rows[:4] == [
        ["held-out score:", "", "", "", "", ""],
        ["  credit.beta=0", "3", "0.000 ± 0.000", "0.500 ± 0.289", "–", "3"],
        ["  credit.beta=0.5", "3", "0.250 ± 0.000", "0.750 ± 0.144", "+0.250 ± 0.144", "3"],
        ["  credit.beta=1", "–", "–", "–", "–", "–"],
    ]
    # Against the first 0, -10, -20: mean -10, variance 100.
    assert rows[-2] == ["  credit.beta=0.5", "3", "0.000 ± 0.000", "10.0 ± 0.0", "-10.0 ± 5.8", "3"]
    assert len(rows) == 4 * len(evaluate.METRICS)
    sweep.write(found, tmp_path)
    assert json.loads((tmp_path / "sweep.json").read_text()) == found
    assert (
        "| credit.beta=0.5 | 3 | 0.250 ± 0.000 | 0.750 ± 0.144 | +0.250 ± 0.144 | 3 |"
        in (tmp_path / "sweep.md").read_text()
    )


@pytest.mark.parametrize(("field", "paired"), [("seed", False), ("data.chunk_words", False), ("data.num_train", True)])
def test_only_the_same_streams_are_paired(tmp_path, field, paired):
    members = sweep_members.find(SMOKE, {}, f"{field}=41,42")
    for member in members:
        leave(tmp_path / member.name, member)
    found = sweep.compare(members, tmp_path, {member.name: True for member in members}, failures={})
    assert (found["members"][1]["metrics"]["score"]["against_first"] is not None) == paired


def test_without_the_first_there_are_no_differences(tmp_path, members):
    leave(tmp_path / members[1].name, members[1])
    done = {member.name: member is members[1] for member in members}
    found = sweep.compare(members, tmp_path, done, failures={members[0].name: "exit code 1"})
    assert found["members"][1]["metrics"]["score"]["against_first"] is None
    _, rows = sweep.table(found)
    assert [row[1] for row in rows[1:4]] == ["failed", "3", "–"]


def test_a_run_without_a_first_evaluation_has_no_before(tmp_path, members):
    leave(tmp_path / members[0].name, members[0])
    path = tmp_path / members[0].name / "evaluation.json"
    path.write_text(json.dumps({"after": evaluation(3)}))
    found = sweep.compare(members[:1], tmp_path, {members[0].name: True}, failures={})
    assert found["members"][0]["metrics"]["score"]["before"] is None


def test_the_parent_does_not_load_jax():
    """It would hold memory, and on an accelerator the device, for as long as its members train."""
    code = "import sys; from finemem_jax.training import sweep; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --------------------------------------------------------------------------------------
# End to end
# --------------------------------------------------------------------------------------


def test_sweep_from_the_command_line(tmp_path):
    command = [
        "--mode=sweep", f"--workdir={tmp_path}", "--sweep=manager.chunk_tokens=512,1000000",
        "--config.data.num_train=2", "--config.data.num_test=2",
    ]  # fmt: skip

    def start(*more):
        return programs.main(*command, *more, config="experiments/ablations.py:smoke,steps=1", timeout=600)

    result = start()
    assert result.returncode == 1, result.stdout + result.stderr
    assert "member 1 of 2 · manager.chunk_tokens=512 · finished" in result.stdout
    assert "manager.chunk_tokens=1000000 failed: exit code 1" in result.stdout
    assert "lower one of them" in result.stdout
    saved = json.loads((tmp_path / "sweep.json").read_text())
    assert [one["finished"] for one in saved["members"]] == [True, False]

    shutil.rmtree(tmp_path / "manager.chunk_tokens=1000000")
    command[command.index("--sweep=manager.chunk_tokens=512,1000000")] = "--sweep=manager.chunk_tokens=512"
    result = start()
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("finished before") == 1
    result = start("--config.credit.beta=0")
    assert result.returncode == 1
    assert "credit.beta: 0.5 → 0.0" in result.stderr
    assert "Traceback" not in result.stderr
