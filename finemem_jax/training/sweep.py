"""A sweep: an experiment with several settings, each trained by a process of its own, and one table over them all.

Starts the command line and reads what runs leave in their workdirs; knows nothing of models, and does not import JAX,
so that it holds neither memory nor devices while the members train.
"""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import importlib.util
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import rich.console
import rich.text
from absl import flags
from ml_collections import config_flags

from finemem_jax import config as config_lib
from finemem_jax.config.sections import Config
from finemem_jax.evaluation import evaluate
from finemem_jax.runtime import files
from finemem_jax.runtime.display import print_table

NOTE = (
    "± is one standard error over held-out streams. Against the first: the value after training less the first "
    "member's, paired stream by stream; – where the streams are not the same. Each member is one run: how much runs "
    "differ from seed to seed is not in these errors."
)


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
        name: Its row in the table, and its folder in the sweep's workdir.
        arguments: What on the command line makes its config: --config=…, then --config.a.b=….
        config: That config.
    """

    name: str
    arguments: tuple[str, ...]
    config: Config


CommandFn = Callable[[Member, pathlib.Path], Sequence[str]]


# --------------------------------------------------------------------------------------
# Who is in it
# --------------------------------------------------------------------------------------


def members(experiment: str, overrides: Mapping[str, Any], fields: str = "") -> list[Member]:
    """The members of a sweep, the one that others are compared with first.

    Without `fields`, they are the args that the experiment's `sweep()` returns, or `sweep(ARG)` for "FILE:ARG".

    Args:
        experiment: What --config takes: "FILE" or "FILE:ARG".
        overrides: {dotted field: value}, the same for all members.
        fields: "a.b=1,2;c.d=x,y": all combinations of these values. Quotes keep a value with , or ; together, and
            stand for an empty one.

    Raises:
        ValueError: no such file, nothing to sweep, fields or values that do not exist, or an invalid config.
    """
    file, *argument = experiment.split(":", 1)
    module = _load(file)
    if fields:
        made = [(",".join(f"{n}={v}" for n, v in one.items()), experiment, one) for one in _product(fields)]
        twice = sorted(overrides.keys() & made[0][2].keys())
        if twice:
            raise ValueError(f"--sweep and --config.{twice[0]} both set {twice[0]}; leave one of them out.")
    else:
        given = "".join(f"{part}," for part in argument)
        made = [
            (arg.removeprefix(given), f"{file}:{arg}" if arg else file, {}) for arg in _declared(module, file, argument)
        ]
    found = []
    for name, member_experiment, values in made:
        name = re.sub(r"[^\w.=,+-]", "_", name).lstrip(".") or "default"
        values = {field: str(value) for field, value in (*overrides.items(), *values.items())}
        try:
            config = _config(module, member_experiment.split(":", 1)[1:], values)
        except (ValueError, TypeError, flags.Error) as error:
            raise ValueError(f"member {name} of the sweep: {error}") from error
        arguments = (f"--config={member_experiment}", *(f"--config.{field}={value}" for field, value in values.items()))
        found.append(Member(name, arguments, config))
    repeated = [name for name, count in collections.Counter(member.name for member in found).items() if count > 1]
    if repeated:
        raise ValueError(f"two members of the sweep are called {repeated[0]!r}; leave one of them out.")
    return found


def _load(file: str) -> types.ModuleType:
    if not pathlib.Path(file).is_file():
        raise ValueError(f"--config={file}: there is no such file.")
    spec = importlib.util.spec_from_file_location("experiment", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config={file} must be a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _declared(module: types.ModuleType, file: str, argument: Sequence[str]) -> list[str]:
    if not hasattr(module, "sweep"):
        raise ValueError(
            f'{file} has no function sweep() that lists its members; add one, or say --sweep="field=value,value".'
        )
    try:
        declared = module.sweep(*argument)
    except TypeError as error:
        raise ValueError(f"sweep() of {file} cannot be called with {list(argument)}: {error}") from error
    if not declared:
        raise ValueError(f"sweep() of {file} returned no members.")
    return list(declared)


def _product(text: str) -> list[dict[str, str]]:
    axes = {}
    for part in _split(text, ";"):
        field, equals, values = part.partition("=")
        field = field.strip()
        if not (field and equals):
            raise ValueError(f'--sweep must look like "credit.beta=0,0.5;seed=0,1"; got the part {part!r}.')
        if field in axes:
            raise ValueError(f"--sweep has {field} twice; write all its values behind one.")
        axes[field] = [_unquoted(value, field) for value in _split(values, ",")]
        if len(set(axes[field])) < len(axes[field]):
            raise ValueError(f"--sweep has a value of {field} twice in {values!r}; leave one out.")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _split(text: str, separator: str) -> list[str]:
    # A separator counts if what follows it has its quotes in pairs.
    return re.split(separator + r"""(?=(?:[^'"]|'[^']*'|"[^"]*")*$)""", text)


def _unquoted(value: str, field: str) -> str:
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    if not value or value[0] in "'\"":
        raise ValueError(f"--sweep has a value of {field} that is empty or lacks a quote; write '' for an empty text.")
    return value


def _config(module: types.ModuleType, argument: Sequence[str], values: Mapping[str, str]) -> Config:
    """The config as the member's own command line will read it."""
    config = module.get_config(*argument)
    known = config_lib.flatten(config)
    for name in values:
        if name not in known:
            raise ValueError(config_lib.no_setting(name))
    line = ["sweep", *(f"--config.{field}={value}" for field, value in values.items())]
    parsed = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=parsed, sys_argv=line)
    parsed(line)
    # The flag has written into it.
    return config_lib.parse(config)


# --------------------------------------------------------------------------------------
# Running them
# --------------------------------------------------------------------------------------


def train_command(member: Member, folder: pathlib.Path) -> list[str]:
    """The command that trains a member."""
    program = [sys.executable, "-m", "finemem_jax.main"]
    return [*program, *member.arguments, f"--workdir={folder}", "--mode=train"]


def finished(member: Member, folder: pathlib.Path) -> bool:
    """Whether a member's folder holds its evaluation after its last training step.

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


def run(members: Sequence[Member], workdir: pathlib.Path, jobs: int = 1, command: CommandFn = train_command) -> int:
    """Trains each member that is not finished yet in a folder of `workdir`, and lays all of them side by side.

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
    done = {member.name: finished(member, workdir / member.name) for member in members}
    numbered = {member.name: f"member {i} of {len(members)} · {member.name}" for i, member in enumerate(members, 1)}
    console = rich.console.Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    for name in (name for name, is_done in done.items() if is_done):
        say(f"{numbered[name]} · finished before")
    waiting = collections.deque(member for member in members if not done[member.name])
    running: list[_Process] = []
    failures: dict[str, str] = {}
    with _Stop() as stop, console.status("") as status:
        while running or (waiting and not stop.asked):
            while waiting and len(running) < jobs and not stop.asked:
                member = waiting.popleft()
                try:
                    running.append(_Process(member, workdir / member.name, command))
                    say(f"{numbered[member.name]} · running · {running[-1].log_path}")
                except OSError as error:
                    failures[member.name] = f"could not be started: {error}"
                    say(f"{numbered[member.name]} · failed · {error}")
            stop.pass_on(running, say)
            status.update(rich.text.Text("\n".join(f"{numbered[p.member.name]} · {p.progress()}" for p in running)))
            time.sleep(0.2)
            for process in [process for process in running if process.exit_code is not None]:
                running.remove(process)
                process.close()
                name, code = process.member.name, process.exit_code
                try:
                    done[name] = code == 0 and finished(process.member, process.folder)
                    if not (done[name] or stop.asked):
                        failures[name] = process.failure()
                except ValueError as error:
                    failures[name] = str(error)
                state = "finished" if done[name] else "stopped" if stop.asked else f"failed with exit code {code}"
                say(f"{numbered[name]} · {state} · {process.seconds:.0f} s")
                write(compare(members, workdir, done, failures), workdir)

    comparison = compare(members, workdir, done, failures)
    write(comparison, workdir)
    if stop.asked:
        say(f"{sum(done.values())} of {len(members)} members are finished; the same command goes on with the others")
        return 130
    print_table("sweep", *table(comparison))
    print(NOTE)
    for name, reason in failures.items():
        print(f"\n{name} failed: {reason}")
    print(f"\ntables         {workdir}/sweep.md, {workdir}/sweep.json", flush=True)
    return 1 if failures else 0


class _Process:
    """A member in training."""

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
        except BlockingIOError as error:
            self._log.close()
            raise OSError(f"another process is training in {folder}; wait for it, or stop it") from error
        except OSError:
            self._log.close()
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
    """Ctrl-C, and being told to end: the first asks the members to save and stop, the third kills them."""

    def __init__(self):
        self.asked = 0
        self._passed_on = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._handlers[number] = signal.signal(number, self._take_note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _take_note(self, *_):
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
    members: Sequence[Member], workdir: pathlib.Path, done: Mapping[str, bool], failures: Mapping[str, str]
) -> dict[str, Any]:
    """What goes into `sweep.json`: every member's evaluations, and its difference from the first member.

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
    """The settings that make the held-out streams: only the same streams can be paired."""
    return {
        name: value
        for name, value in config_lib.flatten(config).items()
        if name == "seed" or (name.startswith("data.") and name not in ("data.num_train", "data.num_test"))
    }


def table(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a block for each metric, and in it a row for each member."""
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


def _cell(estimate, sign=False):
    return "–" if estimate is None else evaluate.cell(estimate["mean"], estimate["standard_error"], sign)


def write(comparison: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Writes `sweep.json` and `sweep.md`."""
    header, rows = table(comparison)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    text = "".join(f"| {' | '.join(cell.strip() for cell in line)} |\n" for line in lines)
    failed = [f"\n{m['name']} failed: {m['failure']}\n" for m in comparison["members"] if m["failure"]]
    workdir.mkdir(parents=True, exist_ok=True)
    files.replace_text(workdir / "sweep.json", json.dumps(comparison, indent=1) + "\n")
    files.replace_text(workdir / "sweep.md", f"{text}\n{NOTE}\n{''.join(failed)}")


def _read(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file; {} if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete its folder to train the member anew.") from error
