"""Finds a trained manager, in a run's workdir or an exported folder, and the settings that it was trained with."""

from __future__ import annotations

import dataclasses
import pathlib
import runpy
from typing import Any

from finemem_jax import config as config_lib
from finemem_jax.config.sections import Config, Mesh
from finemem_jax.runtime import files

# Written by --mode=export beside a model's files: how its manager was trained to work.
EXPORTED, FORMAT = "finemem.json", 1
# What to do about a file that cannot be read.
REMEDY = "name a whole folder or file of ours"
# Weights and tokenizer in an export for llama.cpp.
GGUF = "model.gguf"


def find(path: str) -> tuple[Config, pathlib.Path | None]:
    """The settings that a path stands for, and the workdir whose checkpoint is wanted."""
    if not path:
        # Without examples, the embedded model writes nothing that is valid.
        return config_lib.changed(Config(), {"manager.num_examples": 2}), None
    file, _, argument = path.partition(":")
    if file.endswith(".py"):
        return _experiment(path, pathlib.Path(file).expanduser(), argument), None
    folder = pathlib.Path(path).expanduser()
    if (folder / EXPORTED).is_file():
        return _exported(folder), None
    if not (folder / "checkpoints").is_dir():
        raise ValueError(
            f"{path!r} is neither a run's workdir with checkpoints nor an exported model (a folder with {EXPORTED}); "
            "train one with --mode=train, or name another folder."
        )
    saved = folder / "config.json"
    return _saved_config(files.read_json(saved, REMEDY, required=True), saved), folder


def _experiment(path: str, file: pathlib.Path, argument: str) -> Config:
    if not file.is_file():
        raise ValueError(f"{path!r}: there is no such file; name an experiment, e.g. experiments/smollm2_135m.py.")
    defined = runpy.run_path(str(file))
    if "get_config" not in defined:
        raise ValueError(f"{path!r} defines no get_config(); name an experiment, e.g. experiments/smollm2_135m.py.")
    return config_lib.parse(defined["get_config"](*([argument] if argument else [])))


def _exported(folder: pathlib.Path) -> Config:
    path = folder / EXPORTED
    found = files.read_json(path, REMEDY, required=True)
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{path} has the format {found.get('format')!r}, and only {FORMAT} can be read; export the run "
            "again with this version."
        )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter alone (export.form='lora'), without the model that it belongs to; export the "
            "run with --config.export.form=merged, or load its workdir."
        )
    return with_weights(_saved_config(found.get("config"), path), str(weights_of(folder)))


def with_weights(config: Config, weights: str) -> Config:
    """The config with other weights, whose shape the files state, and without adapters."""
    model = dataclasses.replace(config.model, weights=weights, name="auto")
    return dataclasses.replace(config, model=model, lora=dataclasses.replace(config.lora, rank=0))


def weights_of(folder: pathlib.Path) -> pathlib.Path:
    """What `model.weights` names of a folder: the GGUF file of an export for llama.cpp; else the folder itself."""
    is_gguf = (folder / EXPORTED).is_file() and (folder / GGUF).is_file()
    return folder / GGUF if is_gguf else folder


def _saved_config(saved: Any, path: pathlib.Path) -> Config:
    """The default with what a file says; settings that exist no more are left out."""
    if not isinstance(saved, dict):
        raise ValueError(f"{path} holds no settings; train or export the run again.")
    try:
        config = config_lib.from_saved(saved)
    except ValueError as error:
        raise ValueError(f"{path} has a setting of another kind than it should be: {error}") from error
    # That of this machine, not of the one that trained.
    return dataclasses.replace(config, mesh=Mesh())


def for_use(config: Config, overrides: dict[str, Any]) -> Config:
    """A copy without what only training needs, checked."""
    # Nobody is credited here, and nothing judged. What users say belongs in their memory only, and is forgotten there.
    changes: dict[str, Any] = {"judge.kind": "reader", "answers.file": "", "likelihood.probes": False}
    changes["likelihood.chunk_share"] = "0"
    if config.credit.rule != "cited":  # That one is asked for citations in evaluation too.
        changes |= {"credit.rule": "outcome", "credit.rule_args": ""}
    return config_lib.changed(config, changes | overrides)
