"""End to end: the smoke experiment trains, resumes exactly, survives Ctrl-C, and learns."""

import gzip
import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import smoke_run
from finemem_jax.evaluation import held_out
from finemem_jax.rl import learner
from finemem_jax.runtime import checkpoint, files

ROOT = pathlib.Path(__file__).parents[2]


def trajectories(workdir):
    """All records of a run, in order."""
    for path in sorted((workdir / "trajectories").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)


def final_state(workdir, settings):
    parts, *_ = smoke_run.prepare(settings)
    state = learner.init(parts.params, learner.make_optimizer(settings.optimizer))
    with checkpoint.Checkpoints(workdir, checkpoint.Retention(2)) as checkpoints:
        return checkpoints.restore(state)


def test_stopped_and_resumed_run_equals_an_undisturbed_one(tmp_path):
    # What an evaluation leaves in the samplers is not there when a run goes on after it.
    settings = smoke_run.config(**{"train.num_steps": 4, "train.evaluate_first": False, "train.evaluate_every": 2})
    smoke_run.run(tmp_path / "whole", settings)
    first_half = smoke_run.config(**{"train.num_steps": 2, "train.evaluate_first": False})
    smoke_run.run(tmp_path / "halves", first_half)
    smoke_run.run(tmp_path / "halves", settings)

    whole, step, position = final_state(tmp_path / "whole", settings)
    halves, other_step, other_position = final_state(tmp_path / "halves", settings)
    assert (step, position) == (other_step, other_position)
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, whole, halves)
    for name in ("step_000003.jsonl.gz", "step_000004.jsonl.gz"):
        pair = [(tmp_path / run / "trajectories" / name).read_bytes() for run in ("whole", "halves")]
        assert pair[0] == pair[1]
    assert [line["step"] for line in files.read_metrics(tmp_path / "halves")] == [0, 1, 2, 3]


def test_first_update_is_on_policy(tmp_path):
    """What the sampler says of its tokens is what the trainer says of them: the ratio is 1 before any update."""
    smoke_run.run(tmp_path, smoke_run.config(**{"train.num_steps": 2, "train.evaluate_first": False}))
    for line in files.read_metrics(tmp_path):
        if "policy/sampler_difference_largest" in line:
            assert line["policy/sampler_difference_largest"] < 1e-3
    assert any("policy/sampler_difference_largest" in line for line in files.read_metrics(tmp_path))


@pytest.mark.slow
def test_learning_raises_valid_operations(tmp_path):
    """Thirty steps on random weights: the share of valid operations must rise (with three seeds by .19, .24, .24)."""
    smoke_run.run(tmp_path, smoke_run.config(**{"train.num_steps": 30, "train.evaluate_first": False}))
    valid = [line["operations/valid_fraction"] for line in files.read_metrics(tmp_path)]
    assert np.mean(valid[-5:]) > np.mean(valid[:5]) + 0.12


def test_workdir_of_another_experiment_is_refused_unless_told(tmp_path):
    smoke_run.run(tmp_path, smoke_run.config(**{"train.num_steps": 1, "train.evaluate_first": False}))
    changed = smoke_run.config(**{"train.num_steps": 2, "credit.beta": 0.0, "train.evaluate_first": False})
    with pytest.raises(ValueError, match=r"credit\.beta: 0\.5 → 0\.0"):
        checkpoint.check(tmp_path, changed)
    changed = smoke_run.config(**{"train.num_steps": 2, "credit.beta": 0.0, "train.continue_workdir": True})
    smoke_run.run(tmp_path, changed)
    assert len(files.read_metrics(tmp_path)) == 2


def test_streams_without_questions_train_on_the_other_rewards(tmp_path):
    changes = {"data.questions_per_stream": 0, "data.questions_per_chunk": 0, "train.num_steps": 1}
    smoke_run.run(tmp_path, smoke_run.config(**changes))
    assert all(step["rewards"]["credit"] == 0 for record in trajectories(tmp_path) for step in record["steps"])
    assert held_out.read_evaluations(tmp_path)["after"]["estimates"]["score"]["n"] == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 85), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_a_checkpoint_and_the_same_command_continues(tmp_path, number, code):
    command = [sys.executable, "-m", "finemem_jax.main", "--config=experiments/smoke.py", f"--workdir={tmp_path}"]
    command += ["--config.train.num_steps=200", "--config.train.checkpoint_every=1000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        try:
            for _ in range(1200):
                if len(files.read_metrics(tmp_path)) >= 2:
                    break
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.1)
            process.send_signal(number)
            output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == code, output
    assert "the same command continues" in output
    done = len(files.read_metrics(tmp_path))
    settings = smoke_run.config(**{"train.num_steps": done + 1, "train.evaluate_first": False})
    smoke_run.run(tmp_path, settings)
    assert [line["step"] for line in files.read_metrics(tmp_path)] == list(range(done + 1))


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora.rank": 2, "objective.kl_weight": 0.1, "rollout.top_p": 0.9, "credit.rule": "step_gain"}],
    ids=["plain", "adapters and a reference"],
)
def test_all_is_compiled_before_the_first_step(tmp_path, changes):
    few = {"manager.chunk_tokens": 300, "memory.view_tokens": 60, "train.evaluate_first": False}
    smoke_run.run(tmp_path, smoke_run.config(**{"train.num_steps": 4, "train.precompile": True} | few | changes))
    # Between the first two steps Orbax compiles what it cuts arrays with that several devices hold.
    assert [line["compile/programs"] for line in files.read_metrics(tmp_path)][2:] == [0] * 2


