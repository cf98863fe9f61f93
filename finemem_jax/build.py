"""From a config to the objects of a run. Below the programs only this module and `pretrained` read a Config."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from finemem_jax import input_pipeline
from finemem_jax.clients import language_models
from finemem_jax.clients.language_models import Local
from finemem_jax.config.sections import Config
from finemem_jax.input_pipeline import Mixture
from finemem_jax.memory.build import constraint, embedder, environment, prompt_lengths
from finemem_jax.memory.environment import Environment
from finemem_jax.memory.retrieval import EmbedFn
from finemem_jax.models import attention, logical_axes, lora, sharding, tokenizer
from finemem_jax.models.decoder import Compute, Params
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.models.tokenizer import Tokenizer
from finemem_jax.reading.answering import Answering
from finemem_jax.reading.reader import Query
from finemem_jax.rl.method import Method
from finemem_jax.rl.rollout import Players
from finemem_jax.runtime import checkpoint
from finemem_jax.runtime.distributed import Processes
from finemem_jax.sampling.sampler import Sampler
from finemem_jax.testing import operation_phrases
from finemem_jax.types import Chunk, Constraint, Memory
from finemem_jax.weights import pretrained
from finemem_jax.weights.pretrained import Pretrained


@dataclasses.dataclass(frozen=True)
class Components:
    """What training and evaluation have in common.

    Attributes:
        processes: Those that share the mesh.
        params: The starting weights, on the mesh. Training takes them over; manager and reader hold copies, each
            process on its own devices.
        manager: Samples from the policy.
        answering: The reader, and judges where there are some.
        embed: What retrieval embeds texts with; None if it needs no embeddings.
        constraint: What the manager must keep to in evaluation; None for nothing.
    """

    model: DecoderConfig
    processes: Processes
    mesh: jax.sharding.Mesh
    params: Params
    tokenizer: Tokenizer
    environment: Environment
    manager: Sampler
    answering: Answering
    embed: EmbedFn | None
    constraint: Constraint | None = None

    @property
    def players(self) -> Players:
        """Returns who takes part in rollouts."""
        return Players(
            self.environment,
            self.manager,
            self.answering.answer,
            embed=self.embed,
            content_judge=self.answering.content_judge,
            answer_judge=self.answering.answer_judge,
            likelihood_scorer=self.answering.likelihood_scorer,
        )

    def reset(self) -> None:
        """Empties the slots of all samplers, so that they start as they do in a run that goes on from here."""
        self.manager.reset()
        self.answering.reset()


def build(config: Config, workdir: pathlib.Path | None = None, processes: Processes | None = None) -> Components:
    """Loads tokenizer and weights, and builds environment, manager and reader.

    Args:
        workdir: Where answers are kept on file (`answers.file`).
        processes: Those that share the devices; None for this one alone.

    Raises:
        ValueError: a setting, a file or a mesh cannot work; nothing has been compiled yet.
    """
    needs = Method.from_config(config).rule.needs
    loaded = load(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    processes = processes or Processes()
    params = loaded.pretrained.params(mesh)
    own = sharding.own(params, mesh)
    model, adapted = loaded.pretrained.model, pretrained.adapted(config, loaded.pretrained.model)
    num_stored = -(-config.rollout.streams_per_step // processes.count)
    manager = Sampler(model, own, loaded.tokenizer.end_ids, settings=config.sampler, num_stored=num_stored)
    # Each writes its own file of answers: file systems that several machines share do not lock as SQLite needs it.
    answers_dir = workdir if workdir is None or processes.is_first else workdir / f"process_{processes.index}"
    asked = Answering(config, _local(config, loaded, own), needs=needs, workdir=answers_dir)
    return Components(
        model=adapted,
        processes=processes,
        mesh=mesh,
        params=pretrained.with_adapters(adapted, params, mesh, seed=config.seed),
        tokenizer=loaded.tokenizer,
        environment=environment(config, loaded.tokenizer),
        manager=manager,
        answering=asked,
        embed=embedder(config, model, own, tokens=loaded.tokenizer),
        constraint=constraint(config, loaded.tokenizer, loaded.pretrained.model.vocab_size),
    )


class ModelFiles(NamedTuple):
    """A model whose weights have been found but not read, and its tokenizer."""

    pretrained: Pretrained
    tokenizer: Tokenizer


def load(config: Config) -> ModelFiles:
    """Finds weights and tokenizer.

    Raises:
        ValueError: there are none, or they do not belong together.
    """
    found = pretrained.find(config)
    return ModelFiles(found, _tokenizer(config, found))


def frozen(config: Config, loaded: ModelFiles) -> Local:
    """The model in this process, for who needs no manager: its weights are read when they are first wanted."""

    @functools.cache
    def local() -> Local:
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        return _local(config, loaded, loaded.pretrained.params(mesh))

    return Local(
        lambda: local().sampler(), loaded.tokenizer, loaded.pretrained.model.max_length, lambda: local().name()
    )


def _local(config: Config, loaded, params):
    # The learner takes over what it trains: of that, a reader which stays as it is needs a copy.
    in_place = config.sampler.in_place and config.lora.rank > 0
    settings = dataclasses.replace(config.sampler, num_slots=config.reader.num_slots, in_place=in_place)
    return Local(
        functools.partial(Sampler, loaded.pretrained.model, params, loaded.tokenizer.end_ids, settings=settings),
        loaded.tokenizer,
        loaded.pretrained.model.max_length,
        functools.partial(language_models.local_name, config, params),
    )


def warm_up(config: Config, parts: Components, say: Callable[[str], None]) -> None:
    """Compiles what manager and reader generate with, so that later steps compile nothing.

    Args:
        say: Shows a line about it, in place of the last one.
    """
    prompt = parts.environment.observe(Chunk(""), Memory())
    texts = config.manager.chunk_tokens + config.memory.view_tokens
    shared_prefix, positions = _lengths(prompt, texts + config.rollout.max_new_tokens)
    # Readers get the same lengths, so that with equal slots they share the manager's programs. Evidence can be longer;
    # their caches then grow.
    shared_prefix = max(shared_prefix, parts.answering.prompt(Query("", ())).cuts[0])
    line = "compiling what the manager generates with"
    parts.manager.warm_up(shared_prefix, positions, lambda done, total: say(f"{line}: {done} of {total} programs"))
    parts.answering.warm_up(shared_prefix, positions, say)


def _lengths(prompt, tokens):
    """Lengths of a prompt's shared prefix, and of what follows it with so many tokens more."""
    return prompt.cuts[0], len(prompt.ids) - prompt.cuts[0] + tokens


