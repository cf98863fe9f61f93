"""Tests of plans: what they count against what a run really holds, verdicts, exit codes, and wrong input."""

import dataclasses
import importlib.util
import json
import re

import jax
import pytest

import programs as commands
import smoke_run
from finemem_jax.models import decoder, lora, presets, sharding
from finemem_jax.planning import hardware, plan, programs
from finemem_jax.planning import topology as topology_lib
from finemem_jax.planning.topology import Target
from finemem_jax.rl import learner

TINY = presets.preset("tiny")
# Small next to the assumed instructions of 2,048 tokens, which would make the tests slow.
INSTRUCTIONS = 128


def config(**changes):
    return smoke_run.config(**{"train.groups_per_microbatch": 2, "manager.chunk_tokens": 128, **changes})


def here(hbm_bytes=1e9):
    """This process's CPU devices, called a TPU's, so that there are peaks."""
    return Target("here:2", jax.devices()[:2], hardware.TPUS["v5e"], hbm_bytes)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(plan, "INSTRUCTION_TOKENS", INSTRUCTIONS)
    monkeypatch.setattr(topology_lib, "find", lambda topology: here())


@pytest.fixture(scope="module")
def made():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "INSTRUCTION_TOKENS", INSTRUCTIONS)
        patch.setattr(topology_lib, "find", lambda topology: here())
        return plan.make(config(), "here:2")


def held(tree):
    """Bytes of arrays on the first device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("rank", [0, 4])
def test_memory_is_what_a_state_really_holds(rank, small):
    settings = config(**{"lora.rank": rank})
    shapes = programs.Shapes(
        settings,
        model := dataclasses.replace(TINY, lora=lora.parse(rank, 8.0, "all")),
        mesh := sharding.make_mesh(1, 2, 1),
        lengths=plan._lengths(settings, TINY),
    )
    params = sharding.place(model, decoder.init(model, 0), mesh)
    state = learner.init(lora.split(params)[1], learner.make_optimizer(settings.optimizer))
    assert programs.num_bytes(shapes.params) == held(params)
    assert programs.num_bytes(shapes.state) == held(state)
    # All but the norms stands on two devices by halves: V D + 2 · (D C (2 H + 2 K) + 3 D F) = 18,432 + 46,080 elements,
    # and 2 · 2 D + D = 240 whole; 4 bytes each.
    if not rank:
        assert programs.num_bytes(shapes.params) == 4 * ((18_432 + 46_080) / 2 + 240)


def test_programs_and_their_totals(made):
    by_name = {program.name: program for program in made.programs}
    assert list(by_name) == ["gradients", "optimizer", "prefill", "decode"]
    for program in made.programs:
        assert program.memory["parameters"] > 0 and program.memory["temporaries"] >= 0
        assert program.total == sum(program.memory.values())
        assert program.hbm_bytes > 0 and not program.problem
    # 2 streams × 2 chunks are 4 groups, 2 at once; 8 rollouts in 8 slots, 24 tokens by 8, for each of 2 chunks; what
    # follows a chunk in a prompt is two pieces, for two of the slots at once.
    assert {name: program.runs for name, program in by_name.items()} == {
        "gradients": 2, "optimizer": 1, "prefill": 16, "decode": 6,
    }  # fmt: skip
    assert by_name["gradients"].memory["gradients"] > by_name["gradients"].memory["parameters"] * 0.99
    # Weights are gathered, and their gradients do not come back whole.
    assert by_name["gradients"].sent["all-gather"] > 0


def test_the_bound_on_mfu_is_the_ratio_of_useful_flops_to_peak(made):
    seconds = made.update_seconds()
    assert seconds == pytest.approx(sum(p.runs * max(p.seconds(made.target.chip).values()) for p in made.programs[:2]))
    assert made.mfu() == pytest.approx(made.useful_flops / (seconds * 2 * 197e12))
    assert 0 < made.mfu() < 1


def test_a_plan_without_peaks_has_no_times(made):
    nowhere = dataclasses.replace(made, target=dataclasses.replace(made.target, chip=None))
    assert nowhere.mfu() is None and nowhere.update_seconds() is None


def test_a_refused_program_does_not_fit(made):
    message = "Ran out of memory on HBM, the total memory required for HLO temporaries (2.50G) exceeds available HBM"
    assert programs._needed(message) == 2.5 * 2**30
    refused = dataclasses.replace(made.programs[0], problem=message)
    assert not dataclasses.replace(made, programs=(refused,)).fits


@pytest.mark.parametrize(
    "topology", ["", "v5e", "v9:2x2", "tpu", "cpu", "cpu:0", "v5e:16", "v5p:2,2,2", "gpu:8", "V5E:4x4"]
)
def test_an_unknown_topology_is_refused(topology):
    with pytest.raises(ValueError, match="--topology must be a TPU's name and shape .*v5e.*cpu:N"):
        topology_lib.find(topology)


def test_libtpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs libtpu.*uv pip install -e '.\\[tpu\\]'"):
        topology_lib.find("v5e:4x4")


def test_more_cpu_devices_than_this_process_has():
    with pytest.raises(ValueError, match="was started with 2 CPU devices"):
        topology_lib.find("cpu:3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.tensor": 3}, r"does not fit 2 devices.*On here:2 mesh.data=1 mesh.fsdp=2 mesh.tensor=1 divides tiny"),
        (
            {"train.groups_per_microbatch": 3},
            r"groups_per_microbatch=3 must be a multiple .* Set train.groups_per_microbatch=2",
        ),
        ({"rollout.max_new_tokens": 4_000}, r"are more than tiny takes \(4096\)"),
        ({"model.attention": "cudnn"}, r"model.attention='cudnn' does not work on here:2"),
        ({"model.name": "auto"}, r"model.weights is 'random'"),
    ],
)
def test_settings_that_cannot_work(changes, message, small):
    with pytest.raises(ValueError, match=message):
        plan.make(config(**changes), "here:2")


def test_eight_devices_from_the_command_line(tmp_path):
    result = commands.main(
        "--mode=plan", "--topology=cpu:8", f"--workdir={tmp_path}", "--config.train.groups_per_microbatch=8",
        "--config.mesh.tensor=2", "--config.model.name=tiny",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "fits: " in result.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert found["programs"][0]["sent"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--mode=plan", "--topology=cpu:8", "--config.mesh.tensor=4"],
            "mesh.tensor=4 does not divide num_kv_heads=2 of tiny.*On cpu:8 mesh.data=1 mesh.fsdp=8 mesh.tensor=1",
        ),
        (["--topology=v5e:4x4"], "--topology needs --mode=plan"),
        (["--mode=train"], "--workdir is missing"),
    ],
)
def test_bad_command_lines(arguments, message):
    result = commands.main(*arguments)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert re.search(message, result.stderr, re.DOTALL), result.stderr


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed (the tpu extra)"
)


@needs_libtpu
def test_a_slice_that_does_not_exist():
    with pytest.raises(ValueError, match="knows no such slice.*take a shape of whole hosts"):
        topology_lib.find("v5e:3x5")


@needs_libtpu
@pytest.mark.slow
def test_the_tpu_compiler(tmp_path):
    result = commands.main(
        "--mode=plan", "--topology=v5e:2x4", f"--workdir={tmp_path}", "--config.train.groups_per_microbatch=8",
        "--config.model.attention=xla",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["chip"]["name"] == "v5e" and 0 < found["mfu"] < 1
