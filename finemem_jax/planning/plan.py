"""Plans a run on a machine that is not here: whether it fits, and how fast it could be (--mode=plan).

The programs of a run (gradients of a micro-batch, optimizer update, prefill, decoding) are compiled ahead of time for
the target, TPU slices by the TPU compiler itself, with shapes in place of arrays. Nothing is executed.
"""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from finemem_jax import build
from finemem_jax.config.sections import Config
from finemem_jax.models import logical_axes, sharding
from finemem_jax.models.decoder import Compute
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.planning import flops, programs
from finemem_jax.planning import topology as topology_lib
from finemem_jax.planning.flops import Lengths
from finemem_jax.planning.programs import Program
from finemem_jax.planning.topology import Target
from finemem_jax.rl.learner import LearnerOptions
from finemem_jax.rl.method import Method
from finemem_jax.runtime import compilation
from finemem_jax.weights import pretrained

# Instructions, worked examples and the chat's frame before the chunk. With chunks and a memory view of 2,048 tokens
# each this makes the 6,144 tokens to which Mem-alpha caps its training prompts.
INSTRUCTION_TOKENS = 2_048


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds what a config needs and could reach on a target.

    Attributes:
        groups: Groups of responses in a training step.
        useful_flops: What a training step's updates need and no more, all devices together.
    """

    config: Config
    target: Target
    mesh: Mesh
    attention: str
    lengths: Lengths
    groups: int
    useful_flops: float
    programs: tuple[Program, ...]

    @property
    def fits(self) -> bool:
        return self.margin >= 0 and not any(program.problem for program in self.programs)

    @property
    def margin(self) -> float:
        """Counts the bytes per device that stay free at the worst moment."""
        return self.target.hbm_bytes - max(program.total for program in self.programs)

    def update_seconds(self) -> float | None:
        """Computes a lower bound on the time of a training step's update; None where peaks are unknown."""
        return self._seconds("gradients", "optimizer")

    def sampling_seconds(self) -> float | None:
        """Computes a lower bound on the time of sampling a training step's responses, all of full length."""
        return self._seconds("prefill", "decode")

    def _seconds(self, *names: str) -> float | None:
        chip = self.target.chip
        return None if chip is None else sum(p.runs * p.roofline(chip) for p in self.programs if p.name in names)

    def mfu(self) -> float | None:
        """Computes an upper bound on the update's MFU: useful FLOPs / (peak × its shortest time)."""
        chip, seconds = self.target.chip, self.update_seconds()
        return self.useful_flops / (chip.flops * self.mesh.size * seconds) if chip and seconds else None


def make(config: Config, topology: str) -> Plan:
    """Compiles a config's programs for a target.

    Raises:
        ValueError: an unknown or unavailable topology, or a mesh that does not divide it or the model.
    """
    method = Method.from_config(config)
    model = pretrained.shape(config)
    target = topology_lib.find(topology)
    mesh = _mesh(config, model, target)
    build.check_groups(config, mesh)
    lengths = _lengths(config, model)
    attention = _attention(config, target)
    options = LearnerOptions(
        model, Compute(config.model.remat, config.model.compute_dtype, attention, mesh), method.objective
    )
    shapes = programs.Shapes(config, model, mesh, lengths=lengths)
    groups, shards = shapes.groups, logical_axes.size(mesh, logical_axes.ROWS)
    of_shard = config.train.groups_per_microbatch // shards
    work = flops.tree(lengths, of_shard, config.rollout.group_size, triangular=attention != "xla")
    # Groups that only fill up a micro-batch are not useful.
    useful = flops.useful(model, work) * shards / config.train.groups_per_microbatch * groups * config.train.epochs
    compiled = (*programs.update_programs(shapes, options, work), *programs.sampling_programs(shapes))
    return Plan(config, target, mesh, attention, lengths, groups, useful, compiled)


def _mesh(config: Config, model: DecoderConfig, target: Target) -> Mesh:
    sizes = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    try:
        mesh = sharding.make_mesh(*sizes, devices=target.devices)
        sharding.param_shardings(model, mesh)
    except ValueError as error:
        fitting = _fitting_mesh(model, target)
        remedy = f" On {target.name} {fitting} divides {model.name}." if fitting else ""
        raise ValueError(f"{error}{remedy}") from error
    return mesh


def _fitting_mesh(model: DecoderConfig, target: Target) -> str:
    """Finds the mesh with the largest fsdp, as settings, that divides devices and model; "" if none does."""
    count = len(target.devices)
    for fsdp in sorted((n for n in range(1, count + 1) if count % n == 0), reverse=True):
        for tensor in (n for n in range(1, count // fsdp + 1) if count // fsdp % n == 0):
            sizes = {"data": count // fsdp // tensor, "fsdp": fsdp, "tensor": tensor}
            try:
                sharding.param_shardings(model, sharding.make_mesh(**sizes, devices=target.devices))
            except ValueError:
                continue
            return " ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    return ""


def _attention(config: Config, target: Target) -> str:
    """Chooses as `attention.choose` does, which tries it on a device; there is none here."""
    alone = "blocked" if len(target.devices) == 1 else "xla"
    own = {"tpu": "splash", "gpu": "cudnn", "cpu": alone}.get(target.platform, "xla")
    wanted = own if config.model.attention == "auto" else config.model.attention
    if wanted == "cudnn" and config.model.compute_dtype != "bfloat16":
        wanted = "xla" if config.model.attention == "auto" else wanted
    if wanted not in ("xla", "blocked", own):
        raise ValueError(f"model.attention={wanted!r} does not work on {target.name}; set model.attention='auto'.")
    return wanted


def _lengths(config: Config, model: DecoderConfig) -> Lengths:
    multiple = config.train.length_multiple
    shared_prefix = programs.packing(config).shared_prefix_length(INSTRUCTION_TOKENS)
    group_prefix = compilation.bucket(config.manager.chunk_tokens + INSTRUCTION_TOKENS - shared_prefix, multiple)
    response = config.rollout.max_new_tokens
    view = compilation.bucket(config.memory.view_tokens + response, multiple) - response
    if shared_prefix + group_prefix + view + response > model.max_length:
        raise ValueError(
            f"instructions ({INSTRUCTION_TOKENS}, as the plan assumes) + manager.chunk_tokens "
            f"({config.manager.chunk_tokens}) + memory.view_tokens ({config.memory.view_tokens}) + "
            f"rollout.max_new_tokens ({response}) are more than {model.name} takes ({model.max_length}); lower one."
        )
    return Lengths(shared_prefix, group_prefix, view, response)
