"""Compiles the programs of a run ahead of time, with shapes in place of arrays, and reads off what they need."""

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
from jax.typing import DTypeLike

from finemem_jax.config import checks
from finemem_jax.config.sections import Config
from finemem_jax.models import decoder, kv_cache, logical_axes, lora, sharding
from finemem_jax.models.kv_cache import Context, NewTokens
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.planning import flops, hlo
from finemem_jax.planning.flops import Lengths, Work
from finemem_jax.planning.hardware import Chip
from finemem_jax.rl import batching, learner
from finemem_jax.rl.batching import Batch
from finemem_jax.rl.learner import Learner, LearnerOptions, TrainState
from finemem_jax.sampling import decode as decode_lib
from finemem_jax.sampling import engine
from finemem_jax.sampling.decode import Rules, SlotState, Spec
from finemem_jax.sampling.token_sampling import SamplingParams

# Tokens that may end a response; how many there are hardly matters.
_END_TOKENS = 4


def packing(config: Config, data_shards: int = 1) -> batching.Packing:
    """How a run packs groups into micro-batches; token ids do not matter here."""
    train = config.train
    return batching.Packing(
        train.groups_per_microbatch, train.length_multiple, config.rollout.max_new_tokens, data_shards=data_shards
    )


@dataclasses.dataclass
class Program:
    """Holds what a compiled program needs. Bytes and FLOPs are those of one device.

    Attributes:
        runs: How often a training step runs it.
        memory: Bytes by what they hold while it runs; "temporaries" are activations and all else that it makes itself.
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
        """Computes lower bounds on one run's time: products at peak, memory read once, links all busy."""
        return {
            "compute": self.flops / chip.flops,
            "hbm": self.hbm_bytes / chip.hbm_bandwidth,
            "links": sum(self.sent.values()) / chip.link_bandwidth,
        }

    def roofline(self, chip: Chip) -> float:
        """Returns the longest of them, as if all three overlapped perfectly."""
        return max(self.seconds(chip).values())


