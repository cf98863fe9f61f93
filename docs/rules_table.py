"""Lays a sweep of credit rules out as the table of the notes on rules, from its trajectories and metrics alone.

python -m finemem_jax.main --config=experiments/ablations.py:smoke,steps=30 --workdir=DIR --mode=sweep
python docs/rules_table.py DIR
"""

import gzip
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

REFERENCE = "credit=full"


def rollouts(member: pathlib.Path, step: int) -> list[dict]:
    """Reads every rollout of one training step, counted from 1."""
    with gzip.open(member / "trajectories" / f"step_{step:06d}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def row(member: pathlib.Path, reference: pathlib.Path) -> list[str]:
    """Makes one line of the table.

    Rules are compared with the reference at the first step alone: there all still sampled the same responses.
    """
    metrics = [json.loads(line) for line in (member / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # The largest difference over all rollouts between the credit given to the steps and the global score.
    largest = 0.0
    for step in range(1, len(metrics) + 1):
        for one in rollouts(member, step):
            total = sum(s["rewards"]["credit"] for s in one["steps"])
            largest = max(largest, abs(total - one["outcome"]))

    def change(name: str) -> str:
        """Means of the first and the last third of a run."""
        values = [line[name] for line in metrics]
        third = max(len(values) // 3, 1)
        return f"{np.mean(values[:third]):.3f} → {np.mean(values[-third:]):.3f}"

    def first_step(folder: pathlib.Path, read: Callable[[dict[str, Any]], Any]) -> list[Any]:
        return [read(s) for one in rollouts(folder, 1) for s in one["steps"]]

    agreement = "–"
    sampled, theirs = (first_step(folder, lambda s: s["completion_ids"]) for folder in (member, reference))
    if sampled == theirs:
        own, other = (first_step(folder, lambda s: s["advantage"]) for folder in (member, reference))
        agreement = f"{np.corrcoef(own, other)[0, 1]:.3f}"
    return [
        f"`{member.name.removeprefix('credit=')}`",
        agreement,
        "yes" if largest < 1e-5 else f"no ({largest:.2f})",
        change("operations/valid_fraction"),
        change("reward/chunk"),
        change("reward/outcome"),
        f"{np.mean([line['memory/tokens'] for line in metrics[-5:]]):.0f}",
    ]


def main(folder: pathlib.Path) -> None:
    """Prints the table."""
    listed = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["members"]
    members = [folder / member["name"] for member in listed]
    head = ["rule", "r(A, A of `full`), step 1", "Σ credit = r_global", "valid operations", "chunk score",
            "global score", "memory"]  # fmt: skip
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for member in members:
        print("| " + " | ".join(row(member, folder / REFERENCE)) + " |")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
