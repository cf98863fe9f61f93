"""Runs that are killed, cut off from their disk, spread over processes and devices: they end as undisturbed ones do.

All of them start the real program, many times; they take minutes each.
"""

import contextlib
import gzip
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import simulated_devices
from finemem_jax.runtime import checkpoint, files

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
# Of machines and their moods, not of the run.
UNSTEADY = ("time/", "compile/", "memory/", "answers/", "sampler/", "reader/questions")


def command(workdir, **changes):
    settings = [f"--config.{name}={value}" for name, value in changes.items()]
    return [
        sys.executable,
        "-m",
        "finemem_jax.main",
        "--config=experiments/smoke.py",
        f"--workdir={workdir}",
        *settings,
    ]


class Program(subprocess.Popen):
    """The program, which writes to a file: a pipe that nobody reads would stop it one day."""

    def __init__(self, workdir, *more, num_devices=1, **changes):
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  `said` closes it.
        super().__init__(
            [*command(workdir, **changes), *more], cwd=ROOT, env=simulated_devices.environment(num_devices),
            stdout=self._said, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def drop(self):
        """Kills it, whatever it still has to say."""
        self.kill()
        self.wait()
        self._said.close()

    def said(self):
        with self._said:
            self._said.seek(0)
            return self._said.read()


def finish(process, code=0, timeout=400):
    try:
        process.wait(timeout)
    finally:
        process.kill()
        process.wait()
    output = process.said()
    assert process.returncode == code, output
    return output


def run(workdir, *more, code=0, num_devices=1, **changes):
    return finish(Program(workdir, *more, num_devices=num_devices, **changes), code)


def state(workdir):
    """{name: array} of all that the newest checkpoint holds."""
    folder = (workdir / "checkpoints" / str(checkpoint.newest(workdir)) / "state").absolute()
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(folder).tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    restored = handler.restore(folder, args=ocp.args.PyTreeRestore(item=tree, restore_args=args))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(restored)}


def metrics(workdir):
    return [
        {name: value for name, value in line.items() if not name.startswith(UNSTEADY)}
        for line in files.read_metrics(workdir)
    ]


def assert_same(workdir, undisturbed):
    """Bit by bit: weights, optimizer, metrics, every word that was written, evaluations."""
    found, wanted = state(workdir), state(undisturbed)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    assert metrics(workdir) == metrics(undisturbed)
    for path in sorted([*undisturbed.glob("trajectories/*"), *undisturbed.glob("evaluations/*")]):
        assert (workdir / path.relative_to(undisturbed)).read_bytes() == path.read_bytes(), path.name
    texts = [(folder / "evaluation.json").read_text() for folder in (workdir, undisturbed)]
    assert texts[0] == texts[1]


def distance(workdir, other):
    """The largest difference between any two parameters."""
    found, wanted = state(workdir), state(other)
    return max(np.abs(found[name] - wanted[name]).max() for name in wanted if name.startswith("['params']"))


def written(workdir):
    """What the manager wrote in all steps, rollout by rollout."""
    found = []
    for path in sorted((workdir / "trajectories").iterdir()):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found += [[step["completion_ids"] for step in json.loads(line)["steps"]] for line in file]
    return found


