"""--mode=evaluate: methods on benchmarks, in tables with standard errors, beside what papers report.

What is found out about a stream stands on file at once, one line for each method and stream. So a run that was stopped
goes on where it was, and several processes can share one (`evaluate.shard`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from finemem_jax import build as build_lib
from finemem_jax import config as config_lib
from finemem_jax import input_pipeline
from finemem_jax.build import Components
from finemem_jax.config import checks
from finemem_jax.config.sections import Config
from finemem_jax.evaluation import baselines, evaluate, published_results
from finemem_jax.evaluation import tables as tables_lib
from finemem_jax.evaluation.baselines import Method, Result
from finemem_jax.input_pipeline import Mixture
from finemem_jax.memory import build
from finemem_jax.models import lora
from finemem_jax.reading.reader import Query
from finemem_jax.rl import records
from finemem_jax.rl.method import rollout_options
from finemem_jax.runtime import checkpoint, files
from finemem_jax.runtime.display import Display, print_table

# What `evaluate.methods` can name.
METHODS = {
    "none": "the reader alone, without any memory",
    "long_context": "the last tokens of the stream in the reader's prompt",
    "rag": "the chunks as they are, of which each question retrieves some",
    "verbatim": "every sentence as a memory item",
    "recurrent": "one text, rewritten by the starting weights after every chunk",
    "untrained": "the memory manager with its starting weights",
    "mem_alpha": "the same with Mem-α's memory: core, semantic, episodic; 20 items of each retrieved",
    "checkpoint": "the memory manager as it was trained in this workdir",
}  # fmt: skip
_MANAGERS = ("untrained", "mem_alpha", "checkpoint")
_MEM_ALPHA: dict[str, Any] = {
    "layout": "typed", "view_items": 5, "core_tokens": 512, "retrieval": "okapi", "top_k": 20,
}  # fmt: skip
# Chunks that "rag" retrieves for a question, as Mem-alpha's does.
_RAG_TOP_K = 2
# Draws of the bootstrap that compares methods.
_RESAMPLES = 10_000
# What else decides a line; settings that do not may change between two runs in a workdir.
_DECIDING = ("data", "memory", "manager", "reader", "judge", "model", "evaluate")
_NOT_DECIDING = ("evaluate.methods", "evaluate.sources", "evaluate.data", "evaluate.shard", "evaluate.batch",
                 "data.num_train", "data.num_test", "data.name", "data.test_name", "data.weights",
                 "reader.num_slots")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The streams of one builder."""

    name: str
    streams: Mixture


def check(config: Config, workdir: pathlib.Path) -> None:
    """Refuses settings that cannot work, before anything is loaded.

    Raises:
        ValueError: naming the setting.
    """
    unknown = [name for name in _names(config.evaluate.methods) if name not in METHODS]
    if unknown or not config.evaluate.methods:
        described = "\n  ".join(f"{name:<13} {what}" for name, what in METHODS.items())
        got = ", ".join(unknown) or "none"
        raise ValueError(f"evaluate.methods must name some of these, comma-separated; got {got}:\n  {described}")
    if "checkpoint" in _names(config.evaluate.methods) and checkpoint.newest(workdir) is None:
        raise ValueError(
            f"--workdir={workdir} holds no checkpoint to evaluate; train first, or leave the checkpoint out of "
            f"evaluate.methods={config.evaluate.methods!r}."
        )
    _shard(config)


def data_config(config: Config) -> Config:
    """The config whose held-out streams are the benchmarks': `evaluate` says what differs from `data`."""
    return dataclasses.replace(config, data=checks.benchmark_data(config))


def benchmarks(config: Config) -> list[Benchmark]:
    """The benchmarks that a config asks for, builder by builder.

    Raises:
        ValueError: a builder refuses; what it says names the remedy.
    """
    settings = data_config(config)
    found = []
    for name in input_pipeline.names_of(settings, "test"):
        of_one = dataclasses.replace(settings, data=dataclasses.replace(settings.data, test_name=name))
        mixture = input_pipeline.load_split(of_one, "test", part=config.evaluate.split)
        if not len(mixture):
            raise ValueError(f"{name} has no streams of the split {config.evaluate.split!r} (evaluate.split).")
        found.append(Benchmark(name, mixture))
    return found


def run(config: Config, workdir: pathlib.Path, parts: Components, found: Sequence[Benchmark]) -> list[str]:
    """Plays what is not on file yet, and writes `benchmark.json` and `benchmark.md`; returns what to say in the end."""
    with Display(0) as display:
        settings = data_config(config)
        # So that seconds are of playing. What the long prompts of some methods need is compiled when they come.
        build_lib.warm_up(config, parts, display.phase)
        for name in _names(config.evaluate.methods):
            method, step = _method(config, workdir, parts, name, display)
            labels = {"method": name, "decided": _decided(settings, name, step), "step": step}
            _play_all(config, workdir, parts, method, labels, found, display)
    return report(config, workdir, found)


