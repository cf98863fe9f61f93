"""Evaluates methods on benchmarks (--mode=evaluate), in tables with standard errors beside published results.

Results are appended to `benchmark/*.jsonl` batch by batch, one line for each method and stream. So a run that was
stopped goes on where it was, and several processes can share one (`evaluate.shard`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from finemem_jax import build as build_lib
from finemem_jax import config as config_lib
from finemem_jax import input_pipeline
from finemem_jax.build import Components
from finemem_jax.config import checks
from finemem_jax.config.sections import Config
from finemem_jax.evaluation import baselines, published_results
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
from finemem_jax.types import Stream

# The methods that `evaluate.methods` can name.
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
# Sections that decide a result, and those of their settings that do not. The latter may change between two runs in a
# workdir; a change of any other makes streams be played again.
_DECIDING = ("data", "memory", "manager", "reader", "judge", "model", "evaluate")
_NOT_DECIDING = ("evaluate.methods", "evaluate.sources", "evaluate.data", "evaluate.shard", "evaluate.batch",
                 "data.num_train", "data.num_test", "data.name", "data.test_name", "data.weights",
                 "reader.num_slots")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Holds the streams of one builder."""

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
    """Returns the config whose held-out streams are the benchmarks': `evaluate` says what differs from `data`."""
    return dataclasses.replace(config, data=checks.benchmark_data(config))


