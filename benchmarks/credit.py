"""Compares the whole credit rule of one training step, as JAX kernels, with vectorized NumPy.

    python benchmarks/credit.py [--repeats=7] [--streams=64]

From scores and evidence to advantages, Fine-Mem's default rule: 64 streams, 8 rollouts, 128 steps of 4 operations, 100
global questions, 20 items of evidence each, 5 questions a chunk; float32, as on an accelerator, and float64, as the
trainer calls it. NumPy does the same with whole arrays, adding up by index with `np.add.at` or `np.bincount`, and over
axes with `sum` or as products with ones, which NumPy computes much faster where an axis is short. What both compute is
compared first. NumPy runs on one core, XLA on all of them. About two minutes, 3 GB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import _common as common
import jax
import numpy as np

from finemem_jax.rl import advantages, credit_rules
from finemem_jax.rl.advantages import Advantages
from finemem_jax.rl.credit_rules import CreditConfig, RewardInputs, Rewards
from finemem_jax.rl.grpo import Normalizer

# Rollouts of each of S streams, chunks, operations a chunk, global questions, their evidence, questions of a chunk.
G, T, O, Q, K, J = 8, 128, 4, 100, 20, 5  # noqa: E741
CALLS = 5
CONFIG, NORMALIZER = CreditConfig(), Normalizer()


AddFn = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
SumFn = Callable[[np.ndarray, np.dtype], np.ndarray]


def random_inputs(S: int, dtype: type[np.floating]) -> RewardInputs:
    """Makes inputs that are ragged in everything that can be."""
    rng = np.random.default_rng(0)
    steps = rng.integers(T // 2, T + 1, S)
    step_mask = np.broadcast_to((np.arange(T) < steps[:, None])[:, None], (S, G, T))
    written = (np.arange(O) < rng.integers(0, O + 1, (S, G, T, 1))) & step_mask[..., None]
    question_mask = np.broadcast_to((np.arange(Q) < rng.integers(Q // 2, Q + 1, (S, 1)))[:, None], (S, G, Q))

    def slots(last_step: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return (rng.random(shape) * last_step).astype(np.int32) * O + rng.integers(0, O, shape).astype(np.int32)

    return RewardInputs(
        step_mask=step_mask,
        chunk_scores=rng.random((S, G, T, J)).astype(dtype),
        chunk_mask=(np.arange(J) < rng.integers(0, J + 1, (S, 1, T, 1))) & step_mask[..., None],
        chunk_slot=slots(np.arange(1, T + 1)[:, None, None], (S, G, T, J, 2)),
        chunk_is_evidence=rng.random((S, G, T, J, 2)) < 0.9,
        chunk_type=np.zeros((S, G, T, J, 2), np.int32),
        scores=rng.random((S, G, Q)).astype(dtype),
        question_mask=question_mask,
        slot=slots(steps[:, None, None, None], (S, G, Q, K)),
        is_evidence=np.arange(K) < rng.integers(0, K + 1, (S, G, Q, 1)),
        gold=np.zeros((S, G, Q, T), bool),
        written=written,
        valid=written & (rng.random((S, G, T, O)) < 0.8),
        operation_type=np.zeros((S, G, T, O), np.int32),
        operation_action=np.zeros((S, G, T, O), np.int32),
        memory_tokens=rng.integers(0, 5_000, (S, G)),
        stream_tokens=np.broadcast_to(rng.integers(5_000, 20_000, (S, 1)), (S, G)),
    )


def add_at(index: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Adds up values by index with `np.add.at`."""
    total = np.zeros(size, values.dtype)
    np.add.at(total, index, values)
    return total