def check_lengths(config: Config, parts: Components) -> None:
    """Refuses settings with which a prompt and its response could exceed the model.

    Raises:
        ValueError: the message names the fields.
    """
    lengths = prompt_lengths(config, parts.environment)
    longest = sum(lengths) + config.rollout.max_new_tokens
    if longest > parts.model.max_length:
        raise ValueError(
            f"manager.chunk_tokens ({config.manager.chunk_tokens}) + memory.view_tokens ({config.memory.view_tokens}) "
            f"+ rollout.max_new_tokens ({config.rollout.max_new_tokens}) and the instructions "
            f"({lengths.shared_prefix}) can reach {longest} tokens, more than {parts.model.name} takes "
            f"({parts.model.max_length}); lower one of them."
        )


def check_groups(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses micro-batches that this mesh cannot share out; how large an axis of -1 is, only the mesh knows.

    Raises:
        ValueError: the message names both fields.
    """
    data_shards = logical_axes.size(mesh, logical_axes.ROWS)
    if config.train.groups_per_microbatch % data_shards:
        raise ValueError(
            f"train.groups_per_microbatch={config.train.groups_per_microbatch} must be a multiple of mesh.data * "
            f"mesh.fsdp = {data_shards}: each device trains on whole groups. Set "
            f"train.groups_per_microbatch={data_shards}, or move devices to mesh.tensor."
        )


def compute(config: Config, mesh: jax.sharding.Mesh) -> tuple[Compute, str]:
    """How training computes hidden states, and a line to say where "auto" could not take the platform's fastest.

    Raises:
        ValueError: an attention that was asked for by name does not work here, or the mesh splits groups.
    """
    check_groups(config, mesh)
    device = mesh.devices.flat[0]
    implementation, remark = attention.choose(
        config.model.attention, device, jnp.dtype(config.model.compute_dtype), num_devices=mesh.size
    )
    return Compute(config.model.remat, config.model.compute_dtype, implementation, mesh), remark


def use_checkpoint(parts: Components, workdir: pathlib.Path) -> int:
    """Gives the manager the weights of a workdir's newest checkpoint; returns after how many training steps these are.

    Raises:
        ValueError: there is none, or it holds other parameters.
    """
    base, trained = lora.split(parts.params)
    step, trained = checkpoint.newest(workdir) or 0, checkpoint.load_params(workdir, trained)
    parts.manager.update(policy_params(parts, lora.combine(base, trained)), step)
    return step


def policy_params(parts: Components, params: Params) -> Params:
    """The weights that this process's manager decodes with: adapters merged, on its own devices."""
    return sharding.own(lora.merge(parts.model, params), parts.mesh)


def _tokenizer(config: Config, loaded):
    if config.model.tokenizer == "bytes":
        tokens: Tokenizer = tokenizer.ByteTokenizer()
    elif config.model.tokenizer == "bytes_and_operations":
        tokens = tokenizer.ByteTokenizer(operation_phrases(config))
    else:
        tokens = loaded.tokenizer()
    if tokens.vocab_size > loaded.model.vocab_size:
        raise ValueError(
            f"The tokenizer (model.tokenizer={config.model.tokenizer!r}, model.weights={config.model.weights!r}) has "
            f"{tokens.vocab_size} tokens, but the model ({loaded.model.name}) only {loaded.model.vocab_size} embeddings"
            "; choose the tokenizer that belongs to the model."
        )
    return tokens


def check(config: Config, parts: Components, train_streams: Mixture, test_streams: Mixture) -> None:
    """Refuses what would only fail later, in the middle of a run.

    Raises:
        ValueError: the longest prompt and response exceed the model; too few streams; a chunk that is to be refused.
    """
    check_lengths(config, parts)
    if config.rollout.streams_per_step % parts.processes.count:
        raise ValueError(
            f"rollout.streams_per_step={config.rollout.streams_per_step} must be a multiple of the number of "
            f"processes, {parts.processes.count}: each rolls out an equal share of a batch."
        )
    if not len(test_streams):
        raise ValueError("there are no held-out streams; raise data.num_test, or give data.source_dir more text.")
    refuse = config.manager.long_chunk == "refuse"
    if refuse:
        _read_all(test_streams)
    for stage in input_pipeline.stages(config, parts.environment, train_streams):
        source = stage.load()
        if len(source) < config.rollout.streams_per_step:
            when = f" from training step {stage.start} on (train.curriculum)" if config.train.curriculum else ""
            raise ValueError(
                f"rollout.streams_per_step is {config.rollout.streams_per_step}, but there are only {len(source)} "
                f"training streams{when}; lower it, or raise data.num_train."
            )
        if refuse:
            _read_all(source)


def _read_all(source):
    for index in range(len(source)):
        source[index]