def load(config: Config) -> list[Benchmark]:
    """Loads the benchmarks that a config asks for, builder by builder.

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


def run(config: Config, workdir: pathlib.Path, components: Components, *, benchmarks: Sequence[Benchmark]) -> list[str]:
    """Plays what is not on file yet, writes `benchmark.json` and `benchmark.md`, and returns lines to print."""
    with Display(0) as display:
        # So that seconds are of playing. What the long prompts of some methods need is compiled when they come.
        build_lib.warm_up(config, components, display.phase)
        for name in _names(config.evaluate.methods):
            if name in _MANAGERS:
                display.phase(f"{name}: loading its weights")
            method = _method(name, config, components, workdir=workdir)
            job = _job(name, config, workdir, benchmarks=benchmarks)
            _play(method, job, config.evaluate.batch, fit=components.environment.fit, display=display)
    return report(config, workdir, benchmarks)


class _Job(NamedTuple):
    """What this process still has to play of one method.

    Attributes:
        labels: What all lines of the method have in common.
        streams: Each with its benchmark's name.
        path: The file that lines are appended to.
    """

    labels: dict[str, Any]
    streams: list[tuple[str, Stream]]
    path: pathlib.Path


def _job(name: str, config: Config, workdir: pathlib.Path, *, benchmarks: Sequence[Benchmark]) -> _Job:
    index, count = _shard(config)
    step = _step(name, workdir)
    decided = _decided(data_config(config), name, step)
    known = {
        (line["benchmark"], line["stream_id"])
        for line in read(workdir)
        if (line["method"], line["decided"]) == (name, decided)
    }
    streams = [
        (benchmark.name, stream)
        for benchmark in benchmarks
        for i, stream in enumerate(benchmark.streams)
        if i % count == index and (benchmark.name, stream.stream_id) not in known
    ]
    path = workdir / "benchmark" / f"{name}.{index}of{count}.jsonl"
    return _Job({"method": name, "decided": decided, "step": step}, streams, path)


def _play(method: Method, job: _Job, size: int, *, fit: Callable[[Stream], Stream], display: Display) -> None:
    """Plays the streams of all benchmarks together, `size` at a time, so that slots stay full."""
    job.path.parent.mkdir(parents=True, exist_ok=True)
    name, total = job.labels["method"], len(job.streams)
    for start in range(0, total, size):
        batch = job.streams[start : start + size]
        end = start + len(batch)
        display.phase(f"{name}: streams {start + 1} to {end} of {total}")
        began = time.monotonic()
        results = method([fit(stream) for _, stream in batch])
        seconds = (time.monotonic() - began) / len(batch)
        lines: list[dict[str, Any]] = [
            job.labels | {"benchmark": benchmark} | _line(result, seconds)
            for (benchmark, _), result in zip(batch, results, strict=True)
        ]
        _append(job.path, lines)
        scores = [score for line in lines for score in line["scores"] if score is not None]
        mean = f"{sum(scores) / len(scores):.3f}" if scores else "–"
        display.say(f"{name}: {end} of {total} streams, {seconds:.1f} s each, mean over questions {mean}")


def _append(path: pathlib.Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Adds lines to a file. A last line that a kill cut short is ended first, so that it spoils no other."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def _line(result: Result, seconds: float) -> dict[str, Any]:
    stream = result.stream
    return {
        "source": stream.source,
        "competency": stream.competency,
        "stream_id": stream.stream_id,
        "chunks": len(stream.chunks),
        "scores": [answer.score for answer in result.answers],
        "chunk_scores": [[answer.score for answer in chunk] for chunk in result.chunk_answers],
        "memory_tokens": result.memory_tokens,
        "operations": result.operations,
        "valid_operations": result.valid_operations,
        "reader_calls": result.reader_calls,
        "seconds": seconds,
        "answers": [records.answer_record(answer) for answer in result.answers],
    }


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Reads all lines on file; one that a kill cut short is left out, and the newest of equals counts."""
    found: dict[tuple, dict[str, Any]] = {}
    for path in sorted((workdir / "benchmark").glob("*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                line = json.loads(text)
                found[line["method"], line["decided"], line["benchmark"], line["stream_id"]] = line
    return list(found.values())


def report(config: Config, workdir: pathlib.Path, benchmarks: Sequence[Benchmark]) -> list[str]:
    """Writes `benchmark.json` and `benchmark.md` of what is on file for this config, and returns lines to print."""
    names, builders = _names(config.evaluate.methods), [benchmark.name for benchmark in benchmarks]
    lines, missing = _lines(config, workdir, benchmarks)
    undecided = sum(score is None for line in lines for score in line["scores"])
    notes = [
        "± is one standard error over streams (over questions, of a source with one stream); the average weighs "
        "sources equally. Differences are paired by stream: 95 % and p by bootstrap.",
        *(published_results.NOTES[name] for name in builders if name in published_results.NOTES),
    ]
    if missing:
        notes.append(f"{missing} streams are still to be played: by other shards, or by the same command again.")
    if undecided:
        notes.append(f"{undecided} answers have no score, as the judge came to no verdict; they are left out.")
    compared = tables_lib.comparisons(lines, _RESAMPLES)
    tables = [tables_lib.score_table(lines, builders), tables_lib.cost_table(lines)]
    tables_on_file = [*tables, tables_lib.comparison_table(compared)] if compared else tables
    summary = {
        "experiment": config.experiment,
        "steps": {name: _step(name, workdir) for name in names},
        **{
            kind: {
                method: {source: dataclasses.asdict(estimate) for source, estimate in of_method.items()}
                for method, of_method in tables_lib.scores(lines, kind).items()
            }
            for kind in ("scores", "chunk_scores")
        },
        "costs": tables_lib.costs(lines),
        "comparisons": [
            {"method": method, "other": other} | dataclasses.asdict(one) for (method, other), one in compared.items()
        ],
        "missing_streams": missing,
        "undecided_answers": undecided,
        "tables": [{"header": header, "rows": rows} for header, rows in tables_on_file],
        "notes": notes,
    }
    files.replace_text(workdir / "benchmark.json", json.dumps(summary, indent=1) + "\n")
    text = f"# {config.experiment or 'Evaluation'}\n\n"
    text += "\n".join(tables_lib.markdown(*table) for table in tables_on_file) + "\n" + "\n\n".join(notes) + "\n"
    files.replace_text(workdir / "benchmark.md", text)
    # Many methods have too many pairs for a screen: the last one is compared, the others stand in the files.
    last = {pair: one for pair, one in compared.items() if pair[0] == names[-1]}
    for header, rows in [*tables, tables_lib.comparison_table(last)] if last else tables:
        print_table("", header, rows)
    return [*notes, f"tables         {workdir}/benchmark.md, {workdir}/benchmark.json; answers in {workdir}/benchmark/"]


def _lines(config: Config, workdir: pathlib.Path, benchmarks: Sequence[Benchmark]) -> tuple[list[dict[str, Any]], int]:
    """Returns the lines of this config in the order of its methods and benchmarks, and how many are missing."""
    settings, names = data_config(config), _names(config.evaluate.methods)
    decided = {name: _decided(settings, name, _step(name, workdir)) for name in names}
    ids = {benchmark.name: {stream.stream_id for stream in benchmark.streams} for benchmark in benchmarks}
    order = {name: place for place, name in enumerate([*names, *ids])}
    lines = [
        line
        for line in read(workdir)
        if decided.get(line["method"]) == line["decided"] and line["stream_id"] in ids.get(line["benchmark"], ())
    ]
    lines.sort(key=lambda line: (order[line["method"]], order[line["benchmark"]], line["source"], line["stream_id"]))
    return lines, len(names) * sum(map(len, ids.values())) - len(lines)


# --------------------------------------------------------------------------------------
# Methods by name
# --------------------------------------------------------------------------------------


def _method(name: str, config: Config, components: Components, *, workdir: pathlib.Path) -> Method:
    if name in _MANAGERS:
        return _manager(name, config, components, workdir=workdir)
    memory, asked, embed = config.memory, config.evaluate, components.embed
    makers: dict[str, Callable[[], baselines.Baseline]] = {
        "none": lambda: baselines.nothing,
        "long_context": lambda: baselines.last_tokens(components.environment, _context_tokens(config, components)),
        "rag": lambda: baselines.chunks(memory.retrieval, _RAG_TOP_K, embed),
        "verbatim": lambda: baselines.sentences(memory.retrieval, memory.top_k, embed),
        "recurrent": lambda: baselines.summaries(
            components.answering.model("evaluate"), asked.summary_tokens, asked.summary_system
        ),
    }
    answering = components.answering
    return baselines.without_manager(
        makers[name](), components.environment, answering.answer, answer_judge=answering.answer_judge
    )


def _manager(name: str, config: Config, components: Components, *, workdir: pathlib.Path) -> Method:
    environment = components.environment
    options = rollout_options(config, evaluation=True, constraint=components.constraint)
    if name == "checkpoint":
        build_lib.use_checkpoint(components, workdir)
    else:
        components.manager.update(lora.merge(components.model, components.params), 0)
    if name == "mem_alpha":
        changed = dataclasses.replace(config, memory=dataclasses.replace(config.memory, **_MEM_ALPHA))
        environment = build.environment(changed, components.tokenizer)
        retrieval, top_k = changed.memory.retrieval, changed.memory.top_k
        options = dataclasses.replace(options, retrieval=retrieval, top_k=top_k, constraint=None)
    players = dataclasses.replace(components.players, environment=environment)
    return baselines.manager(options, players, (config.seed, "evaluate"))


def _step(method: str, workdir: pathlib.Path) -> int:
    """After how many training steps a method's weights are."""
    return (checkpoint.newest(workdir) or 0) if method == "checkpoint" else 0


def _context_tokens(config: Config, components: Components) -> int:
    """As many as asked for, or as the reader in this process takes beside instructions, question and answer."""
    if config.reader.kind != "model":
        return config.evaluate.context_tokens
    instructions = len(components.answering.prompt(Query("", ())).ids)
    most = components.model.max_length - instructions - config.reader.max_new_tokens - 512
    return min(config.evaluate.context_tokens, most)


def _decided(config: Config, method: str, step: int) -> str:
    """A digest of all that decides a method's result for a stream."""
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