def _play_all(config: Config, workdir, parts, method, labels, found, display):
    """Plays all streams that are this shard's and not on file, of all benchmarks together: so slots stay full."""
    index, count = _shard(config)
    name, decided = labels["method"], labels["decided"]
    known = {
        (line["benchmark"], line["stream_id"])
        for line in read(workdir)
        if (line["method"], line["decided"]) == (name, decided)
    }
    todo = [
        (benchmark.name, stream)
        for benchmark in found
        for i, stream in enumerate(benchmark.streams)
        if i % count == index and (benchmark.name, stream.stream_id) not in known
    ]
    path = workdir / "benchmark" / f"{name}.{index}of{count}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    size = config.evaluate.batch
    for start in range(0, len(todo), size):
        batch = todo[start : start + size]
        display.phase(f"{name}: streams {start + 1} to {start + len(batch)} of {len(todo)}")
        began = time.monotonic()
        played = method([parts.environment.fit(stream) for _, stream in batch])
        seconds = (time.monotonic() - began) / len(batch)
        lines = [
            labels | {"benchmark": benchmark} | _line(one, seconds)
            for (benchmark, _), one in zip(batch, played, strict=True)
        ]
        _append(path, lines)
        scores = [score for line in lines for score in line["scores"] if score is not None]
        mean = f"{sum(scores) / len(scores):.3f}" if scores else "–"
        shown = f"{name}: {start + len(batch)} of {len(todo)} streams, {seconds:.1f} s each"
        display.say(f"{shown}, mean over questions {mean}")


