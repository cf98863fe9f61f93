"""Compares token log-probabilities and entropies, values and gradients, with holding all logits: memory and time.

    python benchmarks/logprobs.py [--repeats=7]

Memory is what the compiler says it needs besides arguments and results, as a share of the float32 logits: 8,192 tokens,
width 2,560, 151,936 words (Qwen3-4B). Nothing of that size is computed, so it takes no such machine; with the package
`libtpu` the TPU compiler is asked too, for one chip and for sixteen (a device's share of the logits then). Times are of
SmolLM2-135M's size, 800 tokens of width 576 and 49,152 words, against the plain formula and against blocks of 256
tokens with all words, recomputed by `jax.checkpoint`. What all three compute is compared first. About two minutes.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

# Only the TPU compiler is used: it may run beside other processes, and need not look for a TPU.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import _common as common
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from finemem_jax.models import log_probs

LARGE, SMALL = (8192, 2560, 151_936), (800, 576, 49_152)  # N, D, V
Values = tuple[Array, Array]  # Of each token: log-probability and entropy.


def naive(hidden: Array, head: Array, targets: Array, *, temperature: Array) -> Values:
    """Computes them from all logits at once."""
    logits = jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32) / temperature
    every = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(every, targets[:, None], axis=1)[:, 0]
    return chosen, -(jnp.exp(every) * every).sum(-1)


def checkpointed(hidden: Array, head: Array, targets: Array, *, temperature: Array) -> Values:
    """Computes them block by block of tokens, and again in the backward pass, so that only one block's logits live."""
    n, block = len(hidden), 256
    padding = -n % block
    states = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, block, hidden.shape[1])
    blocks = states, jnp.pad(targets, (0, padding)).reshape(-1, block)
    one = jax.checkpoint(lambda block: naive(block[0], head, block[1], temperature=temperature))
    chosen, entropy = jax.lax.map(one, blocks)
    return chosen.reshape(-1)[:n], entropy.reshape(-1)[:n]


def with_slopes(function: Callable[..., Values], **settings: Any) -> Any:
    """Compiles values, and gradients by states and head, of a combination in which every token weighs differently."""

    def combination(hidden: Array, head: Array, targets: Array, *, temperature: Array) -> tuple[Array, Values]:
        chosen, entropy = function(hidden, head, targets, temperature=temperature, **settings)
        n = jnp.arange(len(targets))
        return (jnp.cos(n) * chosen + 0.1 * jnp.sin(n) * entropy).sum(), (chosen, entropy)

    return jax.jit(jax.value_and_grad(combination, argnums=(0, 1), has_aux=True))


def temporary_share(mesh: Mesh | None, dtype: Any) -> float:
    """Returns temporary bytes on one device / bytes of its share of the float32 logits."""
    n, width, vocab = LARGE

    def abstract(shape: tuple[int, ...], dtype: Any, *spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh and NamedSharding(mesh, P(*spec)))

    rows = ("data", "fsdp")
    arguments = (
        abstract((n, width), dtype, rows),
        abstract((vocab, width), dtype, "tensor", "fsdp"),
        abstract((n,), jnp.int32, rows),
    )
    compiled = with_slopes(log_probs.token_log_probs, plan=log_probs.Plan(mesh=mesh))
    memory = compiled.lower(*arguments, temperature=abstract((), jnp.float32)).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes / (4 * n * vocab / (mesh.size if mesh else 1))


def memory_claims() -> list[dict[str, Any]]:
    """Asks the compilers that are there."""
    meshes: list[tuple[str, Mesh | None, float | None]] = [(jax.default_backend(), None, 0.05)]
    if importlib.util.find_spec("libtpu"):
        chips = np.asarray(topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices)
        axes = ("data", "fsdp", "tensor")
        meshes.append(("one TPU v5e", Mesh(chips[:1].reshape(1, 1, 1), axes), 0.05))
        # A chip's share of the logits is small here beside a block of them; reported, without a target.
        meshes.append(("16 TPU v5e, 1 x 4 x 4", Mesh(chips.reshape(1, 4, 4), axes), None))
    return [
        common.claim(
            f"temporary memory / logits, {jnp.dtype(dtype).name}, {name}",
            [temporary_share(mesh, dtype)],
            "x",
            target=target,
            lower_is_better=True,
        )
        for name, mesh, target in meshes
        for dtype in (jnp.float32, jnp.bfloat16)
    ]


def time_claims(repeats: int) -> list[dict[str, Any]]:
    """Compares values and times."""
    n, width, vocab = SMALL
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(n, width)), jnp.float32)
    # Logits of standard deviation 3, about as a language model's.
    head = jnp.asarray(rng.normal(size=(vocab, width)) * 3 / width**0.5, jnp.float32)
    arguments = hidden, head, jnp.asarray(rng.integers(0, vocab, n))

    def runs(function: Callable[..., Any]) -> Callable[[], Any]:
        def action() -> Any:
            return jax.block_until_ready(function(*arguments, temperature=jnp.float32(0.8)))

        return action

    claims = []
    for name, wrap in (("values and gradients", with_slopes), ("values", jax.jit)):
        ours, *theirs = (runs(wrap(function)) for function in (log_probs.token_log_probs, naive, checkpointed))
        result = jax.tree.leaves(ours())
        for peer, title in zip(theirs, ("plain formula", "checkpointed blocks"), strict=True):
            for a, b in zip(result, jax.tree.leaves(peer()), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
            ratios = [common.ratio(ours, peer) for _ in range(repeats)]
            claims.append(common.claim(f"{name} vs {title}", ratios, "x", target=1.0))
        claims.append(common.claim(name, [1e3 * common.seconds(ours) for _ in range(repeats)], "ms"))
    return claims


def main() -> None:
    """Measures, and prints the claims."""
    repeats = common.parser(__doc__, repeats=7).parse_args().repeats
    common.report("logprobs", [*memory_claims(), *time_claims(repeats)], ["libtpu"])


if __name__ == "__main__":
    main()
