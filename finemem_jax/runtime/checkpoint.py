"""Saving and restoring everything a run needs to go on: train state, data position, step, config, versions.

What is random follows from the seed and the step, so no keys are stored. Every array is saved with a checksum that was
computed where the array lived (`models.bits`): what has been written is read back and compared, and what is restored
is compared again.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from finemem_jax import config as config_lib
from finemem_jax.config.sections import Config
from finemem_jax.models.decoder import Params
from finemem_jax.runtime import checksums, files
from finemem_jax.runtime.distributed import Processes

# What is saved: any tree of arrays, such as `rl.learner.TrainState`.
State = TypeVar("State")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# Beside a checkpoint, what is written between two of them: trajectories, metrics, answers.
_SPARE_BYTES = 64 * 2**20


class CheckpointError(OSError):
    """A checkpoint could not be written, or is not what was to be written; older ones are as they were."""


class Checkpoints:
    """The checkpoints of one workdir. A context manager: leaving it waits for saves in flight."""

    def __init__(
        self,
        workdir: pathlib.Path,
        keep: int,
        keep_best: int = 0,
        best_metric: str = "",
        say: Callable[[str], None] = print,
        processes: Processes | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        """Args:
        keep: How many are kept, newest first.
        keep_best: How many more, with the highest `best_metric`; the lowest, if "-" stands before its name.
        say: Told what is wrong with a checkpoint.
        processes: Those that save together; None for this one alone.
        config: Settings that are saved with each; plain JSON.
        """
        self._config = dict(config or {})
        self._folder = (workdir / "checkpoints").absolute()
        self._best, self._say, self._processes = best_metric if keep_best else "", say, processes or Processes()
        policy: Any = policies.LatestN(keep)
        if keep_best:
            best = policies.BestN(
                get_metric_fn=lambda metrics: metrics["best"], n=keep_best, keep_checkpoints_without_metrics=False
            )
            policy = policies.AnyPreservationPolicy([policy, best])
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(preservation_policy=policy, create=True, cleanup_tmp_directories=True),
            item_names=("state", "position", "about"),
        )
        self._verifying: threading.Thread | None = None
        self._saved, self._problem = -1, ""

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self._finish()
        except CheckpointError as error:
            # What ended the run says more than what could not be saved then.
            if kind is None:
                raise
            self._say(str(error))
        finally:
            # What a save has met has been said; closing would raise it again.
            with contextlib.suppress(Exception):
                self._manager.close()

    @property
    def latest(self) -> int | None:
        """Training steps behind the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Saves in the background; atomic, so that a kill leaves the previous checkpoint as the newest.

        Args:
            step: Training steps done.
            position: Where the input pipeline stands; plain JSON.
            metrics: Of the step, among them the one by which the best are kept; None if it cannot be ranked yet.

        Raises:
            ValueError: the metric by which the best are kept is not among them.
            CheckpointError: this one or the one before could not be written.
        """
        if self.latest == step:
            return
        self._finish()
        sums = checksums.checksums(state)
        about = {"sums": sums, "versions": versions(), "config": self._config}
        items = {
            "state": ocp.args.StandardSave(state),
            "position": ocp.args.JsonSave(position),
            "about": ocp.args.JsonSave(about),
        }
        rank = {"best": self._rank(metrics)} if self._best and metrics is not None else None
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=rank)
        except Exception as error:
            raise self._error(step, error) from error
        self._saved, self._problem = step, ""
        self._verifying = threading.Thread(target=self._verify, args=(step, sums), daemon=True)
        self._verifying.start()

    def _rank(self, metrics):
        name = self._best.removeprefix("-")
        if name not in metrics:
            raise ValueError(
                f"train.best_metric={self._best!r} is none of this run's metrics; set it to one of these, or "
                f"train.keep_best=0: {', '.join(sorted(metrics))}."
            )
        value = metrics[name] if math.isfinite(metrics[name]) else -math.inf
        return -value if self._best.startswith("-") and math.isfinite(value) else value

    def _verify(self, step, sums):
        """Reads back what was saved, one array after the other; this process's share of them."""
        try:
            self._manager.wait_until_finished()
            names = sorted(sums)[self._processes.index :: self._processes.count]
            self._problem = _differing_sums(self._folder / str(step) / "state", sums, names)
        except Exception as error:
            self._problem = _first_line(error)

    def _finish(self):
        """Waits for the save in flight, and says whether it is good."""
        if self._verifying is None:
            return
        self._verifying.join()
        self._verifying = None
        problems = [problem for problem in self._processes.all_gather(self._problem) if problem]
        if problems:
            raise self._error(self._saved, problems[0])

    def _error(self, step, problem):
        if isinstance(problem, Exception):
            problem = _first_line(problem)
        stands = [other for other in self._manager.all_steps() if other != step]
        last = f"the newest that stands is of step {max(stands)}" if stands else "there is no older one"
        free = shutil.disk_usage(self._folder).free / 2**30
        return CheckpointError(
            f"the checkpoint after step {step} could not be written to {self._folder} ({problem}); {last}. "
            f"{free:.1f} GiB are free there; see to space and rights, then start the same command again."
        )

    def restore(self, state: State) -> tuple[State, int, dict[str, Any]]:
        """Returns the newest good checkpoint's state, its step, and the input pipeline's position.

        One that cannot be read, or whose arrays are not what was saved, is said, moved aside, and passed over.

        Args:
            state: A state of the same shapes and shardings, on whatever mesh; its values are not used.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: there is none that can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            raise FileNotFoundError("there is no checkpoint to restore.")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        broken: dict[int, str] = {}
        for step in steps:
            try:
                found, problem = self._restore(step, abstract), ""
            except Exception as error:
                found, problem = None, _first_line(error)
            problems = [problem for problem in self._processes.all_gather(problem) if problem]
            if found and not problems:
                self._put_aside(broken)
                self._compare_versions(step)
                return found[0], step, found[1]
            broken[step] = problems[0]
            self._say(f"CHECKPOINT {step} IS BROKEN: {problems[0]}")
        listing = "; ".join(f"{step}: {problem}" for step, problem in broken.items())
        raise ValueError(
            f"none of the checkpoints in {self._folder} can be restored ({listing}). Put back a copy that is whole, or "
            "begin anew in another --workdir."
        )

    def _compare_versions(self, step):
        then, now = _about(self._folder / str(step)).get("versions", {}), versions()
        changed = [f"{name} {then[name]} → {now[name]}" for name in then if then[name] != now.get(name)]
        if changed:
            self._say(f"checkpoint {step} was written with other versions, by which numbers may be rounded otherwise: "
                      f"{', '.join(changed)}")  # fmt: skip

    def _restore(self, step, abstract):
        items = {"state": ocp.args.StandardRestore(abstract), "position": ocp.args.JsonRestore()}
        sums = saved_sums(self._folder / str(step))
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        differing = [
            name for name, value in checksums.checksums(restored["state"]).items() if _differ(sums.get(name), value)
        ]
        if differing:
            raise ValueError(f"{', '.join(differing[:3])} is not what was saved")
        return restored["state"], restored["position"]

    def _put_aside(self, broken):
        if self._processes.is_first:
            for step in broken:
                aside = next(
                    path
                    for path in (self._folder / f"broken-{step}.{number}" for number in itertools.count())
                    if not path.exists()
                )
                os.rename(self._folder / str(step), aside)
                self._say(f"checkpoint {step} was moved to {aside}; going on from an older one")
        self._processes.barrier()
        self._manager.reload()


def versions() -> dict[str, str]:
    """What a checkpoint is written with."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return found | {"python": ".".join(map(str, sys.version_info[:3]))}


