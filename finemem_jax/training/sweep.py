"""Trains an experiment with several settings (--mode=sweep), each in a process of its own, and compares them all.

It starts the command line and reads files of the members' workdirs. It does not import JAX, so that it holds neither
memory nor devices while the members train.
"""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import rich.console
import rich.text

from finemem_jax import config as config_lib
from finemem_jax.config.sections import Config
from finemem_jax.evaluation import evaluate, tables
from finemem_jax.runtime import files
from finemem_jax.runtime.display import print_table
from finemem_jax.training.sweep_members import Member

NOTE = (
    "± is one standard error over held-out streams. Against the first: the value after training less the first "
    "member's, paired stream by stream; – where the streams are not the same. Each member is one run: how much runs "
    "differ from seed to seed is not in these errors."
)


CommandFn = Callable[[Member, pathlib.Path], Sequence[str]]


# --------------------------------------------------------------------------------------
# Running them
# --------------------------------------------------------------------------------------


def train_command(member: Member, folder: pathlib.Path) -> list[str]:
    """Returns the command that trains a member."""
    program = [sys.executable, "-m", "finemem_jax.main"]
    return [*program, *member.arguments, f"--workdir={folder}", "--mode=train"]


def finished(member: Member, folder: pathlib.Path) -> bool:
    """Tells whether a member's folder holds its evaluation after its last training step.

    Raises:
        ValueError: the folder holds a run of another config, or of more steps than the member's.
    """
    saved = _read(folder / "config.json")
    if not saved:
        return False
    changed = config_lib.conflicts(member.config, saved)
    if changed:
        listing = "\n  ".join(changed)
        raise ValueError(
            f"{folder} holds a run with another config than this sweep's member:\n  {listing}\n"
            "Choose another --workdir, or delete that folder to train the member anew."
        )
    settings = member.config.train
    steps = _read(folder / "evaluation.json").get("after", {}).get("step", -1)
    if steps > settings.num_steps:
        raise ValueError(
            f"{folder} holds a run of {steps} steps, more than train.num_steps={settings.num_steps}: it cannot be "
            "compared with shorter ones. Raise train.num_steps, or choose another --workdir."
        )
    done = max((int(line["step"]) + 1 for line in files.read_metrics(folder)), default=0)
    # A run that the clock ends is finished where it stopped, until it is asked for more.
    limits = ("num_steps", "stop_after_seconds")
    ended_by_clock = settings.stop_after_seconds > 0 and all(
        saved[f"train.{n}"] == getattr(settings, n) for n in limits
    )
    return steps == done and (steps == settings.num_steps or ended_by_clock)


def run(members: Sequence[Member], workdir: pathlib.Path, jobs: int = 1, *, command: CommandFn = train_command) -> int:
    """Trains each member that is not finished yet in a folder of `workdir`, and compares all of them.

    A member's output goes to its `log.txt`. `sweep.json` and `sweep.md` are written anew after each. Ctrl-C stops
    what is running as it would stop a single run, with a checkpoint; a second start goes on from there.

    Args:
        jobs: How many train at once.

    Returns:
        The exit code: 0 when all are finished, 1 when some failed, 130 after Ctrl-C.

    Raises:
        ValueError: a member's folder holds a run of another config. Nothing was started then.
    """
    if any(member.config.train.continue_workdir for member in members):
        raise ValueError(
            "a sweep compares runs that had one config from their first step to their last; leave out "
            "train.continue_workdir."
        )
    sweep = _Sweep(members, workdir, command)
    with _Stop() as stop, sweep.console.status("") as status:
        while sweep.running or (sweep.waiting and not stop.asked):
            while sweep.waiting and len(sweep.running) < jobs and not stop.asked:
                sweep.start(sweep.waiting.popleft())
            stop.pass_on(sweep.running, sweep.say)
            status.update(sweep.progress())
            time.sleep(0.2)
            for process in [process for process in sweep.running if process.exit_code is not None]:
                sweep.end(process, was_stopped=stop.asked > 0)
    comparison = sweep.write()
    if stop.asked:
        done = sum(sweep.done.values())
        sweep.say(f"{done} of {len(members)} members are finished; the same command goes on with the others")
        return 130
    print_table("sweep", *table(comparison))
    print(NOTE)
    for name, reason in sweep.failures.items():
        print(f"\n{name} failed: {reason}")
    print(f"\ntables         {workdir}/sweep.md, {workdir}/sweep.json", flush=True)
    return 1 if sweep.failures else 0


