"""Saves and restores everything a run needs to go on: train state, data position, step, config, versions.

Randomness follows from the seed and the step, so no keys are stored. Orbax writes in the background, and renames a
checkpoint into place when it is whole; it does not notice bits that change on the way. So every array is saved with a
checksum that was computed where the array lives (`runtime.checksums`): what has been written is read back and
compared, and what is restored is compared again.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from finemem_jax import config as config_lib
from finemem_jax.config.sections import Config
from finemem_jax.runtime import checksums, files
from finemem_jax.runtime.distributed import Processes

# Any tree of arrays, such as `rl.learner.TrainState`.
State = TypeVar("State")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_FOLDER = "checkpoints"
_GIB = 2**30
# Room left beside checkpoints for what is written between two of them: trajectories, metrics, answers.
_SPARE_BYTES = 64 * 2**20


class CheckpointError(OSError):
    """A checkpoint could not be written, or reads back as something else; older ones are untouched."""


@dataclasses.dataclass(frozen=True)
class Retention:
    """Says which checkpoints are kept.

    Attributes:
        keep: How many of the newest.
        keep_best: How many more, ranked by `best_metric`.
        best_metric: A metric of which the highest values are the best; the lowest, with "-" in front of its name.
    """

    keep: int
    keep_best: int = 0
    best_metric: str = ""

    def policy(self) -> Any:
        """Returns Orbax's form of this; it ranks by the value that `rank` stores."""
        newest = policies.LatestN(self.keep)
        if not self.keep_best:
            return newest
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["best"], n=self.keep_best, keep_checkpoints_without_metrics=False
        )
        return policies.AnyPreservationPolicy([newest, best])

    def rank(self, metrics: Mapping[str, float] | None) -> dict[str, float] | None:
        """Returns what Orbax stores to rank a checkpoint by, higher is better; None if it is not to be ranked.

        Raises:
            ValueError: `best_metric` is not among the metrics.
        """
        if not (self.keep_best and self.best_metric) or metrics is None:
            return None
        name = self.best_metric.removeprefix("-")
        if name not in metrics:
            raise ValueError(
                f"train.best_metric={self.best_metric!r} is none of this run's metrics; set it to one of these, or "
                f"train.keep_best=0: {', '.join(sorted(metrics))}."
            )
        # NaN and infinities come last, whichever end of the scale is the better one.
        value = metrics[name] if name == self.best_metric else -metrics[name]
        return {"best": value if math.isfinite(value) else -math.inf}


