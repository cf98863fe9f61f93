"""Finds the model that `config.model` names: its shape, its parameters on a mesh, and its tokenizer.

Weights come from a GGUF file, a Hugging Face folder or the Hub (`weights.files`), from another run's workdir, or are
random.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import pathlib

import jax
from jax.sharding import Mesh

from finemem_jax import config as config_lib
from finemem_jax.config.sections import Config
from finemem_jax.models import decoder, lora, presets, sharding
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.models.tokenizer import Tokenizer
from finemem_jax.runtime import checkpoint
from finemem_jax.weights import files, tokenizer_files


class Pretrained(abc.ABC):
    """Weights that have been found, but not yet read."""

    def __init__(self, config: Config, model: DecoderConfig):
        """Reads nothing yet.

        Args:
            config: The settings that name the weights.
            model: The shape, without adapters.
        """
        self.config, self.model = config, model

    @abc.abstractmethod
    def params(self, mesh: Mesh) -> Params:
        """Reads the parameters, in `model.param_dtype`, onto the devices, each its part."""

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer that comes with the weights.

        Raises:
            ValueError: none does.
        """


class _Random(Pretrained):
    """Random weights."""

    def params(self, mesh: Mesh) -> Params:
        params = sharding.place(self.model, decoder.init(self.model, self.config.seed), mesh)
        return jax.tree.map(lambda leaf: leaf.astype(self.config.model.param_dtype), params)

    def tokenizer(self) -> Tokenizer:
        raise ValueError("model.tokenizer is 'weights', but model.weights is 'random'; set model.tokenizer='bytes'.")


class _FromFiles(Pretrained):
    """Weights of an open checkpoint's files."""

    def __init__(self, config: Config, model: DecoderConfig, found: files.Checkpoint):
        super().__init__(config, model)
        self._found = found

    def params(self, mesh: Mesh) -> Params:
        shardings = sharding.param_shardings(self.model, mesh)
        return self._found.load(self.model, shardings, self.config.model.param_dtype)

    def tokenizer(self) -> Tokenizer:
        if isinstance(self._found, files.GgufFile):
            return tokenizer_files.from_gguf(self._found.reader, self.config.model.thinking)
        return tokenizer_files.from_folder(self._found.path, self.config.model.thinking)


class _FromRun(Pretrained):
    """The newest checkpoint of another run, adapters merged into what they adapt."""

    def __init__(self, config: Config, workdir: pathlib.Path, begun: Pretrained):
        super().__init__(config, begun.model)
        self._workdir, self._begun = workdir, begun

    def params(self, mesh: Mesh) -> Params:
        adapted_model = adapted(self._begun.config, self.model)
        shardings = sharding.param_shardings(adapted_model, mesh)
        like = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, self.config.model.param_dtype, sharding=where),
            decoder.abstract_params(adapted_model),
            shardings,
        )
        if adapted_model.lora is None:
            return checkpoint.load_params(self._workdir, like)
        base = self._begun.params(mesh)
        trained = checkpoint.load_params(self._workdir, lora.split(like)[1])
        merged = lora.merge(adapted_model, lora.combine(base, trained))
        return jax.tree.map(lambda x: x.astype(self.config.model.param_dtype), merged)

    def tokenizer(self) -> Tokenizer:
        return self._begun.tokenizer()


def find(config: Config) -> Pretrained:
    """Finds the weights that a config names, and reads their shape.

    Raises:
        ValueError: nothing is there that can be used; the message says what to do.
    """
    name, source = config.model.name, config.model.weights
    if source == "random":
        if name == presets.AUTO:
            raise ValueError(
                "model.weights is 'random', so that no file states the model's shape; set model.name to one of "
                f"{', '.join(presets.PRESETS)}."
            )
        return _Random(config, presets.preset(name))
    workdir = pathlib.Path(source).expanduser()
    if (workdir / "checkpoints").is_dir():
        begun = find(_begun_with(config, workdir))
        presets.resolve(name, begun.model, f"{source} (model.weights)")
        return _FromRun(config, workdir, begun)
    found = files.open_checkpoint(source)
    return _FromFiles(config, presets.resolve(name, found.config, f"{source} (model.weights)"), found)


def _begun_with(config: Config, workdir: pathlib.Path) -> Config:
    """Reads the settings of the run that wrote a workdir, as far as they say what its weights are."""
    try:
        saved = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"model.weights={str(workdir)!r} holds checkpoints, but its config.json cannot be read ({error}); give the "
            "--workdir of a whole run."
        ) from error
    begun = config_lib.from_saved(
        {name: value for name, value in saved.items() if name == "seed" or name.startswith(("model.", "lora."))}
    )
    if pathlib.Path(begun.model.weights).expanduser().resolve() == workdir.resolve():
        raise ValueError(f"model.weights={str(workdir)!r} is a run that began with its own weights.")
    as_now = {"thinking": config.model.thinking, "param_dtype": config.model.param_dtype}
    return dataclasses.replace(begun, model=dataclasses.replace(begun.model, **as_now))


def shape(config: Config) -> DecoderConfig:
    """Returns the model's shape, adapters included; weights' files are looked at only where it is read from them.

    Raises:
        ValueError: an unknown name, or no files that state the shape.
    """
    model = find(config).model if config.model.name == presets.AUTO else presets.preset(config.model.name)
    return adapted(config, model)


def adapted(config: Config, model: DecoderConfig) -> DecoderConfig:
    """Returns a shape with the adapters that a config asks for, if any."""
    return dataclasses.replace(model, lora=lora.parse(config.lora.rank, config.lora.alpha, config.lora.targets))


def with_adapters(model: DecoderConfig, params: Params, mesh: Mesh, *, seed: int) -> Params:
    """Returns parameters with new adapters, which change nothing yet; without any if the model has none."""
    if model.lora is None:
        return params
    shardings = lora.split(sharding.param_shardings(model, mesh))[1]
    adapters = jax.jit(lora.init, static_argnums=(0, 1), out_shardings=shardings)(model, seed)
    return lora.combine(params, adapters)