def bincount(index: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Adds up values by index with `np.bincount`."""
    return np.bincount(index, values, size).astype(values.dtype)


def by_sum(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Adds up the last axis with `sum`."""
    return values.sum(-1, dtype=dtype)


def by_product(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Adds up the last axis as a product with ones."""
    return values.astype(dtype, copy=False) @ np.ones(values.shape[-1], dtype)


def with_numpy(x: RewardInputs, add: AddFn, sum_last: SumFn) -> np.ndarray:
    """Computes advantages [S, G, T] in whole-array NumPy; credit of single operations included, as in ours."""
    dtype, S = x.scores.dtype, len(x.scores)

    def total(values: np.ndarray | jax.Array) -> np.ndarray:
        return sum_last(np.asarray(values), dtype)

    # The global score of each rollout, shared out to the operations that wrote the evidence, and evenly.
    s = CONFIG
    rollouts = np.arange(S * G, dtype=np.int32).reshape(S, G, 1, 1)
    num_steps = total(x.step_mask)[..., None]
    num_questions = np.maximum(total(x.question_mask), 1)[..., None]
    value = np.where(x.question_mask, x.scores, 0) / num_questions
    outcome = total(value)[..., None]
    num_evidence = total(x.is_evidence)
    share = x.is_evidence / np.maximum(num_evidence, 1)[..., None]
    held = x.is_evidence & x.question_mask[..., None]
    worth = (value[..., None] * share)[held]
    operation = add((rollouts * T * O + x.slot)[held], worth, S * G * T * O).reshape(S, G, T, O)
    unshared = total(np.where(num_evidence > 0, 0, value))[..., None]
    even = x.step_mask / num_steps
    credit_step = (1 - s.beta) * outcome * even + s.beta * unshared * even
    credit_operation = s.beta * operation

    # The score of each chunk's own questions, to the operations of that chunk.
    chunk_count = np.maximum(total(x.chunk_mask), 1)
    chunk_value = np.where(x.chunk_mask, x.chunk_scores, 0) / chunk_count[..., None]
    chunk_share = x.chunk_is_evidence / np.maximum(total(x.chunk_is_evidence), 1)[..., None]
    first = O * np.arange(T, dtype=np.int32)[:, None, None]
    of_step = (x.chunk_slot >= first) & (x.chunk_slot < first + O)
    here = x.chunk_is_evidence & x.chunk_mask[..., None] & of_step
    chunk_worth = np.where(here, chunk_value[..., None] * chunk_share, 0)
    chunk_operation = add((rollouts[..., None] * T * O + x.chunk_slot)[here], chunk_worth[here], S * G * T * O).reshape(
        S, G, T, O
    )
    chunk_step = total(chunk_value) - total(chunk_worth.reshape(S, G, T, -1))

    # The reward: credit, chunk reward, format and compression.
    count = np.maximum(total(x.written), 1)[..., None]
    form = x.valid / count
    compression = (1 - x.memory_tokens / x.stream_tokens).astype(dtype)[..., None] * x.step_mask
    total_operation = credit_operation + s.format_weight * form + s.chunk_weight * chunk_operation
    total_step = credit_step + s.chunk_weight * chunk_step + s.compression_weight * compression
    reward = total(total_operation) + total_step
    # Ours returns these two as well.
    np.where(x.written, count * total_operation + total_step[..., None], 0)
    np.where(x.written, credit_operation + credit_step[..., None] / count, 0)

    # Standardized within the group; rollouts with equal rewards have no advantage.
    centered = reward - reward.mean(1, keepdims=True)
    std = np.sqrt((centered**2).sum(1, keepdims=True) / (G - 1))
    equal = np.abs(centered).max(1, keepdims=True) <= 1e-6 * np.maximum(1, np.abs(reward).max(1, keepdims=True))
    return np.where(equal | ~x.step_mask, 0, centered / (std + NORMALIZER.epsilon))


@jax.jit
def with_jax(x: RewardInputs, config: CreditConfig) -> tuple[Rewards, Advantages]:
    """Computes rewards and advantages as the trainer does."""
    rewards, terms = credit_rules.step_rewards(x, config)
    return rewards, advantages.compute(x, terms, config, NORMALIZER)


def often(function: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
    """Calls a function several times in a row, as single calls are too short to time."""

    def calls() -> None:
        for _ in range(CALLS):
            function(*arguments)

    return calls


def measure(streams: int, dtype: type[np.floating], *, repeats: int) -> list[dict[str, Any]]:
    """Compares both in one precision, and makes the claims."""
    host, name = random_inputs(streams, dtype), np.dtype(dtype).name
    device = jax.tree.map(jax.numpy.asarray, host)
    config = jax.tree.map(dtype, CONFIG)

    def ours() -> tuple[Rewards, Advantages]:
        return jax.block_until_ready(with_jax(device, config))

    _, compared = ours()
    claims = []
    for add, sum_last, target in ((add_at, by_sum, 10.0), (bincount, by_sum, None), (bincount, by_product, None)):
        largest = np.abs(np.asarray(compared.step) - with_numpy(host, add, sum_last)).max()
        assert largest < (1e-2 if dtype == np.float32 else 1e-8), f"the two do not compute the same: {largest}"
        runs = [common.ratio(often(ours), often(with_numpy, host, add, sum_last)) for _ in range(repeats)]
        peer = f"{add.__name__}, {sum_last.__name__}"
        claims.append(common.claim(f"full rule vs NumPy ({peer}), {name}", runs, "x", target=target))
    times = [1e3 * common.seconds(often(ours)) / CALLS for _ in range(repeats)]
    claims.append(common.claim(f"full rule, {name}", times, "ms"))
    return claims


def main() -> None:
    """Measures, and prints the claims."""
    parser = common.parser(__doc__, repeats=7)
    parser.add_argument("--streams", type=int, default=64)
    arguments = parser.parse_args()
    claims = measure(arguments.streams, np.float32, repeats=arguments.repeats)
    with jax.enable_x64(True):
        claims += measure(arguments.streams, np.float64, repeats=arguments.repeats)
    common.report("credit", claims)


if __name__ == "__main__":
    main()
