"""Measures how much of a decoding step is the time that reading weights and caches must take.

    python benchmarks/decode_bandwidth.py [--slots=16] [--positions=384] [--shared_prefix=384] [--dtype=float32]
        [--int8] [--in_place]
    python benchmarks/decode_bandwidth.py --model=qwen3_4b --slots=64 --positions=1024 --shared_prefix=512
        --dtype=bfloat16

A step draws a token in each slot, and must read every weight and every position of every slot at least once. How fast
this machine reads is measured beside it: the fastest of a sum and a product with a vector, over 1 GiB, in the same
process. Weights are random, of a shape that `finemem_jax/models/presets.py` names; slots are full, and all of them
draw, at temperature 1. The target is for GPUs and TPUs: on a CPU the layers' products are bound by arithmetic.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import _common as common
import jax
import jax.numpy as jnp
import numpy as np

from finemem_jax.config import sections
from finemem_jax.models import decoder, presets
from finemem_jax.sampling import decode
from finemem_jax.sampling.engine import Engine

READ_BYTES = 2**30
STEPS = 32


def num_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays in a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


class Reading:
    """Measures how fast the device reads."""

    def __init__(self) -> None:
        """Makes the arrays, and compiles."""
        matrix = jax.random.normal(jax.random.key(0), (2**14, READ_BYTES // 4 // 2**14))
        vector = jnp.ones(matrix.shape[1])
        self._calls = [(jax.jit(jnp.sum), matrix), (jax.jit(jnp.matmul), matrix, vector)]
        self.gigabytes_a_second()

    def gigabytes_a_second(self) -> float:
        """Returns the speed of the fastest of three reads of each kind."""
        reads = [lambda call=call: jax.block_until_ready(call[0](*call[1:])) for call in self._calls]
        return READ_BYTES / 1e9 / min(common.seconds(read) for read in reads for _ in range(3))


class Decoding:
    """Decodes STEPS steps at a call, with full slots."""

    def __init__(self, model: presets.DecoderConfig, arguments: argparse.Namespace):
        """Makes weights and caches of the sizes that were asked for, and compiles."""
        self.slots, room = arguments.slots, arguments.positions
        init = jax.jit(lambda: jax.tree.map(lambda x: x.astype(arguments.dtype), decoder.init(model, 0)))
        settings = sections.Sampler(
            num_slots=self.slots, steps_per_call=STEPS, prefill_tokens=STEPS, dtype=arguments.dtype,
            int8=arguments.int8, in_place=arguments.in_place,
        )  # fmt: skip
        self.engine = Engine(model, (), settings)
        self.engine.load(init())
        if self.engine.positions(room) != room:
            sys.exit(f"--positions={room}: take {self.engine.positions(room)}, a length that caches have.")
        self.shared_prefix = self.engine.shared_prefix([1] * arguments.shared_prefix)
        self.cache = self.engine.empty(self.slots, room)
        self.filled = room - STEPS
        # The embedding is read whole where it is the output head; else a row a slot.
        rest, layers = self.engine.weights
        head = rest["embedding" if model.tie_embeddings else "head"]
        self.bytes = num_bytes(layers) + num_bytes(head) + num_bytes(self.cache) + num_bytes(self.shared_prefix.cache)
        self.call()

    def call(self) -> None:
        """Decodes STEPS tokens in each slot."""
        state = decode.idle(self.slots)
        state.filled[:], state.remaining[:], state.sampling.temperature[:] = self.filled, STEPS + 1, 1.0
        state.key[:, 0] = np.arange(self.slots)
        self.cache, _, drawn = self.engine.decode(self.shared_prefix, self.cache, state)
        assert (drawn.token >= 0).all()

    def seconds_a_step(self) -> float:
        """Times a step."""
        return common.seconds(self.call) / STEPS


def main() -> None:
    """Measures, and prints the claims."""
    parser = common.parser(__doc__, repeats=5)
    parser.add_argument("--model", default="smollm2_135m", help="a preset")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--positions", type=int, default=384, help="of each slot")
    parser.add_argument("--shared_prefix", type=int, default=384, help="positions that all slots share")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--in_place", action="store_true", help="decode with the trainer's arrays")
    arguments = parser.parse_args()
    made = Decoding(presets.preset(arguments.model), arguments)
    reading = Reading()
    steps, speeds, shares = [], [], []
    for _ in range(arguments.repeats):
        steps.append(made.seconds_a_step())
        speeds.append(reading.gigabytes_a_second())
        shares.append(made.bytes / 1e9 / speeds[-1] / steps[-1])
    accelerated = jax.default_backend() != "cpu"
    claims = [
        common.claim("time to read / time of a step", shares, "", target=0.6 if accelerated else None),
        common.claim("a step", [1e3 * step for step in steps], "ms"),
        common.claim("new tokens", [made.slots / step for step in steps], "tokens/s"),
        common.claim("read in a step", [made.bytes / 1e9], "GB"),
        common.claim("reading", speeds, "GB/s"),
    ]
    common.report("decode_bandwidth", claims)


if __name__ == "__main__":
    main()