def unfinished(workdir):
    """Whether a checkpoint is being written."""
    return any((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*"))


def test_fifty_kills(tmp_path):
    """At random moments of a run that saves after every step; every other one in the middle of writing a checkpoint."""
    changes = {"train.num_steps": 150, "train.checkpoint_every": 1, "train.evaluate_every": 50}
    run(tmp_path / "undisturbed", **changes)
    workdir, draw = tmp_path / "killed", random.Random(0)
    kills = writing = 0
    while kills < 50:
        process = Program(workdir, **changes)
        try:
            if kills % 2:
                deadline = time.monotonic() + 60
                lucky = draw.randrange(1, 4)  # Which of the writes after the start.
                while process.poll() is None and time.monotonic() < deadline and lucky:
                    if unfinished(workdir):
                        lucky -= 1
                        while lucky and unfinished(workdir):
                            time.sleep(0.001)
                    time.sleep(0.001)
                time.sleep(draw.uniform(0, 0.05))
            else:
                time.sleep(draw.uniform(0, 25))
            if process.poll() is not None:
                break
            writing += unfinished(workdir)
            process.send_signal(signal.SIGKILL)
        finally:
            process.drop()
        kills += 1
    print(
        f"killed {kills} times, {writing} of them while a checkpoint was written, after {len(metrics(workdir))} steps"
    )
    assert kills == 50 and writing >= 5
    run(workdir, **changes)
    assert_same(workdir, tmp_path / "undisturbed")


@pytest.mark.parametrize("harm", ["flip", "truncate"])
def test_a_broken_newest_checkpoint(tmp_path, harm):
    """The run says so, goes back to the one before, and ends as if nothing had been."""
    run(tmp_path / "undisturbed", **{"train.num_steps": 6})
    workdir = tmp_path / "harmed"
    run(workdir, **{"train.num_steps": 4, "train.keep_checkpoints": 3})
    folder = workdir / "checkpoints" / "4" / "state"
    largest = max(folder.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    if harm == "truncate":
        os.truncate(largest, largest.stat().st_size // 3)
    else:
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    # The evaluation of four steps was the end of a shorter run.
    output = run(workdir, **{"train.num_steps": 6, "train.keep_checkpoints": 3})
    assert "CHECKPOINT 4 IS BROKEN" in output and "after step 3" in output
    assert (workdir / "checkpoints" / "broken-4.0").is_dir()
    assert_same(workdir, tmp_path / "undisturbed")


def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def together(workdir, count=2, **changes):
    """So many processes of one run, each with one device."""
    address = f"--coordinator=localhost:{port()}"
    return [
        Program(workdir, address, f"--num_processes={count}", f"--process_id={index}", **changes)
        for index in range(count)
    ]


def test_two_processes_are_as_good_as_one(tmp_path):
    changes = {"train.num_steps": 4, "train.checkpoint_every": 1}
    # The same mesh, of two devices, in one process and in two.
    run(tmp_path / "one", num_devices=2, **changes)
    first, second = (finish(process) for process in together(tmp_path / "two", **changes))
    assert "on 2 cpu device(s) of 2 processes" in first and "step" not in second.replace("[Gloo]", "")
    assert distance(tmp_path / "two", tmp_path / "one") < 1e-6
    assert len(metrics(tmp_path / "two")) == 4
    assert written(tmp_path / "two") == written(tmp_path / "one")

    # Killed, two go on as one, with one device; and one as two.
    for begin, end in ((2, 1), (1, 2)):
        workdir = tmp_path / f"{begin} and {end}"
        begun = together(workdir, begin, **changes | {"train.num_steps": 100})
        while checkpoint.newest(workdir) is None or checkpoint.newest(workdir) < 2:
            assert all(process.poll() is None for process in begun)
            time.sleep(0.05)
        for process in begun:
            process.drop()
        done = checkpoint.newest(workdir)
        steps = max(done + 1, 4)
        outputs = [finish(one) for one in together(workdir, end, **changes | {"train.num_steps": steps})]
        assert "continuing" in outputs[0]
        run(tmp_path / f"until {steps}", num_devices=2, **changes | {"train.num_steps": steps})
        # Another number of devices adds in another order; Adam makes much of small gradients.
        assert distance(workdir, tmp_path / f"until {steps}") < 1e-3
        assert [line["step"] for line in metrics(workdir)] == list(range(steps))


def test_sigterm_to_one_process_stops_both(tmp_path):
    changes = {"train.num_steps": 500, "train.checkpoint_every": 1000}
    both = together(tmp_path, **changes)
    while len(files.read_metrics(tmp_path)) < 2:
        assert all(process.poll() is None for process in both)
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    began = time.monotonic()
    outputs = [finish(process, 85, timeout=100) for process in both]
    assert time.monotonic() - began < 30, "schedulers wait so long"
    step = checkpoint.newest(tmp_path)
    assert step >= 2 and f"step {step} is saved" in outputs[0]
    assert len(files.read_metrics(tmp_path)) == step


def test_a_process_that_is_gone_is_named(tmp_path):
    both = together(tmp_path, **{"train.num_steps": 500, "train.barrier_seconds": 45.0})
    while len(files.read_metrics(tmp_path)) < 1:
        assert all(process.poll() is None for process in both)
        time.sleep(0.05)
    both[1].drop()
    assert "process 1 of 2 (" in finish(both[0], 75, timeout=200)


def test_eight_devices_one_and_back(tmp_path):
    changes = {"train.checkpoint_every": 1, "train.evaluate_first": False, "rollout.group_size": 8,
               "train.groups_per_microbatch": 8}  # fmt: skip
    for steps, devices in ((2, 8), (4, 1), (6, 8)):
        output = run(tmp_path / "moved", num_devices=devices, **changes | {"train.num_steps": steps})
        assert f"on {devices} cpu device(s)" in output
    assert "continuing" in output
    run(tmp_path / "stayed", **changes | {"train.num_steps": 6})
    assert distance(tmp_path / "moved", tmp_path / "stayed") < 1e-3
    assert [line["step"] for line in metrics(tmp_path / "moved")] == list(range(6))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 96 MB of its own, where the tests may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system takes rights that are not given here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(tmp_path, small_disk):
    changes = {"train.num_steps": 150, "train.checkpoint_every": 1}
    run(tmp_path / "undisturbed", **changes)
    workdir = small_disk / "run"
    process = Program(workdir, **changes)
    while len(files.read_metrics(workdir)) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    output = finish(process, code=74)
    # What Orbax and TensorStore say of writes that they gave up stands there as well.
    assert "finemem_jax: " in output and "to space and rights" in output.rpartition("finemem_jax: ")[2]
    output = run(workdir, code=1, **changes)
    assert "free some space" in output and "Traceback" not in output
    ballast.unlink()
    run(workdir, **changes)
    assert_same(workdir, tmp_path / "undisturbed")


def test_five_hundred_steps_leave_memory_and_files_as_they_are(tmp_path):
    changes = {"train.num_steps": 500, "train.checkpoint_every": 10, "train.evaluate_every": 100}
    changes |= {"train.precompile": True}
    process = Program(tmp_path, **changes)
    opened_files = {}
    while process.poll() is None:
        steps = len(files.read_metrics(tmp_path))
        try:
            opened_files[steps] = len(os.listdir(f"/proc/{process.pid}/fd"))
        except OSError:
            break
        time.sleep(0.2)
    finish(process, timeout=1)
    lines = files.read_metrics(tmp_path)
    memory = [line["memory/host_gigabytes"] for line in lines]
    early, late = np.mean(memory[90:110]), np.mean(memory[480:])
    opened = [max(count for step, count in opened_files.items() if low <= step < low + 100) for low in (100, 300)]
    compiled = [line["step"] for line in lines if line["compile/programs"]]
    print(f"memory {early:.3f} → {late:.3f} GiB, files {opened[0]} → {opened[1]}, compiled in steps {compiled}")
    assert late < 1.02 * early
    assert opened[1] <= opened[0] + 2
    assert not compiled or max(compiled) == 0


def test_resuming_with_other_settings_is_refused(tmp_path):
    run(tmp_path, **{"train.num_steps": 1})
    output = run(tmp_path, code=1, **{"train.num_steps": 2, "credit.beta": 0.25})
    assert "credit.beta: 0.5 → 0.25" in output and "continue_workdir" in output
    assert json.loads((tmp_path / "config.json").read_text())["credit.beta"] == 0.5
