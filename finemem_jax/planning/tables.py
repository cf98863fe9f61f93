"""Shows a plan (--mode=plan) as tables, and writes it as JSON."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from finemem_jax.config.sections import Config
from finemem_jax.planning import plan as plan_lib
from finemem_jax.planning.hardware import GIB
from finemem_jax.planning.plan import Plan
from finemem_jax.runtime import files
from finemem_jax.runtime.display import print_table

_ROLES = {
    "gradients": "a micro-batch",
    "optimizer": "the optimizer",
    "prefill": "a piece of prefill",
    "decode": "decoding {} tokens",
}


def run(config: Config, topology: str, workdir: pathlib.Path | None) -> int:
    """Plans, prints the tables, and writes `plan.json` into a workdir if one is given.

    Returns:
        The program's exit code: 0 if it fits, else 1.

    Raises:
        ValueError: an unknown or unavailable topology, or a mesh that does not divide it or the model.
    """
    found = plan_lib.make(config, topology)
    show(found)
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        files.replace_text(workdir / "plan.json", json.dumps(record(found), indent=1) + "\n")
    return 0 if found.fits else 1


def show(plan: Plan) -> None:
    """Prints what is assumed, memory and time per device, and the verdict."""
    config, lengths = plan.config, plan.lengths
    sizes = " × ".join(f"{name} {size}" for name, size in plan.mesh.shape.items())
    print(f"{config.experiment or config.model.name} on {plan.target.name}: {plan.mesh.size} devices, {sizes}")
    print(
        f"longest case: {lengths.shared_prefix} tokens of instructions (assumed) shared by all rows, "
        f"{lengths.group_prefix} of a chunk shared by\na group's rows, {lengths.view} of memory and {lengths.response} "
        f"of response for each row; {plan.groups} groups of {config.rollout.group_size} rows\na training step, "
        f"{config.train.groups_per_microbatch} at once; attention: {plan.attention}; remat: {config.model.remat}"
    )
    names = [_ROLES[program.name].format(config.sampler.steps_per_call) for program in plan.programs]
    print_table("memory per device, GiB, while running …", ("", *names), _memory_rows(plan))
    print_table("per device and run; each time is a lower bound", ("", *names), _cost_rows(plan))
    for line in _verdict(plan):
        print(line)


def _memory_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    names = dict.fromkeys(name for program in plan.programs for name in program.memory)
    for name in sorted(names, key="temporaries".__eq__):
        yield (name, *(f"{p.memory[name] / GIB:.2f}" if name in p.memory else "" for p in plan.programs))
    yield ("total", *(f"{p.total / GIB:.2f}" for p in plan.programs))
    limit = plan.target.hbm_bytes
    yield (f"free of {limit / GIB:.2f}", *(f"{(limit - p.total) / GIB:.2f}" for p in plan.programs))


def _cost_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    def row(title: str, form: str, values: Iterable[float]) -> tuple[str, ...]:
        return (title, *(form.format(value) for value in values))

    programs, chip = plan.programs, plan.target.chip
    yield row("runs a training step", "{:g}", [p.runs for p in programs])
    yield row("TFLOPs", "{:.4g}", [p.flops / 1e12 for p in programs])
    yield row("HBM, at least, GB", "{:.3g}", [p.hbm_bytes / 1e9 for p in programs])
    for kind in sorted({kind for p in programs for kind, sent in p.sent.items() if sent}):
        yield row(f"sent by {kind}, GB", "{:.3g}", [p.sent.get(kind, 0) / 1e9 for p in programs])
    yield row("largest collective, GB", "{:.2g}", [p.largest_collective / 1e9 for p in programs])
    if chip:
        for name in ("compute", "HBM", "links"):
            yield row(f"{name}, s", "{:.3g}", [p.seconds(chip)[name.lower()] for p in programs])
        yield row("all runs of a step, s", "{:.3g}", [p.runs * p.roofline(chip) for p in programs])


def _verdict(plan: Plan) -> Iterator[str]:
    for program in plan.programs:
        if program.problem:
            yield f"{program.name} was refused by the compiler: {program.problem}"
    update, sampling, mfu = plan.update_seconds(), plan.sampling_seconds(), plan.mfu()
    if update is not None and sampling is not None and mfu is not None:
        yield (
            "times are rooflines: the slowest of compute, HBM and links at their published peaks "
            f"({plan.target.chip.source})"  # type: ignore[union-attr]
        )
        yield f"a training step's update takes at least {update:.1f} s, so its MFU is at most {mfu:.0%}"
        yield f"its responses, all of full length, take at least {sampling:.0f} s; the reader's answers are not planned"
    if plan.fits:
        share = plan.margin / plan.target.hbm_bytes
        yield f"fits: {plan.margin / GIB:.2f} GiB ({share:.0%}) of each device's memory stay free at the worst moment"
    else:
        yield (
            "does not fit: try more devices, mesh.tensor, model.remat='full', lora.rank, or smaller "
            "train.groups_per_microbatch, sampler.num_slots, manager.chunk_tokens or memory.view_tokens"
        )


def record(plan: Plan) -> dict[str, Any]:
    """Returns the plan as plain values: bytes, FLOPs and seconds, per device."""
    chip = plan.target.chip
    return {
        "experiment": plan.config.experiment,
        "topology": plan.target.name,
        "mesh": dict(plan.mesh.shape),
        "chip": chip and dataclasses.asdict(chip),
        "hbm_bytes": plan.target.hbm_bytes,
        "attention": plan.attention,
        "lengths": dataclasses.asdict(plan.lengths),
        "groups": plan.groups,
        "useful_flops": plan.useful_flops,
        "update_seconds": plan.update_seconds(),
        "sampling_seconds": plan.sampling_seconds(),
        "mfu": plan.mfu(),
        "margin_bytes": plan.margin,
        "fits": plan.fits,
        "programs": [
            {**dataclasses.asdict(p), "total_bytes": p.total, "seconds": p.seconds(chip) if chip else None}
            for p in plan.programs
        ],
    }