class _Sweep:
    """Starts members, and keeps account of who is waiting, running, done and failed."""

    def __init__(self, members: Sequence[Member], workdir: pathlib.Path, command: CommandFn):
        self._members, self._workdir, self._command = members, workdir, command
        count = len(members)
        self._titles = {member.name: f"member {i} of {count} · {member.name}" for i, member in enumerate(members, 1)}
        self.console = rich.console.Console()
        self.done = {member.name: finished(member, workdir / member.name) for member in members}
        self.failures: dict[str, str] = {}
        self.running: list[_Process] = []
        self.waiting = collections.deque(member for member in members if not self.done[member.name])
        for name in (name for name, is_done in self.done.items() if is_done):
            self.say(f"{self._titles[name]} · finished before")

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def progress(self) -> rich.text.Text:
        return rich.text.Text("\n".join(f"{self._titles[p.member.name]} · {p.progress()}" for p in self.running))

    def start(self, member: Member) -> None:
        try:
            process = _Process(member, self._workdir / member.name, self._command)
        except OSError as error:
            self.failures[member.name] = f"could not be started: {error}"
            self.say(f"{self._titles[member.name]} · failed · {error}")
        else:
            self.running.append(process)
            self.say(f"{self._titles[member.name]} · running · {process.log_path}")

    def end(self, process: _Process, *, was_stopped: bool) -> None:
        """Takes account of a process that has ended, and writes the tables anew."""
        self.running.remove(process)
        process.close()
        name, code = process.member.name, process.exit_code
        try:
            self.done[name] = code == 0 and finished(process.member, process.folder)
            if not (self.done[name] or was_stopped):
                self.failures[name] = process.failure()
        except ValueError as error:
            self.failures[name] = str(error)
        state = "finished" if self.done[name] else "stopped" if was_stopped else f"failed with exit code {code}"
        self.say(f"{self._titles[name]} · {state} · {process.seconds:.0f} s")
        self.write()

    def write(self) -> dict[str, Any]:
        comparison = compare(self._members, self._workdir, self.done, failures=self.failures)
        write(comparison, self._workdir)
        return comparison


class _Process:
    """Trains a member in a process of its own."""

    def __init__(self, member: Member, folder: pathlib.Path, command: CommandFn):
        folder.mkdir(parents=True, exist_ok=True)
        self.member, self.folder, self.log_path = member, folder, folder / "log.txt"
        self._began = time.monotonic()
        line = list(command(member, folder))
        self._log: IO[bytes] = self.log_path.open("ab")
        try:
            # The process inherits the lock with its output, and holds it even if this one is killed.
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._log.write(f"$ {' '.join(line)}\n".encode())
            self._log.flush()
            # In a group of its own, so that Ctrl-C reaches it once: from here.
            self._process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, process_group=0
            )
        except OSError as error:
            self._log.close()
            if isinstance(error, BlockingIOError):
                raise OSError(f"another process is training in {folder}; wait for it, or stop it") from error
            raise

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def progress(self) -> str:
        return f"{self.seconds:.0f} s · {(self._last_lines(1) or [''])[0][:100]}"

    def failure(self) -> str:
        if self.exit_code == 0:
            return f"it ended without an evaluation after its last step; {self.log_path} may say why"
        listing = "\n  ".join(self._last_lines(8))
        return f"exit code {self.exit_code}; the last lines of {self.log_path}:\n  {listing}"

    def _last_lines(self, n: int) -> list[str]:
        with self.log_path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8_192))
            lines = file.read().decode("utf-8", "replace").splitlines()
        return [line for line in lines if line.strip()][-n:]

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def close(self) -> None:
        self._log.close()


