"""Saving and restoring everything a run needs to go on: train state, data position, step, config."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from finemem_jax import config as config_lib
from finemem_jax import writer
from finemem_jax.config import ConfigDict
from finemem_jax.learner import TrainState
from finemem_jax.models.decoder import Params


class Checkpoints:
    """The checkpoints of one workdir. A context manager: leaving it waits for saves in flight."""

    def __init__(self, workdir: pathlib.Path, keep: int):
        """Args:
        keep: How many are kept, newest first.
        """
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_names=("state", "position"),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Training steps behind the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Saves in the background; atomic, so that a kill leaves the previous checkpoint as the newest.

        Args:
            step: Training steps done.
            position: Where the input pipeline stands; plain JSON.
        """
        if self.latest == step:
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
        self._manager.save(step, args=items)

    def restore(self, state: TrainState) -> tuple[TrainState, int, dict[str, Any]]:
        """Returns the newest checkpoint's state, its step, and the input pipeline's position.

        Args:
            state: A state of the same shapes and shardings; its values are not used.
        """
        step = self.latest
        if step is None:
            raise FileNotFoundError("there is no checkpoint to restore.")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored["state"], step, restored["position"]


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
    folder = workdir.absolute() / "checkpoints" / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata.tree["params"]
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
        return checkpointer.restore(folder, args=arguments)["params"]


def check(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Refuses a workdir that holds a run of another config, or that cannot be written.

    Raises:
        ValueError: the message shows the differences, and what to do.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
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


def claim(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Writes the config into the workdir, which is this run's from now on."""
    writer.replace_text(workdir / "config.json", json.dumps(config_lib.flatten(config), indent=2) + "\n")