class Checkpoints:
    """The checkpoints of one workdir. A context manager: leaving it waits for saves in flight."""

    def __init__(
        self,
        workdir: pathlib.Path,
        retention: Retention,
        *,
        say: Callable[[str], None] = print,
        processes: Processes | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        """Opens the folder of checkpoints, and makes it if there is none.

        Args:
            say: Told what is wrong with a checkpoint.
            processes: Those that save together; None for this one alone.
            config: Settings that are saved with each; plain JSON.
        """
        self._folder = (workdir / _FOLDER).absolute()
        self._retention, self._config = retention, dict(config or {})
        self._say, self._processes = say, processes or Processes()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=retention.policy(), create=True, cleanup_tmp_directories=True
            ),
            item_names=("state", "position", "about"),
        )
        # The save in flight: its step, the thread that reads it back, and what that has found wrong.
        self._saved, self._problem = -1, ""
        self._verifying: threading.Thread | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._finish_save()
        except CheckpointError as error:
            # The error that ended the run says more than the save that failed after it.
            if kind is None:
                raise
            self._say(str(error))
        finally:
            # Orbax raises a failed save's error once more when it is closed; it has been reported above.
            with contextlib.suppress(Exception):
                self._manager.close()

    @property
    def latest(self) -> int | None:
        """Training steps behind the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: Any, position: dict[str, Any], *, metrics: Mapping[str, float] | None = None
    ) -> None:
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
        self._finish_save()
        sums = checksums.checksums(state)
        about = {"sums": sums, "versions": versions(), "config": self._config}
        items = {
            "state": ocp.args.StandardSave(state),
            "position": ocp.args.JsonSave(position),
            "about": ocp.args.JsonSave(about),
        }
        rank = self._retention.rank(metrics)
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=rank)
        except Exception as error:  # Orbax and TensorStore raise many kinds.
            raise self._save_error(step, _first_line(error)) from error
        self._saved, self._problem = step, ""
        self._verifying = threading.Thread(target=self._verify, args=(step, sums), daemon=True)
        self._verifying.start()

    def _verify(self, step: int, sums: Mapping[str, str]) -> None:
        """Reads back what was saved and notes what is wrong; each process reads its share of the arrays."""
        try:
            self._manager.wait_until_finished()
            names = sorted(sums)[self._processes.index :: self._processes.count]
            self._problem = _read_back(epath.Path(self._folder) / str(step) / "state", sums, names)
        except Exception as error:
            self._problem = _first_line(error)

    def _finish_save(self) -> None:
        """Waits for the save in flight, and raises CheckpointError in all processes if one found it bad."""
        if self._verifying is None:
            return
        self._verifying.join()
        self._verifying = None
        problems = [problem for problem in self._processes.all_gather(self._problem) if problem]
        if problems:
            raise self._save_error(self._saved, problems[0])

    def _save_error(self, step: int, problem: str) -> CheckpointError:
        others = [other for other in self._manager.all_steps() if other != step]
        last = f"the newest that stands is of step {max(others)}" if others else "there is no older one"
        free = shutil.disk_usage(self._folder).free / _GIB
        return CheckpointError(
            f"the checkpoint after step {step} could not be written to {self._folder} ({problem}); {last}. "
            f"{free:.1f} GiB are free there; see to space and rights, then start the same command again."
        )

    def restore(self, state: State) -> tuple[State, int, dict[str, Any]]:
        """Returns the newest good checkpoint's state, its step, and the input pipeline's position.

        One that cannot be read, or whose arrays are not what was saved, is reported, moved aside, and passed over.

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
            # Broken for one process is broken for all: they must go on from the same step.
            problems = [problem for problem in self._processes.all_gather(problem) if problem]
            if found and not problems:
                self._put_aside(broken)
                self._report_other_versions(step)
                return found[0], step, found[1]
            broken[step] = problems[0]
            self._say(f"CHECKPOINT {step} IS BROKEN: {problems[0]}")
        listing = "; ".join(f"{step}: {problem}" for step, problem in broken.items())
        raise ValueError(
            f"none of the checkpoints in {self._folder} can be restored ({listing}). Put back a copy that is whole, or "
            "begin anew in another --workdir."
        )

    def _restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        items = {"state": ocp.args.StandardRestore(abstract), "position": ocp.args.JsonRestore()}
        sums = _saved_sums(self._folder / str(step))
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        differing = _differing(restored["state"], sums)
        if differing:
            raise ValueError(f"{', '.join(differing[:3])} is not what was saved")
        return restored["state"], restored["position"]

    def _put_aside(self, broken: Iterable[int]) -> None:
        """Renames the folders of broken checkpoints, so that the run can write these steps again."""
        if self._processes.is_first:
            for step in broken:
                names = (self._folder / f"broken-{step}.{number}" for number in itertools.count())
                aside = next(path for path in names if not path.exists())
                os.rename(self._folder / str(step), aside)
                self._say(f"checkpoint {step} was moved to {aside}; going on from an older one")
        self._processes.barrier()
        self._manager.reload()

    def _report_other_versions(self, step: int) -> None:
        then, now = _about(self._folder / str(step)).get("versions", {}), versions()
        changed = [f"{name} {then[name]} → {now[name]}" for name in then if then[name] != now.get(name)]
        if changed:
            self._say(f"checkpoint {step} was written with other versions, by which numbers may be rounded otherwise: "
                      f"{', '.join(changed)}")  # fmt: skip


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide how numbers are rounded and stored."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return found | {"python": ".".join(map(str, sys.version_info[:3]))}


