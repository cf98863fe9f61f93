"""Exports the trained manager (--mode=export) as a folder that transformers, or llama.cpp, and this package load.

Beside weights and tokenizer the folder holds a chat template that tells the manager what training told it, how it was
evaluated (generation_config.json), the run's settings (finemem.json) and a model card. Of a GGUF file, the first two
are parts.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from finemem_jax import build as build_lib
from finemem_jax import config as config_lib
from finemem_jax.config.sections import Config
from finemem_jax.memory import build
from finemem_jax.models import decoder, lora, sharding, tokenizer
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.models.tokenizer import Tokenizer
from finemem_jax.runtime import checkpoint, files
from finemem_jax.serving import load, model_card
from finemem_jax.types import Chunk, Memory, Message
from finemem_jax.weights import gguf_export, hf_config, hf_weights, peft, pretrained

ADAPTER, BASE = "adapter_config.json", "base"
# Where the text and the memory meet in a prompt; see `prompts.ManagerPrompt`.
SEAM = ("\n\n", "Memory:\n")


def check(config: Config, workdir: pathlib.Path) -> None:
    """Refuses settings that cannot work, before anything is loaded.

    Raises:
        ValueError: naming the setting.
    """
    if checkpoint.newest(workdir) is None:
        raise ValueError(f"--workdir={workdir} holds no checkpoint to export; train first, or give the run's own.")
    hf_weights.refuse_existing(folder_of(config, workdir))
    if config.export.form == "lora" and not config.lora.rank:
        raise ValueError(
            "export.form='lora' needs a run that trained adapters, and lora.rank is 0; set export.form='merged'."
        )
    if config.model.tokenizer != "weights":
        raise ValueError(
            f"model.tokenizer={config.model.tokenizer!r} is for tests and no other program knows it; export a run with "
            "model.tokenizer='weights'."
        )


def folder_of(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    """Returns where the export goes."""
    return pathlib.Path(config.export.folder).expanduser() if config.export.folder else workdir / "export"


def run(config: Config, workdir: pathlib.Path) -> list[str]:
    """Writes the newest checkpoint of a workdir into `export.folder`; returns lines to print.

    The folder appears when all of it is written.

    Raises:
        ValueError: the folder exists, or the checkpoint is not of this config.
    """
    folder, step = folder_of(config, workdir), checkpoint.newest(workdir) or 0
    dtype = config.export.dtype or config.model.param_dtype
    if config.export.form != "lora":
        loaded = build_lib.load(with_weights(config, workdir))
        model, params = loaded.pretrained.model, loaded.pretrained.params(_mesh(config))
        papers = _Papers(config, workdir, step, loaded.tokenizer)
        if config.export.form == "merged":
            hf_weights.save(folder, model, params, tokenizer=papers, dtype=dtype)
        else:
            with hf_weights.new_folder(folder) as unfinished:
                gguf_export.save(
                    unfinished / load.GGUF, model, params, tokenizer=_Opened(config, loaded.tokenizer), dtype=dtype
                )
                papers.describe(unfinished)
    else:
        loaded = build_lib.load(config)
        model = pretrained.adapted(config, loaded.pretrained.model)
        adapters = jax.tree.map(lambda x: x.astype(dtype), trained_adapters(config, workdir, model))
        base = _published(config)
        with hf_weights.new_folder(folder) as unfinished:
            if base is None:
                params = loaded.pretrained.params(_mesh(config))
                hf_weights.save(
                    unfinished / BASE, loaded.pretrained.model, params, tokenizer=loaded.tokenizer, dtype=dtype
                )
            peft.save(unfinished, model, adapters, base_model=base or BASE)
            _Papers(config, workdir, step, loaded.tokenizer).save(unfinished)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return [f"export         {folder}: {size / 1e6:,.1f} MB, after {step} training steps; README.md says how to use it"]


def with_weights(config: Config, folder: pathlib.Path) -> Config:
    """Returns the config with a folder's weights: a model's, or a workdir's newest checkpoint's, adapters merged."""
    return load.with_weights(config, str(load.weights_of(folder.absolute())))


def trained_adapters(config: Config, workdir: pathlib.Path, model: DecoderConfig) -> Params:
    """Reads the adapters of a workdir's newest checkpoint, as `lora.split` returns them."""
    where = lora.split(sharding.param_shardings(model, _mesh(config)))[1]
    shapes = lora.split(decoder.abstract_params(model))[1]
    dtype = jnp.dtype(config.model.param_dtype)
    like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place), shapes, where)
    return checkpoint.load_params(workdir, like)