def _differ(saved, found):
    """Whether two checksums contradict each other; those of arrays of another dtype cannot."""
    return saved is not None and saved.split()[0] == found.split()[0] and saved != found


def saved_sums(folder: pathlib.Path) -> dict[str, str]:
    """{path: checksum} as a checkpoint's folder has them; empty where it was written without."""
    return _about(folder).get("sums", {})


def _about(folder):
    path = folder / "about" / "metadata"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _first_line(error):
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def _differing_sums(folder, sums, names):
    """What is wrong with the arrays of a folder, or ""."""
    # Not through a Checkpointer, which misses what stands in the folder above.
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree = handler.metadata(epath.Path(folder)).tree
        found = {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(tree)}
        missing = sorted(set(sums) - found)
        if missing:
            return f"{missing[0]} is missing"
        for name in names:

            def only(path, _, name=name):
                return 0 if jax.tree_util.keystr(path, simple=True, separator=".") == name else ocp.PLACEHOLDER

            item = jax.tree.map_with_path(only, tree)
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            restored = handler.restore(folder, args=ocp.args.PyTreeRestore(item=item, restore_args=args))
            (array,) = (leaf for leaf in jax.tree.leaves(restored) if leaf is not ocp.PLACEHOLDER)
            if checksums.sum_of(np.asarray(array)) != sums[name]:
                return f"{name} reads back as something else"
    return ""