def test_starting_weights_and_sampler_are_compared_with(tmp_path):
    """Everything that the objective can compare the policy with, in one run of two steps."""
    changes = {
        "credit.kl_weight": 0.01, "objective.kl_weight": 0.01, "objective.importance_cap": 2.0,
        "objective.entropy_weight": 0.001, "objective.dual_clip": 3.0, "objective.aggregation": "stream",
        "credit.per_operation": True, "reader.kind": "evidence", "train.evaluate_first": False, "train.num_steps": 2,
    }  # fmt: skip
    smoke_run.run(tmp_path, smoke_run.config(**changes))
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    # Before the first update policy and starting weights are one; after it they are not, and the policy pays for it.
    assert abs(first["reward/kl"]) < 1e-3 < abs(second["reward/kl"])
    assert abs(first["policy/kl_to_start"]) < 1e-5 < second["policy/kl_to_start"]
    for metrics in (first, second):
        assert 0 < metrics["policy/sampler_difference_largest"] < 1e-3
        assert metrics["policy/importance_weight"] == pytest.approx(1, abs=1e-3)
        assert metrics["policy/largest_log_ratio"] < 1e-5  # One update a step: π_θ is still π_old.


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_sampler_decodes_with_the_trainer_s_arrays(tmp_path, rank):
    """Which updates take over: neither the manager nor the reader may hold on to them."""
    changes = {"sampler.in_place": True, "lora.rank": rank, "train.num_steps": 2, "train.evaluate_first": False}
    smoke_run.run(tmp_path, smoke_run.config(**changes))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["policy/sampler_difference_largest"] < 1e-3
    assert "after" in held_out.read_evaluations(tmp_path)


def test_a_cut_distribution_is_not_taken_for_the_policy(tmp_path):
    """With top-p the sampler's probabilities are larger than the policy's; the first ratio is 1 all the same."""
    changes = {
        "rollout.top_p": 0.5, "objective.importance_cap": 2.0, "reader.kind": "evidence",
        "train.evaluate_first": False, "train.num_steps": 1,
    }  # fmt: skip
    smoke_run.run(tmp_path, smoke_run.config(**changes))
    (metrics,) = files.read_metrics(tmp_path)
    assert metrics["policy/largest_log_ratio"] < 1e-5
    assert metrics["policy/sampler_difference_mean"] > 0.1
    assert metrics["policy/importance_weight"] < 0.9
    steps = [step for record in trajectories(tmp_path) for step in record["steps"]]
    # Half of the probability, at least, is left to draw from.
    for step in steps:
        gains = np.subtract(step["log_probs"], step["raw_log_probs"])
        assert (gains > -1e-5).all() and (gains < np.log(2) + 1e-4).all()
        assert gains.max() > 0.1


def test_tokens_carry_their_operations_advantage(tmp_path):
    changes = {"credit.per_operation": True, "reader.kind": "evidence", "train.evaluate_first": False}
    smoke_run.run(tmp_path, smoke_run.config(**changes | {"train.num_steps": 1}))
    steps = [step for record in trajectories(tmp_path) for step in record["steps"] if step["operations"]]
    assert any(len({operation["advantage"] for operation in step["operations"]}) > 1 for step in steps)
    for step in steps:
        advantages = [operation["advantage"] for operation in step["operations"]]
        assert sum(advantages) / len(advantages) == pytest.approx(step["advantage"], abs=1e-9)
        # Every token that was written belongs to an operation that there is, in order.
        owners = [owner for owner in step["token_operations"] if owner >= 0]
        assert owners == sorted(owners) and set(owners) <= set(range(len(step["operations"])))
        assert len(step["token_operations"]) == len(step["completion_ids"])