def _append(path, lines):
    """Adds lines to a file; a line that a kill cut short is ended first, so that it spoils no other."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def _line(played: Result, seconds: float) -> dict[str, Any]:
    stream = played.stream
    return {
        "source": stream.source,
        "competency": stream.competency,
        "stream_id": stream.stream_id,
        "chunks": len(stream.chunks),
        "scores": [answer.score for answer in played.answers],
        "chunk_scores": [[answer.score for answer in chunk] for chunk in played.chunk_answers],
        "memory_tokens": played.memory_tokens,
        "operations": played.operations,
        "valid_operations": played.valid_operations,
        "reader_calls": played.reader_calls,
        "seconds": seconds,
        "answers": [records.answer_record(answer) for answer in played.answers],
    }


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """All lines that stand on file; a line that a kill cut short is left out, and the newest of equals counts."""
    found: dict[tuple, dict[str, Any]] = {}
    for path in sorted((workdir / "benchmark").glob("*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                line = json.loads(text)
                found[line["method"], line["decided"], line["benchmark"], line["stream_id"]] = line
    return list(found.values())


def report(config: Config, workdir: pathlib.Path, found: Sequence[Benchmark]) -> list[str]:
    """Writes `benchmark.json` and `benchmark.md` of what stands on file for this config; returns lines to print."""
    settings, names = data_config(config), _names(config.evaluate.methods)
    steps = {name: _step_of(config, workdir, name) for name in names}
    wanted = {name: _decided(settings, name, steps[name]) for name in names}
    order = {name: place for place, name in enumerate([*names, *(one.name for one in found)])}
    lines = [
        line for line in read(workdir) if wanted.get(line["method"]) == line["decided"] and line["benchmark"] in order
    ]
    ids = {one.name: {stream.stream_id for stream in one.streams} for one in found}
    lines = [line for line in lines if line["stream_id"] in ids[line["benchmark"]]]
    lines.sort(key=lambda line: (order[line["method"]], order[line["benchmark"]], line["source"], line["stream_id"]))
    missing = len(names) * sum(map(len, ids.values())) - len(lines)
    undecided = sum(score is None for line in lines for score in line["scores"])
    builders = [one.name for one in found]
    tables = [tables_lib.score_table(lines, builders), tables_lib.cost_table(lines)]
    compared = tables_lib.comparisons(lines, _RESAMPLES)
    notes = [
        "± is one standard error over streams (over questions, of a source with one stream); the average weighs "
        "sources equally. Differences are paired by stream: 95 % and p by bootstrap.",
        *(published_results.NOTES[name] for name in builders if name in published_results.NOTES),
    ]
    if missing:
        notes.append(f"{missing} streams are still to be played: by other shards, or by the same command again.")
    if undecided:
        notes.append(f"{undecided} answers have no score, as the judge came to no verdict; they are left out.")
    summary = {
        "experiment": config.experiment,
        "steps": steps,
        "scores": {m: {s: dataclasses.asdict(e) for s, e in of.items()} for m, of in tables_lib.scores(lines).items()},
        "chunk_scores": {
            m: {s: dataclasses.asdict(e) for s, e in of.items()}
            for m, of in tables_lib.scores(lines, "chunk_scores").items()
        },
        "costs": tables_lib.costs(lines),
        "comparisons": [
            {"method": method, "other": other} | dataclasses.asdict(one) for (method, other), one in compared.items()
        ],
        "missing_streams": missing,
        "undecided_answers": undecided,
    }
    tables_of_all = [*tables, tables_lib.comparison_table(compared)] if compared else tables
    summary |= {"tables": [{"header": header, "rows": rows} for header, rows in tables_of_all], "notes": notes}
    files.replace_text(workdir / "benchmark.json", json.dumps(summary, indent=1) + "\n")
    text = f"# {config.experiment or 'Evaluation'}\n\n"
    text += "\n".join(tables_lib.markdown(*table) for table in tables_of_all) + "\n" + "\n\n".join(notes) + "\n"
    files.replace_text(workdir / "benchmark.md", text)
    # Of many methods there are too many pairs for a screen: the last one is compared, the others stand in the files.
    last = {pair: one for pair, one in compared.items() if pair[0] == names[-1]}
    for header, rows in [*tables, tables_lib.comparison_table(last)] if last else tables:
        print_table("", header, rows)
    return [*notes, f"tables         {workdir}/benchmark.md, {workdir}/benchmark.json; answers in {workdir}/benchmark/"]


# --------------------------------------------------------------------------------------
# Methods by name
# --------------------------------------------------------------------------------------


def _method(
    config: Config, workdir: pathlib.Path, parts: Components, name: str, display: Display
) -> tuple[Method, int]:
    """A method, and after how many training steps its weights are."""
    asked = config.evaluate
    if name in _MANAGERS:
        return _manager(config, workdir, parts, name, display)
    keep: dict[str, Callable[[], baselines.KeepFn]] = {
        "none": lambda: baselines.nothing,
        "long_context": lambda: baselines.last_tokens(parts.environment, _context_tokens(config, parts)),
        "rag": lambda: baselines.chunks(config.memory.retrieval, _RAG_TOP_K, parts.embed),
        "verbatim": lambda: baselines.sentences(config.memory.retrieval, config.memory.top_k, parts.embed),
        "recurrent": lambda: baselines.summaries(
            parts.answering.models.model("evaluate"), asked.summary_tokens, asked.summary_system
        ),
    }
    return baselines.baseline(keep[name](), parts.environment, parts.answering.answer, parts.answering.answer_judge), 0


def _manager(
    config: Config, workdir: pathlib.Path, parts: Components, name: str, display: Display
) -> tuple[Method, int]:
    environment = parts.environment
    options = rollout_options(config, evaluation=True, constraint=parts.constraint)
    display.phase(f"{name}: loading its weights")
    if name == "checkpoint":
        step = build_lib.use_checkpoint(parts, workdir)
    else:
        step = 0
        parts.manager.update(lora.merge(parts.model, parts.params), step)
    if name == "mem_alpha":
        changed = dataclasses.replace(config, memory=dataclasses.replace(config.memory, **_MEM_ALPHA))
        environment = build.environment(changed, parts.tokenizer)
        retrieval, top_k = changed.memory.retrieval, changed.memory.top_k
        options = dataclasses.replace(options, retrieval=retrieval, top_k=top_k, constraint=None)
    roll_out = functools.partial(
        evaluate.run,
        options=options,
        players=dataclasses.replace(parts.players, environment=environment),
        key=(config.seed, "evaluate"),
    )
    return baselines.manager(roll_out, environment), step


def _step_of(config: Config, workdir: pathlib.Path, name: str) -> int:
    return (checkpoint.newest(workdir) or 0) if name == "checkpoint" else 0


def _context_tokens(config: Config, parts: Components) -> int:
    """As many as asked for, if the reader in this process can take them beside instructions, question and answer."""
    if config.reader.kind != "model":
        return config.evaluate.context_tokens
    instructions = len(parts.answering.prompt(Query("", ())).ids)
    most = parts.model.max_length - instructions - config.reader.max_new_tokens - 512
    return min(config.evaluate.context_tokens, most)


def _decided(config: Config, method: str, step: int) -> str:
    """A short name of all that decides what a method makes of a stream."""
    settings = config_lib.flatten(config)
    deciding = {
        name: value
        for name, value in settings.items()
        if name.split(".")[0] in _DECIDING and name not in _NOT_DECIDING and not name.endswith(".server")
    }
    deciding |= {"seed": config.seed, "max_new_tokens": config.rollout.max_new_tokens, "method": method, "step": step}
    for who, role in {"reader": config.reader, "judge": config.judge}.items():
        deciding[f"{who}.model"] = config.servers[role.server].model if role.kind == "server" else ""
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


def _shard(config: Config) -> tuple[int, int]:
    index, slash, count = config.evaluate.shard.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(
            f"evaluate.shard must be I/N with I from 0 to N - 1, e.g. 0/4 for the first of four processes; got "
            f"{config.evaluate.shard!r}."
        )
    return int(index), int(count)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