class Shapes:
    """Knows the shapes of all arrays that a run holds, each with its sharding on the mesh.

    Attributes:
        groups: Groups of rollouts' responses in a training step, one for each chunk of each stream.
        params: All parameters, of which `trained` are trained; `base` is without adapters.
        weights: What the manager and the reader each decode with, where these are copies.
    """

    def __init__(self, config: Config, model: DecoderConfig, mesh: Mesh, *, lengths: Lengths):
        self.config, self.model, self.mesh, self.lengths = config, model, mesh, lengths
        self.groups = config.rollout.streams_per_step * config.data.chunks_per_stream
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
        plain = lora.without(model)
        laid_out = functools.partial(kv_cache.layout, plain, dtype=config.sampler.dtype, int8=config.sampler.int8)
        where = kv_cache.shardings(plain, mesh, whole=config.sampler.whole_weights, int8=config.sampler.int8)
        self.weights = jax.tree.map(_at, jax.eval_shape(laid_out, base), where)

    def resident(self, *, reader_copy: bool) -> dict[str, float]:
        """Counts the bytes of what stays on a device while any program runs.

        Args:
            reader_copy: Whether the reader holds a copy of the weights to decode with.
        """
        config = self.config
        # Adapters are compared with the base beside them, which needs no copy.
        has_reference = bool(config.objective.kl_weight or config.credit.kl_weight) and not config.lora.rank
        copies = (self.weights if reader_copy else {}, self.base if has_reference else {})
        return {
            "parameters": num_bytes(self.params),
            "optimizer": num_bytes(self.state) - num_bytes(self.trained),
            "frozen copies": sum(map(num_bytes, copies)),
        }

    def whole(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """An array that every device has as a whole."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, P()))

    def scalar(self, dtype: DTypeLike = jnp.float32) -> Any:
        return self.whole((), dtype)

    def rows(self, shape: tuple[int, ...], dtype: DTypeLike = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(self.mesh, shape[0]))

    def sums(self, options: LearnerOptions) -> Any:
        """The sums that a gradient program adds to, gradients sharded as the parameters are."""
        shapes = jax.eval_shape(functools.partial(learner.zero_sums, options=options), self.trained)
        everywhere = jax.tree.map(lambda x: _at(x, NamedSharding(self.mesh, P())), shapes)
        return everywhere._replace(
            gradients=jax.tree.map(lambda x, like: _at(x, like.sharding), shapes.gradients, self.trained)
        )

    def batch(self) -> Batch:
        """The longest micro-batch."""
        config, lengths = self.config, self.lengths
        blank = batching.blank(
            packing(config, logical_axes.size(self.mesh, logical_axes.ROWS)),
            [0] * lengths.shared_prefix,
            batching.BatchSizes(config.rollout.group_size, lengths.group_prefix, lengths.suffix),
            with_reference=bool(config.objective.kl_weight),
            with_factors=checks.rule_args(config).type_factor_on == "unclipped",
        )
        return jax.tree.map(lambda array: self.rows(array.shape, array.dtype), blank)

    def cache(self, rows: int, positions: int) -> Any:
        """Keys and values: rows sharded over data and fsdp, heads over tensor."""
        model = lora.without(self.model)
        shapes = jax.eval_shape(
            functools.partial(kv_cache.empty, model, rows, positions, dtype=self.config.sampler.dtype)
        )
        return jax.tree.map(_at, shapes, kv_cache.cache_shardings(self.mesh, shapes))


def _at(shape: Any, place: jax.sharding.Sharding) -> Any:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)


def num_bytes(tree: Any) -> float:
    """Counts the bytes of a tree of shapes on one device."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def update_programs(shapes: Shapes, options: LearnerOptions, work: Work) -> tuple[Program, Program]:
    """Compiles the gradients of a micro-batch, and the optimizer's update.

    Args:
        work: A micro-batch's, of one shard.
    """
    config, tensor = shapes.config, shapes.mesh.shape["tensor"]
    sums, batch = shapes.sums(options), shapes.batch()
    # The manager's copy is dropped during an update.
    memory = shapes.resident(reader_copy=config.reader.kind == "model") | {"gradients": num_bytes(sums)}
    per_update = math.ceil(math.ceil(shapes.groups / config.train.minibatches) / config.train.groups_per_microbatch)
    updates = config.train.minibatches * config.train.epochs
    arguments = (Learner(shapes.frozen, shapes.scalar(), options, shapes.tx), shapes.trained, sums, batch)
    gradients = Program("gradients", updates * per_update, memory | {"batch": num_bytes(batch)})
    _compile(gradients, learner.accumulate, arguments)
    remat, attention = options.compute.remat, options.compute.attention
    gradients.flops = flops.executed(options.model, work, remat=remat, attention=attention) / tensor
    # Each pass over the layers reads a device's share of the gathered weights, and writes them when they arrive.
    width = jnp.dtype(options.compute.dtype).itemsize
    gradients.hbm_bytes += (3 if remat == "full" else 2) * flops.matrices(options.model) * width / tensor
    update = Program("optimizer", updates, dict(memory))
    _compile(update, learner.apply, (shapes.state, sums), optimizer=shapes.tx)
    return gradients, update


def sampling_programs(shapes: Shapes) -> tuple[Program, Program]:
    """Compiles a prefill chunk, and the decoding steps of one call, as the manager's sampler runs them."""
    config, lengths, mesh = shapes.config, shapes.lengths, shapes.mesh
    model, tensor = lora.without(shapes.model), mesh.shape["tensor"]
    chunk, slots, num_steps = config.sampler.prefill_tokens, config.sampler.num_slots, config.sampler.steps_per_call
    sampler = engine.Engine(model, (), config.sampler)
    positions = sampler.positions(lengths.group_prefix + lengths.suffix)
    shards = logical_axes.size(mesh, logical_axes.ROWS)
    shards = shards if slots % shards == 0 else 1
    rows, together = slots // shards, engine.row_buckets(slots // shards)[-1]
    shared_prefix, cache = shapes.cache(1, sampler.positions(lengths.shared_prefix)), shapes.cache(slots, positions)
    prefilled = shapes.cache(together * shards, positions)
    stored = shapes.cache(config.rollout.streams_per_step, sampler.positions(positions // 2))
    # While slots are lengthened, the shorter ones are there too.
    shorter = [shapes.cache(slots, size) for size in sampler.sizes(positions)[-2:-1]]
    in_place, adapted = config.sampler.in_place, bool(config.lora.rank)
    weights = kv_cache.in_place(shapes.base) if in_place else shapes.weights
    memory = shapes.resident(reader_copy=config.reader.kind == "model" and not (in_place and adapted)) | {
        # Adapters are merged into a copy of what they adapt.
        "manager's copy": num_bytes(weights) if adapted or not in_place else 0.0,
        "cache": num_bytes([cache, shared_prefix, stored, prefilled, shorter]),
    }
    waves = math.ceil(config.rollout.streams_per_step * config.rollout.group_size / slots)
    fillings = config.data.chunks_per_stream * waves  # How often all slots are filled.
    context = Context(weights, shared_prefix, shapes.scalar(jnp.int32))

    tokens, numbers = shapes.rows((together * shards, chunk)), shapes.rows((together * shards,))
    chunks = math.ceil(rows / together) * math.ceil(lengths.view / chunk)
    prefill = Program("prefill", fillings * chunks, dict(memory))
    arguments = (context, prefilled, NewTokens(tokens, numbers, numbers))
    _compile(prefill, decode_lib.prefill, arguments, spec=Spec(model, mesh))
    keys = lengths.shared_prefix + positions
    prefill.flops = together / tensor * flops.forward(model, Work(chunk, 0, 0, chunk * keys), chunk * keys)

    numbers, floats = shapes.rows((slots,)), shapes.rows((slots,), jnp.float32)
    state = SlotState(
        token=numbers, filled=numbers, remaining=numbers, sampling=SamplingParams(floats, numbers, floats),
        key=shapes.rows((slots, 2), jnp.uint32),
    )  # fmt: skip
    rules = Rules(shapes.scalar(jnp.int32), shapes.whole((_END_TOKENS,), jnp.int32))
    decode = Program("decode", fillings * config.rollout.max_new_tokens / num_steps, memory)
    _compile(decode, decode_lib.decode, (context, cache, state, rules), spec=Spec(model, mesh, num_steps))
    decode.flops = num_steps * rows / tensor * flops.forward(model, Work(1, 1, keys, keys), keys)
    # Every token reads the weights and the cache once.
    decode.hbm_bytes = num_steps * num_bytes([weights, cache, shared_prefix])
    return prefill, decode


def _compile(program: Program, function: Any, arguments: tuple[Any, ...], **statics: Any) -> None:
    """Compiles a program and notes what it needs.

    Args:
        program: Its `memory` already holds its arguments, and what else stays while it runs.
        statics: The function's static arguments.
    """
    began = time.monotonic()
    try:
        compiled = function.lower(*arguments, **statics).compile()
    except jax.errors.JaxRuntimeError as error:
        if "memory" not in str(error):
            raise
        program.problem = str(error).strip().splitlines()[0]
        program.memory["temporaries"] = _needed(program.problem) or math.inf
        return
    finally:
        program.compile_seconds = time.monotonic() - began
    stats = compiled.memory_analysis()
    arguments_and_results = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    # Tiles pad arrays, so that arguments can be larger than their elements.
    program.memory["temporaries"] = (
        arguments_and_results + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
        - sum(num_bytes(x) for x in jax.tree.leaves(arguments) if isinstance(x, jax.ShapeDtypeStruct))
    )  # fmt: skip
    program.hbm_bytes = stats.argument_size_in_bytes + stats.output_size_in_bytes
    moved = hlo.traffic(compiled.as_text())
    program.sent, program.largest_collective = moved.sent, moved.largest


def _needed(message: str) -> float | None:
    """Returns the bytes for temporaries that the TPU compiler says were needed; None if it does not say."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds", message) or re.search(r"Used ([\d.]+)([KMGT])", message)
    return float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])) if found else None