def newest(workdir: pathlib.Path) -> int | None:
    """Training steps behind a workdir's newest checkpoint; None if there is none."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        return None
    with ocp.CheckpointManager(folder.absolute()) as manager:
        return manager.latest_step()


def load_params(workdir: pathlib.Path, like: Params) -> Params:
    """What the newest checkpoint of a run says its trained parameters are: all of them, or with LoRA the adapters.

    Args:
        like: Their shapes, types and shardings; what is stored in another type is cast.

    Raises:
        ValueError: there is no checkpoint, or it holds other parameters.
    """
    step = newest(workdir)
    if step is None:
        raise ValueError(f"model.weights={str(workdir)!r} holds no finished checkpoint; train it for longer.")
    item = {"params": like}
    arguments = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    folder = epath.Path(workdir.absolute()) / "checkpoints" / str(step)

    def broken(problem):
        return ValueError(
            f"checkpoint {step} in {folder.parent} is broken: {problem}. Move its folder away, and the one before it "
            "is taken."
        )

    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        try:
            stored = handler.metadata(folder / "state").tree["params"]
        except Exception as error:
            raise broken(_first_line(error)) from error
        shapes = [{jax.tree_util.keystr(k): x.shape for k, x in jax.tree.leaves_with_path(t)} for t in (stored, like)]
        differing = sorted(
            name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
        )
        if differing:
            has, wants = (found.get(differing[0], "absent") for found in shapes)
            raise ValueError(
                f"model.weights={str(workdir)!r} holds other parameters than its config.json says: "
                f"params{differing[0]} is {has} in the checkpoint, and {wants} in that model."
            )
        try:
            params = handler.restore(folder / "state", args=arguments)["params"]
            sums = saved_sums(pathlib.Path(folder))
        except Exception as error:
            raise broken(_first_line(error)) from error
    wrong = [name for name, value in checksums.checksums({"params": params}).items() if _differ(sums.get(name), value)]
    if wrong:
        raise broken(f"{wrong[0]} is not what was saved")
    return params


def check(workdir: pathlib.Path, config: Config) -> None:
    """Refuses a workdir that holds a run of another config, or that cannot be written.

    Raises:
        ValueError: the message shows the differences, and what to do.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--workdir={workdir} cannot be used ({error}); choose another folder.") from error
    if saved is None or config.train.continue_workdir:
        return
    changed = config_lib.conflicts(config, saved)
    if changed:
        listing = "\n  ".join(changed)
        raise ValueError(
            f"--workdir={workdir} holds a run with another config:\n  {listing}\n"
            "Choose another --workdir, or say --config.train.continue_workdir=True to go on with the new values."
        )


def check_space(workdir: pathlib.Path, state: Any, keep: int) -> str:
    """Refuses a disk on which not one checkpoint has room; returns a warning where not all that are kept do, or "".

    Args:
        state: What a checkpoint holds, or its shapes.
        keep: How many checkpoints are kept.

    Raises:
        ValueError: the message says how much is missing.
    """
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(workdir).free
    held = sum(path.stat().st_size for path in (workdir / "checkpoints").rglob("*") if path.is_file())
    gigabytes = 2**30
    if free < size + _SPARE_BYTES:
        raise ValueError(
            f"a checkpoint takes {size / gigabytes:.1f} GiB, and in --workdir={workdir} {free / gigabytes:.1f} GiB are "
            "free; free some space, or choose a --workdir on another disk."
        )
    # While one more is written, the oldest still stands.
    needed = (keep + 1) * size + _SPARE_BYTES - held
    if free < needed:
        return (
            f"the checkpoints that are kept may not fit: {needed / gigabytes:.1f} GiB more may be needed, and "
            f"{free / gigabytes:.1f} GiB are free (train.keep_checkpoints, train.keep_best)"
        )
    return ""


def claim(workdir: pathlib.Path, config: Config) -> None:
    """Writes the config into the workdir, which is this run's from now on."""
    files.replace_text(workdir / "config.json", json.dumps(config_lib.flatten(config), indent=2) + "\n")
