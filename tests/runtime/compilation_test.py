"""Tests of finemem_jax/runtime/compilation.py: one program per set of shapes, few sizes, every compilation counted."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from finemem_jax.runtime import compilation
from finemem_jax.runtime.compilation import Call


@functools.partial(jax.jit, static_argnames="factor")
def scaled(x, factor):
    return jax.tree.map(lambda leaf: leaf * factor, x)


def compiled_by(action):
    before = compilation.counts()
    result = action()
    return compilation.counts().programs - before.programs, result


def test_a_program_is_compiled_once_for_all_that_look_alike():
    x = {"a": np.arange(3.0), "b": np.ones((2, 5))}
    count, result = compiled_by(lambda: compilation.call(scaled, x, factor=2.0))
    assert count == 1
    np.testing.assert_array_equal(result["a"], [0, 2, 4])
    assert compiled_by(lambda: compilation.call(scaled, {"a": np.ones(3), "b": np.ones((2, 5))}, factor=2.0))[0] == 0
    for other in ({"a": np.ones(4), "b": np.ones((2, 5))}, {"a": np.ones(3, int), "b": np.ones((2, 5))}):
        assert compiled_by(lambda other=other: compilation.call(scaled, other, factor=2.0))[0] == 1
    count, result = compiled_by(lambda: compilation.call(scaled, x, factor=3.0))
    assert count == 1
    np.testing.assert_array_equal(result["a"], [0, 3, 6])


def test_what_is_prepared_is_not_compiled_again():
    shape = jax.ShapeDtypeStruct((7,), np.float32)
    count, program = compiled_by(lambda: compilation.prepare(scaled, np.zeros(7, np.float32), factor=5.0))
    assert count == 1
    assert compiled_by(lambda: compilation.call(scaled, np.ones(7, np.float32), factor=5.0))[0] == 0
    with pytest.raises(TypeError):
        program(np.ones(8, np.float32))
    assert shape.shape == program(np.ones(7, np.float32)).shape


def test_one_placement_has_one_program_whatever_it_is_called():
    """What programs return is where their arguments were, but often under another name."""
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    places = [NamedSharding(mesh, PartitionSpec(*names)) for names in ((), (None,), ("a",), (("a", "b"),))]
    places.append(jax.sharding.SingleDeviceSharding(jax.devices()[0]))

    def act():
        return [compilation.call(scaled, jax.device_put(np.arange(9.0), place), factor=11.0) for place in places]

    count, results = compiled_by(act)
    assert count == 1
    for result in results:
        np.testing.assert_array_equal(result, 11 * np.arange(9.0))


def test_many_are_prepared_at_once():
    calls = [Call((scaled, np.zeros(n)), {"factor": 13.0}) for n in (2, 3, 4, 3, 2)]
    said = []
    count, _ = compiled_by(lambda: compilation.prepare_all(calls, lambda *counts: said.append(counts)))
    assert count == 3 and said[-1] == (3, 3) and said[:-1] == [(i, 3) for i in range(3)]
    assert compiled_by(lambda: compilation.prepare_all(calls, lambda done, total: None))[0] == 0


def test_preparing_many_can_be_stopped_and_says_what_fails():
    def stop(done, total):
        raise KeyboardInterrupt

    calls = [Call((scaled, np.zeros(n)), {"factor": 17.0}) for n in range(1, 60)]
    before = compilation.counts().programs
    with pytest.raises(KeyboardInterrupt):
        compilation.prepare_all(calls, stop)
    assert compilation.counts().programs - before < 59
    with pytest.raises(TypeError):
        compilation.prepare_all([Call((scaled, np.zeros(2)), {"factor": "text"})], lambda done, total: None)


def test_what_others_compile_is_counted():
    function = jax.jit(lambda x: x + 12345)
    count, _ = compiled_by(lambda: function(np.ones(11)))
    assert count >= 1
    before = compilation.counts()
    assert compiled_by(lambda: function(np.ones(11)))[0] == 0
    assert before.seconds > 0


# --------------------------------------------------------------------------------------
# Few sizes
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "rounded"), [(0, 1), (1, 1), (7, 7), (8, 8), (9, 10), (11, 12), (15, 16), (16, 16), (17, 20), (33, 40)]
)
def test_sizes_are_rounded_up(size, rounded):
    assert compilation.bucket(size) == rounded
    assert compilation.bucket(10 * size, 10) == 10 * rounded


def test_few_sizes_occur_and_little_is_wasted():
    # 1 to 8 as they are, then four to an octave up to 1024: 8 + 7 · 4.
    rounded = [compilation.bucket(n) for n in range(1, 1025)]
    assert len(set(rounded)) == 36
    assert all(n <= size <= 1.25 * n for n, size in enumerate(rounded, start=1))


@pytest.mark.parametrize("unit", [1, 16, 100])
def test_all_up_to_a_size(unit):
    for size in (1, 5, 99, 1000):
        assert compilation.buckets_up_to(size, unit) == sorted(
            {compilation.bucket(n, unit) for n in range(1, size + 1)}
        )
