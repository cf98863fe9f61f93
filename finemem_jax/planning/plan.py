"""Whether a config fits a machine that is not here, and how fast it could be: compiled ahead of time, without weights.

The programs of a run (gradient of a micro-batch, optimizer update, prefill, decoding) are compiled for the target, TPU
pods by the TPU compiler itself, with shapes in place of arrays. Nothing is executed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from finemem_jax import build
from finemem_jax.config import checks
from finemem_jax.config.sections import Config
from finemem_jax.models import decoder, kv_cache, logical_axes, lora, sharding
from finemem_jax.models.decoder import Compute
from finemem_jax.models.kv_cache import Context, NewTokens
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.planning import flops, hlo
from finemem_jax.planning import topology as topology_lib
from finemem_jax.planning.flops import Work
from finemem_jax.planning.hardware import Chip
from finemem_jax.planning.topology import Target
from finemem_jax.rl import batching, learner
from finemem_jax.rl.batching import Batch
from finemem_jax.rl.learner import Learner, LearnerOptions, TrainState
from finemem_jax.rl.method import Method
from finemem_jax.runtime import compilation
from finemem_jax.sampling import decode as decode_lib
from finemem_jax.sampling import engine
from finemem_jax.sampling.decode import Rules, SlotState, Spec
from finemem_jax.sampling.token_sampling import SamplingParams
from finemem_jax.weights import pretrained

# Instructions, worked examples and the chat's frame before the chunk. With chunks and a memory view of 2,048 tokens
# each this makes the 6,144 tokens to which Mem-alpha caps its training prompts.
INSTRUCTION_TOKENS = 2_048
_END_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The longest case, in tokens: what all prompts share, a chunk, and the memory view with the response."""

    shared_prefix: int
    group_prefix: int
    view: int
    response: int

    @property
    def suffix(self) -> int:
        return self.view + self.response


