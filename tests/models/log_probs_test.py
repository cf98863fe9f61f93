"""Tests of finemem_jax/models/log_probs.py: the same numbers and gradients as with all logits at once."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import simulated_devices
from finemem_jax.models import log_probs

D, V = 6, 11


def naive(hidden, head, targets, temperature):
    temperature = jnp.broadcast_to(temperature, len(targets))[:, None]
    logits = jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32) / temperature
    normalized = jax.nn.log_softmax(logits)
    chosen = normalized[jnp.arange(len(targets)), targets]
    return chosen, -(jnp.exp(normalized) * normalized).sum(-1)


def random_case(n, width=D, vocab=V, seed=0):
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(n, width)), rng.normal(size=(vocab, width))
    return hidden.astype(np.float32), head.astype(np.float32), rng.integers(0, vocab, n).astype(np.int32)


def with_slopes(function, **settings):
    """Both results, and the gradients of a random combination of them by hidden, head and temperature."""

    more = {"plan": log_probs.Plan(**settings)} if settings else {}

    def combination(hidden, head, temperature, targets):
        parts = function(hidden, head, targets, temperature=temperature, **more)
        weights = np.random.default_rng(1).normal(size=(2, len(targets))).astype(np.float32)
        return sum((w * part).sum() for w, part in zip(weights, parts, strict=True)), parts

    differentiated = jax.value_and_grad(combination, argnums=(0, 1, 2), has_aux=True)

    def values_and_slopes(hidden, head, targets, temperature):
        (_, parts), slopes = differentiated(hidden, head, temperature, targets)
        return *parts, *slopes

    return jax.jit(values_and_slopes)


def assert_same(got, expected, tolerance=1e-5):
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_log_probs_by_hand():
    # Logits 0, ln 2, ln 5: probabilities 1/8, 2/8, 5/8. Entropy: 1/8 ln 8 + 1/4 ln 4 + 5/8 ln(8/5).
    head = jnp.log(jnp.array([[1.0], [2.0], [5.0]]))
    got, entropy = log_probs.token_log_probs(jnp.ones((3, 1)), head, jnp.arange(3), temperature=1.0)
    np.testing.assert_allclose(got, np.log([1 / 8, 2 / 8, 5 / 8]), rtol=1e-5)
    np.testing.assert_allclose(entropy, np.log(8) / 8 + np.log(4) / 4 + 5 / 8 * np.log(8 / 5), rtol=1e-5)


def test_temperature_by_hand():
    # Temperature 2 halves the logits: 0 and ln 9 become 0 and ln 3, so 1/4 and 3/4 instead of 1/10 and 9/10.
    head = jnp.log(jnp.array([[1.0], [9.0]]))
    for temperature, expected in [(1.0, [1 / 10, 9 / 10]), (2.0, [1 / 4, 3 / 4])]:
        got, _ = log_probs.token_log_probs(jnp.ones((2, 1)), head, jnp.arange(2), temperature=temperature)
        np.testing.assert_allclose(np.exp(got), expected, rtol=1e-5)


def test_gradients_by_hand():
    # Logits 0 and ln 3: p = 1/4 and 3/4, H = 1/4 ln 4 + 3/4 ln(4/3). With the state 1, the head's gradient is the
    # logits'. Of log p_0: 1 - 1/4 and -3/4; of H: -p_v (log p_v + H).
    head = jnp.log(jnp.array([[1.0], [3.0]]))
    p = np.array([1 / 4, 3 / 4])
    entropy = -(p * np.log(p)).sum()
    for part, expected in [(0, [3 / 4, -3 / 4]), (1, -p * (np.log(p) + entropy))]:
        slope = jax.grad(
            lambda head, i: log_probs.token_log_probs(jnp.ones((1, 1)), head, jnp.arange(1), temperature=1.0)[i][0]
        )
        np.testing.assert_allclose(slope(head, part)[:, 0], expected, rtol=1e-5)


# Blocks that divide N and V, that leave a rest, and larger ones; V = 11 leaves one word in the last of blocks of 5.
@pytest.mark.parametrize(
    ("n", "token_block", "vocab_block", "per_token"),
    [(1, 4, 4, False), (5, 4, 4, True), (8, 4, 11, False), (8, 3, 1, True), (7, 5, 5, False), (7, 2048, 2048, True)],
)
def test_values_and_gradients_agree_with_all_logits_at_once(n, token_block, vocab_block, per_token):
    hidden, head, targets = random_case(n)
    blocks = with_slopes(log_probs.token_log_probs, token_block=token_block, vocab_block=vocab_block)
    whole = with_slopes(naive)
    for temperature in (0.5, 1.0, 1.7):
        temperature = np.float32(temperature) * (np.linspace(0.5, 2, n, dtype=np.float32) if per_token else 1)
        assert_same(blocks(hidden, head, targets, temperature), whole(hidden, head, targets, temperature))


def test_blocks_of_whole_tiles_agree_with_all_logits_at_once():
    case = random_case(300, vocab=1000)
    assert log_probs._Blocks.of(300, 128) == (300, 128, 3)
    assert log_probs._Blocks.of(1000, 512) == (1000, 512, 2)
    assert log_probs._Blocks.of(1280, 1024) == (1280, 640, 2)
    blocks = with_slopes(log_probs.token_log_probs, token_block=128, vocab_block=512)
    assert_same(blocks(*case, np.float32(0.8)), with_slopes(naive)(*case, np.float32(0.8)))


def test_no_tokens():
    hidden, head, targets = random_case(0)
    got = with_slopes(log_probs.token_log_probs)(hidden, head, targets, np.float32(1))
    assert [x.shape for x in got] == [(0,), (0,), (0, D), (V, D), ()]
    assert not got[3].any()
    assert not got[4]


def test_probabilities_sum_to_one():
    hidden, head, _ = random_case(1)
    got, entropy = log_probs.token_log_probs(
        np.repeat(hidden, V, axis=0), head, np.arange(V), temperature=1.0, plan=log_probs.Plan(vocab_block=4)
    )
    np.testing.assert_allclose(np.exp(got).sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(entropy, -(np.exp(got) * got).sum(), rtol=1e-5)


@pytest.mark.parametrize("vocab_block", [3, 2048])
def test_logits_of_ten_thousand(vocab_block):
    # Whole numbers, so that float32 has every logit exactly: ±10,000, and neighbors 1 apart whose probabilities
    # differ in digits that a log-sum-exp near 10,000 cannot hold.
    hidden = np.array([[100, 1], [-100, 1], [100, 0], [0, 1]], np.float32)
    head = np.array([[100, 0], [100, -1], [100, -2], [-100, 0], [-100, -1], [0, 0], [3, 5]], np.float32)
    blocks, whole = with_slopes(log_probs.token_log_probs, vocab_block=vocab_block), with_slopes(naive)
    for target in range(len(head)):
        case = hidden, head, np.full(len(hidden), target, np.int32), np.float32(1)
        got, expected = blocks(*case), whole(*case)
        assert_same(got, expected)
        assert (got[1] >= 0).all()


def test_random_large_logits_do_not_overflow():
    hidden, head, targets = random_case(5)
    got = with_slopes(log_probs.token_log_probs, vocab_block=4)(hidden * 1e4, head, targets, np.float32(1))
    assert all(np.isfinite(x).all() for x in got)
    assert (got[1] >= 0).all()


def test_gradients_agree_with_differences_in_float64():
    hidden, head, targets = random_case(5)
    with jax.enable_x64(True):
        hidden, head = (jnp.asarray(x, jnp.float64) for x in (hidden, head))
        temperature = jnp.linspace(0.7, 1.6, 5)

        def function(hidden, head, temperature):
            return log_probs.token_log_probs(
                hidden, head, targets, temperature=temperature, plan=log_probs.Plan(token_block=2, vocab_block=4)
            )

        assert function(hidden, head, temperature)[0].dtype == jnp.float64
        check_grads(function, (hidden, head, temperature), order=1, modes=["rev"], rtol=1e-7, atol=1e-7)


def test_bfloat16():
    # Products accumulate in float32, so values are as exact as the naive ones; gradients are rounded to 8 bits.
    hidden, head, targets = random_case(9)
    hidden, head = (jnp.asarray(x, jnp.bfloat16) for x in (hidden, head))
    got = with_slopes(log_probs.token_log_probs, token_block=4, vocab_block=4)(hidden, head, targets, np.float32(0.9))
    expected = with_slopes(naive)(hidden, head, targets, np.float32(0.9))
    assert_same(got[:2], expected[:2])
    assert_same(got[2:], expected[2:], tolerance=2e-2)


def compiled(mesh, shape, dtype=jnp.float32, **settings):
    """The compiled program that computes values and gradients by hidden and head; runs nothing, holds no array."""
    n, width, vocab = shape

    def combination(hidden, head, targets, temperature):
        chosen, entropy = log_probs.token_log_probs(
            hidden, head, targets, temperature=temperature, plan=log_probs.Plan(mesh=mesh, **settings)
        )
        return (jnp.cos(jnp.arange(n)) * chosen + entropy).sum()

    def abstract(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh and NamedSharding(mesh, P(*spec)))

    rows = ("data", "fsdp")
    arguments = (
        abstract((n, width), dtype, rows),
        abstract((vocab, width), dtype, "tensor", "fsdp"),
        abstract((n,), jnp.int32, rows),
        abstract((), jnp.float32),
    )
    return jax.jit(jax.value_and_grad(combination, argnums=(0, 1))).lower(*arguments).compile()


def temporary_bytes(program):
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_temporary_memory_is_a_twentieth_of_the_logits():
    assert temporary_bytes(compiled(None, (8192, 2560, 151_936))) <= 0.05 * 4 * 8192 * 151_936


def gathered(text):
    """Shapes of what a compiled program gathers, and the names of all its collective operations."""
    operations = re.findall(r"= (\(?\w+\[.*?) (all-\w+|reduce-scatter|collective-\w+|ragged-\w+)(?:-start)?\(", text)
    shapes = [
        tuple(int(size) for size in dimensions.split(","))
        for result, name in operations
        if name == "all-gather"
        for dimensions in re.findall(r"\[([\d,]+)\]", result)
    ]
    return shapes, {name for _, name in operations}


def assert_head_stays_split(program, width, vocab):
    shapes, names = gathered(program.as_text())
    # Blocks of the head in full width, and nothing larger.
    assert any(width in shape for shape in shapes)
    assert not any(vocab in shape for shape in shapes), shapes
    assert names <= {"all-gather", "all-reduce", "reduce-scatter"}


def check_on_eight_devices():
    """What the test below runs, in a process that has eight devices."""
    n, width, vocab = 21, 16, 88
    case = *random_case(n, width, vocab), np.linspace(0.5, 2, n, dtype=np.float32)
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    head = jax.device_put(case[1], NamedSharding(mesh, P("tensor", "fsdp")))
    ours = with_slopes(log_probs.token_log_probs, mesh=mesh, token_block=3, vocab_block=8)
    got = ours(case[0], head, *case[2:])
    assert_same(got, with_slopes(naive)(*case))
    assert got[3].sharding.is_equivalent_to(head.sharding, 2)
    assert_head_stays_split(compiled(mesh, (24, width, vocab), vocab_block=8), width, vocab)


def run_alone(check, **variables):
    """Calls a function of this file in a process of its own, since JAX reads its environment once."""
    done = subprocess.run(
        [sys.executable, "-c", f"from models import log_probs_test; log_probs_test.{check.__name__}()"],
        env=simulated_devices.environment(8, **variables),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_vocabulary_split_over_devices():
    run_alone(check_on_eight_devices)


@pytest.mark.parametrize("sizes", [(1, 1, 2), (1, 2, 1), (2, 1, 1)])
def test_each_axis_of_a_mesh_alone(sizes):
    case = *random_case(7, vocab=12), np.float32(0.7)
    mesh = Mesh(np.asarray(jax.devices()[:2]).reshape(sizes), ("data", "fsdp", "tensor"))
    ours = with_slopes(log_probs.token_log_probs, mesh=mesh, token_block=3, vocab_block=5)
    assert_same(ours(*case), with_slopes(naive)(*case))


def check_compiles_for_a_tpu_pod():
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    mesh = Mesh(np.asarray(topology.devices).reshape(1, 4, 4), ("data", "fsdp", "tensor"))
    width, vocab = 512, 16_384
    program = compiled(mesh, (4096, width, vocab), jnp.bfloat16, token_block=512, vocab_block=512)
    assert_head_stays_split(program, width, vocab)
    # A device's share of the logits: 1,024 tokens, 4,096 words.
    assert temporary_bytes(program) <= 0.05 * 4 * 4096 * vocab / mesh.size


def test_compiles_for_a_tpu_pod():
    pytest.importorskip("libtpu", reason="the libtpu wheel compiles for TPUs on machines that have none")
    # Several processes may compile at once, as nothing runs on a TPU; and what was compiled for one cannot be reloaded.
    run_alone(
        check_compiles_for_a_tpu_pod,
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_SKIP_MDS_QUERY="1",
        JAX_ENABLE_COMPILATION_CACHE="false",
    )
