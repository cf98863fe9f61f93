"""Tests of what a plan prints and writes, on plans made by hand."""

import dataclasses
import json

import jax
import pytest

import smoke_run
from finemem_jax.models import sharding
from finemem_jax.planning import hardware, plan, tables
from finemem_jax.planning.hardware import GIB
from finemem_jax.planning.plan import Lengths, Plan, Program
from finemem_jax.planning.topology import Target

CHIP = hardware.TPUS["v5e"]


def program(name, **changes):
    values = {
        "runs": 2.0, "memory": {"parameters": 3 * GIB, "temporaries": 1 * GIB}, "flops": CHIP.flops,
        "hbm_bytes": 1e9, "sent": {"all-gather": 2e9, "all-reduce": 0.0},
    }  # fmt: skip
    return Program(name, **(values | changes))


def made(**changes):
    programs = tuple(program(name) for name in ("gradients", "optimizer", "prefill", "decode"))
    target = Target("here:1", jax.devices()[:1], CHIP, 5.0 * GIB)
    values = {
        "config": smoke_run.config(), "target": target, "mesh": sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]),
        "attention": "xla", "lengths": Lengths(8, 4, 4, 2), "groups": 2, "useful_flops": CHIP.flops,
        "programs": programs,
    }  # fmt: skip
    return Plan(**(values | changes))


def run(monkeypatch, found, workdir=None):
    monkeypatch.setattr(plan, "make", lambda config, topology: found)
    return tables.run(found.config, found.target.name, workdir)


def test_a_plan_that_fits(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, made(), tmp_path / "new") == 0
    shown = capsys.readouterr().out
    assert "fits: 1.00 GiB (20%)" in shown
    # Useful FLOPs take a second at peak; four runs of a second each are bound by compute.
    assert "at least 4.0 s, so its MFU is at most 25%" in shown
    assert "sent by all-gather, GB" in shown and "all-reduce" not in shown
    saved = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert saved["fits"] and saved["margin_bytes"] == GIB and saved["mfu"] == pytest.approx(0.25)
    assert [one["total_bytes"] for one in saved["programs"]] == [4 * GIB] * 4


def test_a_plan_that_does_not_fit(monkeypatch, capsys):
    found = made()
    tight = dataclasses.replace(found, target=dataclasses.replace(found.target, hbm_bytes=3.0 * GIB))
    assert run(monkeypatch, tight) == 1
    shown = capsys.readouterr().out
    assert "does not fit: try" in shown and "-1.00" in shown


def test_what_the_compiler_refused_is_said(monkeypatch, capsys):
    refused = program("gradients", problem="Ran out of memory on HBM")
    assert run(monkeypatch, made(programs=(refused, *made().programs[1:]))) == 1
    assert "gradients was refused by the compiler: Ran out of memory on HBM" in capsys.readouterr().out


def test_without_peaks_there_are_no_times(monkeypatch, capsys):
    found = made()
    nowhere = dataclasses.replace(found, target=dataclasses.replace(found.target, chip=None))
    assert run(monkeypatch, nowhere) == 0
    shown = capsys.readouterr().out
    assert "MFU" not in shown and "fits: " in shown
    assert tables.record(nowhere)["mfu"] is None