@dataclasses.dataclass
class Program:
    """One compiled program. Bytes and FLOPs are those of one device.

    Attributes:
        runs: How often a training step runs it.
        memory: Bytes by what they hold; "temporaries" are activations and all else that only lives while it runs.
        flops, hbm_bytes, sent: Of one run. `hbm_bytes` is a lower bound: what is read and written at least once.
        largest_collective: Bytes of the largest array that a collective makes.
        problem: What the compiler said if it refused.
    """

    name: str
    runs: float
    memory: dict[str, float]
    flops: float = 0.0
    hbm_bytes: float = 0.0
    sent: dict[str, float] = dataclasses.field(default_factory=dict)
    largest_collective: float = 0.0
    compile_seconds: float = 0.0
    problem: str = ""

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Lower bounds on one run's time: products at peak, memory read once, links all busy."""
        return {
            "compute": self.flops / chip.flops,
            "hbm": self.hbm_bytes / chip.hbm_bandwidth,
            "links": sum(self.sent.values()) / chip.link_bandwidth,
        }

    def roofline(self, chip: Chip) -> float:
        """The longest of them, as if all three overlapped perfectly."""
        return max(self.seconds(chip).values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a config would need and could reach on a target."""

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
        """Bytes per device that stay free at the worst moment."""
        return self.target.hbm_bytes - max(program.total for program in self.programs)

    def update_seconds(self) -> float | None:
        """Lower bound on the time of a training step's update; None where peaks are unknown."""
        return self._seconds("gradients", "optimizer")

    def sampling_seconds(self) -> float | None:
        """Lower bound on the time the manager takes to write a training step's responses, all of full length."""
        return self._seconds("prefill", "decode")

    def _seconds(self, *names):
        chip = self.target.chip
        return chip and sum(p.runs * p.roofline(chip) for p in self.programs if p.name in names)

    def mfu(self) -> float | None:
        """Upper bound on the update's MFU: useful FLOPs / (peak × its shortest time)."""
        chip, seconds = self.target.chip, self.update_seconds()
        return self.useful_flops / (chip.flops * self.mesh.size * seconds) if chip and seconds else None


# --------------------------------------------------------------------------------------
# Compiling
# --------------------------------------------------------------------------------------


def make(config: Config, topology: str) -> Plan:
    """Compiles a config's programs for a target.

    Raises:
        ValueError: an unknown or unavailable topology, or a mesh that does not divide it or the model.
    """
    method = Method.from_config(config)
    model = pretrained.shape(config)
    where = topology_lib.find(topology)
    mesh = _mesh(config, model, where)
    shares = logical_axes.size(mesh, logical_axes.ROWS)
    build.check_groups(config, mesh)
    lengths = _lengths(config, model)
    attention = _attention(config, where)
    options = LearnerOptions(
        model, Compute(config.model.remat, config.model.compute_dtype, attention, mesh), method.objective
    )
    groups = config.rollout.streams_per_step * config.data.chunks_per_stream
    shapes = _Shapes(config, model, mesh, lengths)
    work = flops.tree(
        lengths.shared_prefix, lengths.group_prefix, lengths.suffix, config.train.groups_per_microbatch // shares,
        config.rollout.group_size, config.rollout.max_new_tokens, triangular=attention != "xla",
    )  # fmt: skip
    programs = [*_update_programs(config, options, shapes, work, groups), *_sampling_programs(config, model, shapes)]
    # A micro-batch's padding does nothing useful.
    useful = flops.useful(model, work) * shares / config.train.groups_per_microbatch * groups * config.train.epochs
    return Plan(config, where, mesh, attention, lengths, groups, useful, tuple(programs))


def _mesh(config: Config, model, where):
    sizes = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    try:
        mesh = sharding.make_mesh(*sizes, devices=where.devices)
        sharding.param_shardings(model, mesh)
    except ValueError as error:
        fitting = _fitting_mesh(model, where)
        remedy = f" On {where.name} {fitting} divides {model.name}." if fitting else ""
        raise ValueError(f"{error}{remedy}") from error
    return mesh


def _fitting_mesh(model, where):
    """The mesh with the largest fsdp, as settings, that divides the devices and the model; "" if none does."""
    count = len(where.devices)
    for fsdp in sorted((n for n in range(1, count + 1) if count % n == 0), reverse=True):
        for tensor in (n for n in range(1, count // fsdp + 1) if count // fsdp % n == 0):
            sizes = {"data": count // fsdp // tensor, "fsdp": fsdp, "tensor": tensor}
            try:
                sharding.param_shardings(model, sharding.make_mesh(**sizes, devices=where.devices))
            except ValueError:
                continue
            return " ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    return ""


def _attention(config: Config, where):
    """What "auto" is on such devices by `attention.choose`, which would try it on one."""
    alone = "blocked" if len(where.devices) == 1 else "xla"
    own = {"tpu": "splash", "gpu": "cudnn", "cpu": alone}.get(where.platform, "xla")
    wanted = own if config.model.attention == "auto" else config.model.attention
    if wanted == "cudnn" and config.model.compute_dtype != "bfloat16":
        wanted = "xla" if config.model.attention == "auto" else wanted
    if wanted not in ("xla", "blocked", own):
        raise ValueError(f"model.attention={wanted!r} does not work on {where.name}; set model.attention='auto'.")
    return wanted


def _lengths(config: Config, model):
    multiple = config.train.length_multiple
    shared_prefix = _packing(config).shared_prefix_length(INSTRUCTION_TOKENS)
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


def _packing(config: Config, data_shards: int = 1) -> batching.Packing:
    return batching.Packing(
        config.train.groups_per_microbatch,
        config.train.length_multiple,
        config.rollout.max_new_tokens,
        data_shards=data_shards,
    )


class _Shapes:
    """Shapes of everything a run holds, each with its place on the mesh."""

    def __init__(self, config: Config, model: DecoderConfig, mesh: Mesh, lengths: Lengths):
        self.config, self.mesh, self.lengths = config, mesh, lengths
        self.tx = learner.make_optimizer(config.optimizer)
        params = jax.tree.map(_at, decoder.abstract_params(model), sharding.param_shardings(model, mesh))
        base, adapters = lora.split(params) if model.lora else (params, {})
        dtype = jnp.dtype(config.model.param_dtype)
        base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), base)
        self.params = lora.combine(base, adapters) if adapters else base
        self.frozen, self.trained = lora.split(self.params)
        self.base = base
        where = learner.state_shardings(self.trained, self.tx)
        opt_state = jax.eval_shape(self.tx.init, self.trained)
        self.state = TrainState(self.trained, jax.tree.map(_at, opt_state, where.opt_state), self.scalar(jnp.int32))
        # What the manager and the reader each decode with, where these are copies.
        plain = lora.without(model)
        laid_out = functools.partial(kv_cache.layout, plain, dtype=config.sampler.dtype, int8=config.sampler.int8)
        where = kv_cache.shardings(plain, mesh, whole=config.sampler.whole_weights, int8=config.sampler.int8)
        self.weights = jax.tree.map(_at, jax.eval_shape(laid_out, base), where)

    def scalar(self, dtype=jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((), dtype, sharding=NamedSharding(self.mesh, P()))

    def rows(self, shape, dtype=jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(self.mesh, shape[0]))

    def sums(self, options):
        shapes = jax.eval_shape(functools.partial(learner.zero_sums, options=options), self.trained)
        everywhere = jax.tree.map(lambda x: _at(x, NamedSharding(self.mesh, P())), shapes)
        return everywhere._replace(
            gradients=jax.tree.map(lambda x, like: _at(x, like.sharding), shapes.gradients, self.trained)
        )

    def batch(self) -> Batch:
        config, lengths = self.config, self.lengths
        blank = batching.blank(
            _packing(config, logical_axes.size(self.mesh, logical_axes.ROWS)),
            [0] * lengths.shared_prefix,
            batching.BatchSizes(config.rollout.group_size, lengths.group_prefix, lengths.suffix),
            with_reference=bool(config.objective.kl_weight),
            with_factors=checks.rule_args(config).type_factor_on == "unclipped",
        )
        return jax.tree.map(lambda array: self.rows(array.shape, array.dtype), blank)

    def cache(self, model, rows, positions):
        """Rows over data and fsdp, heads over tensor."""
        shapes = jax.eval_shape(
            functools.partial(kv_cache.empty, model, rows, positions, dtype=self.config.sampler.dtype)
        )
        return jax.tree.map(_at, shapes, kv_cache.cache_shardings(self.mesh, shapes))


def _at(shape, place):
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)


def _bytes(tree) -> float:
    """Bytes of a tree of shapes on one device."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _update_programs(config: Config, options, shapes, work, groups):
    params, moments = _bytes(shapes.params), _bytes(shapes.state) - _bytes(shapes.trained)
    sums, batch = shapes.sums(options), shapes.batch()
    # What stays while the other programs run. The manager's weights are dropped during an update.
    reader = _bytes(shapes.weights) if config.reader.kind == "model" else 0.0
    reference = _bytes(shapes.base) if _has_reference(config) and not config.lora.rank else 0.0
    resident = {"parameters": params, "optimizer": moments, "frozen copies": reader + reference}
    per_update = math.ceil(math.ceil(groups / config.train.minibatches) / config.train.groups_per_microbatch)
    updates = config.train.minibatches * config.train.epochs
    gradients = _compile(
        "gradients", updates * per_update, learner.accumulate,
        (Learner(shapes.frozen, shapes.scalar(), options, shapes.tx), shapes.trained, sums, batch),
        resident | {"gradients": _bytes(sums), "batch": _bytes(batch)},
    )  # fmt: skip
    gradients.flops = flops.executed(options.model, work, options.compute.remat, options.compute.attention)
    gradients.flops /= shapes.mesh.shape["tensor"]
    # Each pass over the layers reads a device's share of the gathered weights, and writes them when they arrive.
    width = jnp.dtype(options.compute.dtype).itemsize
    passes = 3 if options.compute.remat == "full" else 2
    gradients.hbm_bytes += passes * flops.matrices(options.model) * width / shapes.mesh.shape["tensor"]
    update = _compile(
        "optimizer", updates, learner.apply, (shapes.state, sums), resident | {"gradients": _bytes(sums)},
        optimizer=shapes.tx,
    )  # fmt: skip
    return gradients, update


def _has_reference(config: Config):
    return bool(config.objective.kl_weight or config.credit.kl_weight)


def _sampling_programs(config: Config, model, shapes):
    base, lengths = lora.without(model), shapes.lengths
    chunk, slots = config.sampler.prefill_tokens, config.sampler.num_slots
    sampler = engine.Engine(base, (), config.sampler)
    positions = sampler.positions(lengths.group_prefix + lengths.suffix)
    shared_prefix = shapes.cache(base, 1, sampler.positions(lengths.shared_prefix))
    cache = shapes.cache(base, slots, positions)
    store = shapes.cache(base, config.rollout.streams_per_step, sampler.positions(positions // 2))
    in_place, adapted = config.sampler.in_place, bool(config.lora.rank)
    weights = kv_cache.in_place(shapes.base) if in_place else shapes.weights
    frozen = config.reader.kind == "model" and not (in_place and adapted)
    held = {
        "parameters": _bytes(shapes.params),
        "optimizer": _bytes(shapes.state) - _bytes(shapes.trained),
        "frozen copies": _bytes(shapes.weights) if frozen else 0.0,
        # Adapters are merged into a copy of what they adapt.
        "manager's copy": _bytes(weights) if adapted or not in_place else 0.0,
        "cache": _bytes(cache) + _bytes(shared_prefix) + _bytes(store),
    }
    if _has_reference(config) and not config.lora.rank:
        held["frozen copies"] += _bytes(shapes.base)
    floats = shapes.rows((slots,), jnp.float32)
    state = SlotState(
        token=shapes.rows((slots,)), filled=shapes.rows((slots,)), remaining=shapes.rows((slots,)),
        sampling=SamplingParams(floats, shapes.rows((slots,)), floats), key=shapes.rows((slots, 2), jnp.uint32),
    )  # fmt: skip
    rollouts = config.rollout.streams_per_step * config.rollout.group_size
    steps, waves = config.data.chunks_per_stream, math.ceil(rollouts / slots)
    shards, tensor = logical_axes.size(shapes.mesh, logical_axes.ROWS), shapes.mesh.shape["tensor"]
    shards = shards if slots % shards == 0 else 1
    rows, together = slots // shards, engine.row_buckets(slots // shards)[-1]
    chunks = math.ceil(rows / together) * math.ceil(lengths.view / chunk)
    copies = shapes.cache(base, together * shards, positions)
    held["cache"] += _bytes(copies)
    # While slots are lengthened, the shorter ones are there too.
    held["cache"] += sum(_bytes(shapes.cache(base, slots, size)) for size in sampler.sizes(positions)[-2:-1])
    context = Context(weights, shared_prefix, shapes.scalar(jnp.int32))
    prefill = _compile(
        "prefill", steps * waves * chunks, decode_lib.prefill,
        (context, copies, NewTokens(shapes.rows((together * shards, chunk)), *[shapes.rows((together * shards,))] * 2)),
        held, spec=Spec(base, shapes.mesh),
    )  # fmt: skip
    keys = lengths.shared_prefix + positions
    prefill.flops = together / tensor * flops.forward(base, Work(chunk, 0, 0, chunk * keys), chunk * keys)
    num_steps = config.sampler.steps_per_call
    end_ids = _at(jax.ShapeDtypeStruct((_END_TOKENS,), jnp.int32), NamedSharding(shapes.mesh, P()))
    decode = _compile(
        "decode", steps * waves * config.rollout.max_new_tokens / num_steps, decode_lib.decode,
        (context, cache, state, Rules._make((shapes.scalar(jnp.int32), end_ids, None))),
        held, spec=Spec(base, shapes.mesh, num_steps),
    )  # fmt: skip
    decode.flops = num_steps * rows / tensor * flops.forward(base, Work(1, 1, keys, keys), keys)
    # Every token reads the weights and the cache once.
    decode.hbm_bytes = num_steps * (_bytes(weights) + _bytes(cache) + _bytes(shared_prefix))
    return prefill, decode


def _compile(
    name: str, runs: float, function: Any, arguments: tuple, memory: dict[str, float], **statics: Any
) -> Program:
    """Compiles a program and reads off what it needs.

    Args:
        memory: What is held while it runs, its arguments included.
        statics: The function's static arguments, where they go by keyword.
    """
    program = Program(name, runs, dict(memory))
    began = time.monotonic()
    try:
        compiled = function.lower(*arguments, **statics).compile()
    except jax.errors.JaxRuntimeError as error:
        if "memory" not in str(error):
            raise
        program.problem = str(error).strip().splitlines()[0]
        program.memory["temporaries"] = _needed(program.problem) or math.inf
        return program
    finally:
        program.compile_seconds = time.monotonic() - began
    stats = compiled.memory_analysis()
    arguments_and_results = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    # Tiles pad arrays, so that arguments can be larger than their elements.
    program.memory["temporaries"] = (
        arguments_and_results + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
        - sum(_bytes(x) for x in jax.tree.leaves(arguments) if isinstance(x, jax.ShapeDtypeStruct))
    )  # fmt: skip
    program.hbm_bytes = stats.argument_size_in_bytes + stats.output_size_in_bytes
    moved = hlo.traffic(compiled.as_text())
    program.sent, program.largest_collective = moved.sent, moved.largest
    return program


def _needed(message):
    """Bytes that the TPU compiler says it would have needed for temporaries; None if it does not say."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds", message) or re.search(r"Used ([\d.]+)([KMGT])", message)
    return found and float(found[1]) * 1024 ** (1 + "KMGT".index(found[2]))