class _Stop:
    """Passes Ctrl-C and SIGTERM on: the first asks the members to save and stop, the third kills them."""

    def __init__(self):
        self.asked = 0
        self._passed_on = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._handlers[number] = signal.signal(number, self._take_note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _take_note(self, *_: object) -> None:
        self.asked += 1

    def pass_on(self, running: Sequence[_Process], say: Callable[[str], None]) -> None:
        """Tells the members what was asked since the last call."""
        if self.asked == self._passed_on:
            return
        if self._passed_on == 0:
            say("stopping: what is running saves a checkpoint first; once more stops it at once")
        self._passed_on = self.asked
        for process in running:
            process.signal(signal.SIGINT if self.asked < 3 else signal.SIGKILL)


# --------------------------------------------------------------------------------------
# Comparing them
# --------------------------------------------------------------------------------------


def compare(
    members: Sequence[Member], workdir: pathlib.Path, done: Mapping[str, bool], *, failures: Mapping[str, str]
) -> dict[str, Any]:
    """Returns, for `sweep.json`, every member's evaluations and its difference from the first member.

    Args:
        done: By name, whether a member is finished.
        failures: By name, why a member failed.

    Returns:
        {"first": name, "members": […]}; a member has name, arguments, finished, failure, steps, and
        metrics: {metric: {"before", "after", "against_first"}}, each an `evaluate.Estimate` as a dict, or None where
        there is nothing to tell: the member is not finished, or its held-out streams are not those of the first.
    """
    first = members[0]
    evaluations = {m.name: _read(workdir / m.name / "evaluation.json") if done[m.name] else {} for m in members}
    reference = evaluations[first.name].get("after")
    rows = []
    for member in members:
        found = evaluations[member.name]
        comparable = member is not first and _held_out(member.config) == _held_out(first.config)
        metrics: dict[str, dict[str, Any]] = {}
        for metric in evaluate.METRICS:
            values = {when: found[when]["per_stream"][metric] for when in ("before", "after") if when in found}
            estimates: dict[str, Any] = {when: evaluate.estimate(list(v.values())) for when, v in values.items()}
            if comparable and reference and "after" in values:
                estimates["against_first"] = evaluate.difference(reference["per_stream"][metric], values["after"])
            shown = {name: dataclasses.asdict(value) for name, value in estimates.items()}
            metrics[metric] = dict.fromkeys(("before", "after", "against_first")) | shown
        rows.append(
            {
                "name": member.name,
                "arguments": list(member.arguments),
                "finished": done[member.name],
                "failure": failures.get(member.name),
                "steps": found["after"]["step"] if found else None,
                "metrics": metrics,
            }
        )
    return {"first": first.name, "members": rows}


def _held_out(config: Config) -> dict[str, Any]:
    """Returns the settings that make the held-out streams: only the same streams can be paired."""
    return {
        name: value
        for name, value in config_lib.flatten(config).items()
        if name == "seed" or (name.startswith("data.") and name not in ("data.num_train", "data.num_test"))
    }


def table(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Lays out a comparison: a block for each metric, and in it a row for each member."""
    header = ["on held-out streams", "steps", "before", "after", "against the first", "n"]
    rows = []
    for metric, title in evaluate.METRICS.items():
        rows.append([f"{title}:", *[""] * (len(header) - 1)])
        for member in comparison["members"]:
            before, after, against = (member["metrics"][metric][name] for name in ("before", "after", "against_first"))
            state = str(member["steps"]) if member["finished"] else "failed" if member["failure"] else "–"
            cells = [_cell(before), _cell(after), _cell(against, sign=True)]
            rows.append([f"  {member['name']}", state, *cells, str((against or after or {"n": "–"})["n"])])
    return header, rows


def _cell(estimate: Mapping[str, Any] | None, sign: bool = False) -> str:
    return "–" if estimate is None else evaluate.cell(estimate["mean"], estimate["standard_error"], sign)


def write(comparison: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Writes `sweep.json` and `sweep.md`."""
    failed = [f"\n{m['name']} failed: {m['failure']}\n" for m in comparison["members"] if m["failure"]]
    workdir.mkdir(parents=True, exist_ok=True)
    files.replace_text(workdir / "sweep.json", json.dumps(comparison, indent=1) + "\n")
    files.replace_text(workdir / "sweep.md", f"{tables.markdown(*table(comparison))}\n{NOTE}\n{''.join(failed)}")


def _read(path: pathlib.Path) -> dict[str, Any]:
    return files.read_json(path, "delete its folder to train the member anew")