def conversation(config: Config, tokens: Tokenizer, chunk: str) -> list[Message]:
    """Returns the manager's messages for a chunk while its memory is empty."""
    return build.environment(config, tokens).messages(Chunk(chunk), Memory())


def _opening(config: Config, tokens: Tokenizer) -> list[Message]:
    """Returns the manager's messages before its first user message."""
    return conversation(config, tokens, "")[:-1]


@dataclasses.dataclass(frozen=True)
class _Opened:
    """Saves a tokenizer with the manager's chat template, and else as it is."""

    config: Config
    tokens: Tokenizer

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self.tokens.end_ids

    def save(self, folder: pathlib.Path) -> None:
        self.tokens.save(folder, _opening(self.config, self.tokens))
        # Where parts of a message meet cannot be said in a GGUF file. A run that began with an export says it.
        tokenizer.uncut(folder, SEAM)


@dataclasses.dataclass(frozen=True)
class _Papers:
    """Saves everything in an export but the weights; saved as a tokenizer is (`hf_weights.Vocabulary`)."""

    config: Config
    workdir: pathlib.Path
    step: int
    tokens: Tokenizer

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self.tokens.end_ids

    def save(self, folder: pathlib.Path) -> None:
        self.tokens.save(folder, _opening(self.config, self.tokens), SEAM)
        path = folder / "generation_config.json"
        saved = files.read_json(path, "fetch it again")
        files.write_json(path, generation(saved, self.tokens.end_ids, self.config.rollout.max_new_tokens))
        self.describe(folder)

    def describe(self, folder: pathlib.Path) -> None:
        """Writes the run's settings and the model card."""
        config = self.config
        versions = checkpoint.versions() | {"finemem_jax": importlib.metadata.version("finemem_jax")}
        about = {
            "format": load.FORMAT,
            "step": self.step,
            "versions": versions,
            "config": config_lib.flatten(config),
        }
        files.write_json(folder / load.EXPORTED, about)
        example = conversation(config, self.tokens, model_card.EXAMPLE)[-1]
        text = model_card.write(
            config,
            self.step,
            message="".join(example.parts),
            with_base=(folder / BASE).is_dir(),
            results={
                name: files.read_json(self.workdir / f"{name}.json", "evaluate again")
                for name in ("evaluation", "benchmark")
            },
        )
        (folder / "README.md").write_text(text, encoding="utf-8")


def generation(fields: dict[str, Any], end_ids: tuple[int, ...], max_new_tokens: int) -> dict[str, Any]:
    """Returns generation_config.json of a manager that writes as it was evaluated: greedily.

    Args:
        fields: The base model's own, of which the names of tokens stay.
        max_new_tokens: Longest reply, in tokens.
    """
    kept = {name: fields[name] for name in ("bos_token_id", "pad_token_id") if fields.get(name) is not None}
    written = {"eos_token_id": list(end_ids), "do_sample": False, "max_new_tokens": max_new_tokens}
    return {"pad_token_id": end_ids[0]} | kept | written


def _published(config: Config) -> str | None:
    """Returns what PEFT can load the base from, a folder or a name on the Hub; None where the base must come along."""
    path = pathlib.Path(config.model.weights).expanduser()
    if (path / hf_config.FILE).is_file() and not (path / "checkpoints").is_dir():
        return str(path.resolve())
    is_name = not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", config.model.weights)
    return config.model.weights if is_name else None


def _mesh(config: Config) -> Mesh:
    return sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
