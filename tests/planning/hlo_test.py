"""Tests of the bytes that programs send, on programs whose collectives can be counted by hand."""

import json
import pathlib
import subprocess
import sys

import pytest

import simulated_devices
from finemem_jax.planning import hlo

ROOT = pathlib.Path(__file__).parents[2]
# Eight devices as [4, 2]; x is [8, 128] float32, split over the first axis of the mesh.
PROGRAM = """
import json
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P
import numpy as np
from finemem_jax.planning import hlo

mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("a", "b"))

def body(x):
    def one(x, _):
        return x + lax.psum(x * 2, "b"), None
    x, _ = lax.scan(one, x, None, length=3)
    whole = lax.all_gather(x, "a", axis=0, tiled=True)
    part = lax.psum_scatter(jnp.sin(whole), "a", scatter_dimension=0, tiled=True)
    return lax.ppermute(part, "a", [(i, (i + 1) % 4) for i in range(4)])

f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False))
found = hlo.traffic(f.lower(jax.ShapeDtypeStruct((8, 128), jnp.float32)).compile().as_text())
print(json.dumps([found.sent, found.runs, found.largest]))
"""


def test_by_hand_on_eight_devices():
    # A device holds [2, 128] float32 = 1,024 bytes; the whole is 4,096.
    #   all-reduce over 2 devices, three times: 3 · 2 · 1,024 · 1/2 = 3,072
    #   all-gather over 4: 4,096 · 3/4 = 3,072; reduce-scatter the same
    #   collective-permute: 1,024
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(
        command, env=simulated_devices.environment(8), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    sent, count, largest = json.loads(result.stdout.splitlines()[-1])
    assert sent == {
        "all-reduce": 3_072, "all-gather": 3_072, "reduce-scatter": 3_072, "collective-permute": 1_024,
    }  # fmt: skip
    assert count == {"all-reduce": 3, "all-gather": 1, "reduce-scatter": 1, "collective-permute": 1}
    assert largest == 4_096


def program(*lines, others=""):
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule jit_f, num_partitions=8\n\n{others}\nENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        # Groups in each of the ways in which they are written: lists, iota, axes of a mesh, all devices.
        (
            "%g = bf16[64,4]{1,0} all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}",
            "all-gather",
            384,
        ),
        ("%g = bf16[64,4]{1,0} all-gather(%p), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", "all-gather", 256),
        ("%g = bf16[64,4] all-gather(%p), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", "all-gather", 384),
        (
            "%g = bf16[64,4] all-gather(%p), replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) "
            "{'axis_0','axis_1'}, dimensions={0}",
            "all-gather",
            448,
        ),
        ("%g = f32[16]{0} all-reduce(%p), replica_groups={}, to_apply=%add", "all-reduce", 112),
        # Several arrays at once; a pair of operand and result where a collective is only started.
        ("%g = (f32[16]{0}, f32[16]{0}) all-reduce(%p, %p), replica_groups={{0,1}}, to_apply=%add", "all-reduce", 128),
        ("%g = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), replica_groups={{0,1,2,3}}", "all-gather", 48),
        (
            "%g = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}",
            "collective-permute",
            64,
        ),
        ("%g = f32[4]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, to_apply=%add", "reduce-scatter", 48),
    ],
)
def test_one_instruction(line, kind, sent):
    assert hlo.traffic(program(line)).sent == {kind: sent}


def test_a_collective_in_parts_counts_once():
    fused = "\n".join(
        f"%part_{i} (q: f32[4]) -> f32[16] {{\n  ROOT %g.{i} = f32[16] all-gather(%q), replica_groups={{{{0,1}}}}, "
        'frontend_attributes={chain_id="8"}\n}\n'
        for i in range(3)
    )
    calls = [f"%f.{i} = f32[16] fusion(%p), kind=kCustom, calls=%part_{i}" for i in range(3)]
    assert hlo.traffic(program(*calls, others=fused)).sent == {"all-gather": 32}


def loop(counter="s32", step=1):
    return (
        f"%body (x: ({counter}[], f32[16])) -> ({counter}[], f32[16]) {{\n"
        f"  %i = {counter}[] get-tuple-element(%x), index=0\n  %one = {counter}[]{{:T(128)}} constant({step})\n"
        f"  %next = {counter}[]{{:T(128)}} add(%i, %one)\n"
        "  %g = f32[16] all-reduce(%x), replica_groups={{0,1}}\n"
        f"  ROOT %t = ({counter}[], f32[16]{{0:T(8,128)}}) tuple(%next, %g)\n}}\n"
        f"%cond (x: ({counter}[], f32[16])) -> pred[] {{\n  %n = {counter}[]{{:T(128)}} constant(7)\n"
        f"  %i = {counter}[] get-tuple-element(%x), index=0\n"
        "  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT\n}\n"
    )


WHILE = "%w = (s32[], f32[16]) while(%p), condition=%cond, body=%body"


def test_loops_count_by_their_condition_or_by_what_is_written_beside_them():
    assert hlo.traffic(program(WHILE, others=loop())).sent == {"all-reduce": 7 * 64}
    assert hlo.traffic(program(WHILE, others=loop("u32", step=2))).sent == {"all-reduce": 4 * 64}
    known = WHILE + ', backend_config={"known_trip_count":{"n":"5"}}'
    assert hlo.traffic(program(known, others=loop())).sent == {"all-reduce": 5 * 64}


def test_a_collective_that_goes_on_while_a_loop_runs_counts_once():
    chained = loop().replace("{{0,1}}", '{{0,1}}, frontend_attributes={chain_id="3"}')
    start = '%s = f32[16] all-reduce(%p), replica_groups={{0,1}}, frontend_attributes={chain_id="3"}'
    assert hlo.traffic(program(start, WHILE, others=chained)).sent == {"all-reduce": 64}