def _about(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what a checkpoint's folder says about it; {} where it was written without."""
    return files.read_json(folder / "about" / "metadata", "delete this checkpoint")


def _saved_sums(folder: pathlib.Path) -> dict[str, str]:
    """Returns {path: checksum} of a checkpoint's arrays; {} where it was written without."""
    return _about(folder).get("sums", {})


def _differing(tree: Any, sums: Mapping[str, str]) -> list[str]:
    """Names the arrays that are not what was saved. Those restored in another dtype cannot be compared."""
    return [
        name
        for name, found in checksums.checksums(tree).items()
        if name in sums and sums[name].split()[0] == found.split()[0] and sums[name] != found
    ]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def _read_back(folder: epath.Path, sums: Mapping[str, str], names: Iterable[str]) -> str:
    """Reads saved arrays into the host's memory and says what is wrong with them; "" if nothing is.

    Args:
        sums: {path: checksum} of all arrays that were saved.
        names: Paths of the arrays to read.
    """
    # A Checkpointer would not find the metadata that Orbax writes into the folder above.
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree = handler.metadata(folder).tree
        paths, structure = list(checksums.leaves_by_path(tree)), jax.tree.structure(tree)
        missing = sorted(set(sums) - set(paths))
        if missing:
            return f"{missing[0]} is missing"
        for name in names:
            # One array at a time, to hold no second copy of the state; Orbax leaves placeholders unread.
            item = jax.tree.unflatten(structure, [0 if path == name else ocp.PLACEHOLDER for path in paths])
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            restored = handler.restore(folder, args=ocp.args.PyTreeRestore(item=item, restore_args=args))
            (array,) = (leaf for leaf in jax.tree.leaves(restored) if leaf is not ocp.PLACEHOLDER)
            if checksums.sum_of(np.asarray(array)) != sums[name]:
                return f"{name} reads back as something else"
    return ""


def newest(workdir: pathlib.Path) -> int | None:
    """Training steps behind a workdir's newest checkpoint; None if there is none."""
    folder = workdir / _FOLDER
    if not folder.is_dir():
        return None
    with ocp.CheckpointManager(folder.absolute()) as manager:
        return manager.latest_step()


def load_params(workdir: pathlib.Path, like: Any) -> Any:
    """Loads the trained parameters of a run's newest checkpoint: all of them, or with LoRA the adapters.

    Args:
        like: Their shapes, types and shardings; what is stored in another type is cast.

    Raises:
        ValueError: there is no checkpoint, or it is broken, or it holds other parameters.
    """
    step = newest(workdir)
    if step is None:
        raise ValueError(f"model.weights={str(workdir)!r} holds no finished checkpoint; train it for longer.")
    folder = workdir.absolute() / _FOLDER / str(step)
    state = epath.Path(folder) / "state"
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        with _naming_broken(folder):
            stored = handler.metadata(state).tree["params"]
        _check_shapes(workdir, stored, like)
        # The checkpoint's optimizer state is not read: `partial_restore` takes what `item` names.
        item = {"params": like}
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        with _naming_broken(folder):
            params = handler.restore(state, args=arguments)["params"]
            sums = _saved_sums(folder)
    differing = _differing({"params": params}, sums)
    if differing:
        raise _broken(folder, f"{differing[0]} is not what was saved")
    return params


def _check_shapes(workdir: pathlib.Path, stored: Any, like: Any) -> None:
    """Raises ValueError, naming the first difference, if stored parameters have other names or shapes than `like`."""
    found, wanted = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (stored, like)
    )
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"model.weights={str(workdir)!r} holds other parameters than its config.json says: "
                f"params{name} is {found.get(name, 'absent')} in the checkpoint, and {wanted.get(name, 'absent')} in "
                "that model."
            )


@contextlib.contextmanager
def _naming_broken(folder: pathlib.Path) -> Iterator[None]:
    """Turns whatever Orbax and TensorStore raise into an error that names the checkpoint and the remedy."""
    try:
        yield
    except Exception as error:
        raise _broken(folder, _first_line(error)) from error


def _broken(folder: pathlib.Path, problem: str) -> ValueError:
    return ValueError(
        f"checkpoint {folder.name} in {folder.parent} is broken: {problem}. Move its folder away, and the one before "
        "it is taken."
    )


def check(workdir: pathlib.Path, config: Config) -> None:
    """Refuses a workdir that holds a run of another config, or that cannot be written.

    Raises:
        ValueError: the message shows the differences, and what to do.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass  # Whether one can write there is found out by writing.
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
    """Refuses a disk without room for one checkpoint; returns a warning if it may not hold all, or "".

    Args:
        state: What a checkpoint holds, or its shapes.
        keep: How many checkpoints are kept.

    Raises:
        ValueError: the message says how much is missing.
    """
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(workdir).free
    if free < size + _SPARE_BYTES:
        raise ValueError(
            f"a checkpoint takes {size / _GIB:.1f} GiB, and in --workdir={workdir} {free / _GIB:.1f} GiB are "
            "free; free some space, or choose a --workdir on another disk."
        )
    # One more than are kept: the oldest is removed only when the next is whole.
    held = sum(path.stat().st_size for path in (workdir / _FOLDER).rglob("*") if path.is_file())
    needed = (keep + 1) * size + _SPARE_BYTES - held
    if free < needed:
        return (
            f"the checkpoints that are kept may not fit: {needed / _GIB:.1f} GiB more may be needed, and "
            f"{free / _GIB:.1f} GiB are free (train.keep_checkpoints, train.keep_best)"
        )
    return ""


def claim(workdir: pathlib.Path, config: Config) -> None:
    """Writes the config into the workdir, which belongs to this run from now on (see `check`)."""
    files.replace_text(workdir / "config.json", json.dumps(config_lib.flatten(config), indent=2) + "\n")
