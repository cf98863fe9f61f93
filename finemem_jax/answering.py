"""From a config to who answers questions and who judges: the frozen model in this process, servers, and their file.

All of them are language models, chats in and replies out (`reader.LanguageModel`), and readers and judges only differ
in what they ask. What one of them has said once stands on file (`answers`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from finemem_jax import answers, judges, reader, workers
from finemem_jax import config as config_lib
from finemem_jax.answers import Answers, Cached
from finemem_jax.config import ConfigDict
from finemem_jax.endpoint import Endpoint, EndpointOptions
from finemem_jax.judges import AnswerJudge, ContentJudge, JudgeOptions, Verdicts
from finemem_jax.likelihood import Likelihoods
from finemem_jax.models.decoder import Params
from finemem_jax.reader import LanguageModel, LikelihoodReader, Query, Reader, ReaderOptions
from finemem_jax.sampler import Sampler, SamplerStats
from finemem_jax.tokenizer import EncodedChat, Tokenizer

# Which rules ask for a content judge, and which for citations (`rules.Rule.needs`).
_CONTENT, _CITATIONS = "content", "citations"
# Part of the frozen model's name on file; to be raised when the same model comes to say something else.
_GENERATION = "finemem_jax 1"


@dataclasses.dataclass(frozen=True)
class Local:
    """The frozen model in this process.

    Attributes:
        sampler: Makes a sampler of it; called at most once.
        name: Gives what tells it from all others, so that what is on file is what it would say.
    """

    sampler: Callable[[], Sampler]
    tokens: Tokenizer
    max_length: int
    name: Callable[[], str]


class Answering:
    """All who are asked in a run. `close` it when the run is over.

    Attributes:
        answer: The reader.
        judge: Judges what was written; None where the credit rule does not ask.
        mark: Judges answers; None where nobody can (`reader.kind="evidence"` with `judge.kind="reader"`).
        likely: Computes likelihoods; None where they are not used.
        sampler: Generates in this process; None where nothing is.
    """

    def __init__(self, config: ConfigDict, local: Local, needs: frozenset[str], workdir: pathlib.Path | None):
        """Args:
        needs: What the credit rule must have measured.
        workdir: Where `answers.file="auto"` is; None for no such file.

        Raises:
            ValueError: servers or files that cannot be as they are named.
        """
        self._config, self._local = config, local
        self.sampler: Sampler | None = None
        self._likelihoods: Likelihoods | None = None
        self._file = _open(config, workdir)
        self._endpoints: dict[str, Endpoint] = {}
        self._cached: list[Cached] = []
        self._models: dict[str, workers.Shared] = {}
        self._verdicts: list[Verdicts] = []
        cite = _CITATIONS in needs and config.credit.cited_by == "reader"
        self.reader_options = ReaderOptions(
            config.reader.max_new_tokens, config.reader.temperature, config.reader.num_examples, cite,
            config.prompts.reader,
        )  # fmt: skip
        if config.reader.kind == "evidence":
            self.answer: Reader = workers.Batched(reader.evidence(cite))
        else:
            self.answer = reader.language_model(self.model("reader", config.reader.kind), self.reader_options)
        judge = config.reader.kind if config.judge.kind == "reader" else config.judge.kind
        self.judge: ContentJudge | None = None
        self.mark: AnswerJudge | None = None
        if judge != "evidence":
            # Whoever reads may judge as well, over the same connections.
            name = "reader" if config.judge.kind == "reader" else "judge"
            asked = JudgeOptions(config.judge.max_new_tokens, config.judge.temperature, config.judge.tries)
            answers_asked = dataclasses.replace(asked, system=config.prompts.answer_judge)
            self._verdicts.append(judges.answer_judge(self.model(name, judge), answers_asked))
            self.mark = self._verdicts[-1]
            if _CONTENT in needs:
                contents_asked = dataclasses.replace(asked, system=config.prompts.content_judge)
                self._verdicts.append(judges.content_judge(self.model(name, judge), contents_asked))
                self.judge = self._verdicts[-1]
        elif _CONTENT in needs:
            raise ValueError(
                f"credit.rule={config.credit.rule!r} needs a judge of contents, and reader.kind='evidence' is none; "
                "set judge.kind to 'model' or 'endpoint'."
            )
        self.likely: LikelihoodReader | None = None
        if config.likelihood.chunk_share or config.likelihood.final_chunk_share or config.likelihood.probes:
            self._likelihoods = Likelihoods(
                self._sampler().engine, local.tokens, self.prompt, config.likelihood.batch_tokens, local.max_length
            )
            self.likely = self._likelihoods.once()

    def model(self, name: str, kind: str) -> LanguageModel:
        """A language model: one more user of the frozen one ("model"), or of the servers ("endpoint") called `name`."""
        key = "model" if kind == "model" else name
        if key not in self._models:
            self._models[key] = workers.Shared(self._in_process() if kind == "model" else self._servers(name))
        return self._models[key].port()

    def prompt(self, query: Query) -> EncodedChat:
        """What the frozen model is asked, in its tokens."""
        return reader.encode(self._local.tokens, reader.chat(query, self.reader_options))

    def warm_up(self, trunk: int, positions: int, say: Callable[[str], None]) -> None:
        """Compiles what is generated and computed with in this process.

        Args:
            trunk: Tokens of the longest trunk; as long as the manager's, programs are shared with it.
            positions: Tokens beyond it, new ones included.
            say: Shows a line about it, in place of the last one.
        """

        def progress(line, done, total):
            say(f"{line}: {done} of {total} programs")

        if "model" in self._models and self.sampler is not None:
            line = "compiling what the reader generates with"
            self.sampler.warm_up(trunk, positions, functools.partial(progress, line))
        if self._likelihoods is not None:
            line = "compiling what likelihoods are computed with"
            own = self.prompt(Query("", ())).cuts[0]
            self._likelihoods.warm_up(max(own, trunk), positions, functools.partial(progress, line))

    def take_stats(self) -> SamplerStats:
        """What was generated in this process since the last call."""
        return SamplerStats() if self.sampler is None else self.sampler.take_stats()

    def take_metrics(self) -> dict[str, float]:
        """What asking has cost since the last call, beside `take_stats`; only of what is there."""
        found: dict[str, float] = {}
        if self._cached:
            hits, misses = (sum(getattr(one, name) for one in self._cached) for name in ("hits", "misses"))
            for one in self._cached:
                one.hits = one.misses = 0
            found["answers/on_file_fraction"] = hits / max(hits + misses, 1)
        for name, endpoint in self._endpoints.items():
            stats = endpoint.take_stats()
            if name == "reader":
                # In place of those that this process answered, which are none.
                found["reader/questions_asked"] = float(stats.answered)
            found |= {
                f"{name}/servers_answered": float(stats.answered),
                f"{name}/servers_failed": float(sum(stats.faults.values())),
                f"{name}/servers_seconds_per_answer": stats.call_seconds / max(stats.answered, 1),
                f"{name}/servers_prompt_tokens": float(stats.prompt_tokens),
                f"{name}/servers_new_tokens": float(stats.new_tokens),
            }
        if self._verdicts:
            for name in ("retried", "undecided"):
                found[f"judge/{name}"] = float(sum(getattr(one, name) for one in self._verdicts))
            for one in self._verdicts:
                one.retried = one.undecided = 0
        if self._likelihoods is not None:
            stats = self._likelihoods.take_stats()
            found |= {"likelihood/claims": float(stats.claims), "time/likelihood_seconds": stats.seconds}
        return found

    def close(self) -> None:
        """Ends what is being asked, and closes the file."""
        for endpoint in self._endpoints.values():
            endpoint.close()
        if self._file is not None:
            self._file.close()

    # ---------------------------------------------------------------------------------- language models

    def _sampler(self):
        if self.sampler is None:
            self.sampler = self._local.sampler()
        return self.sampler

    def _in_process(self):
        model = reader.in_process(self._sampler(), self._local.tokens, self._config.seed)
        name = f"{self._local.name()} {self._config.seed}" if self._file is not None else ""
        return self._on_file(model, name, stores=True)

    def _servers(self, name):
        options = endpoint_options(self._config[name].endpoint, name)
        # What else may stand in a request decides what is replied; where it goes does not.
        known_as = json.dumps([options.model, dict(options.extra)], sort_keys=True)
        keep = functools.partial(answers.keep, self._file, known_as) if self._file is not None else None
        self._endpoints[name] = Endpoint(options, keep)
        return self._on_file(self._endpoints[name], known_as, stores=False)

    def _on_file(self, model, name, stores):
        if self._file is None:
            return model
        self._cached.append(Cached(model, self._file, name, stores))
        return self._cached[-1]


def endpoint_options(endpoint: ConfigDict, name: str) -> EndpointOptions:
    """The servers that the settings of an endpoint called `name` describe.

    Raises:
        ValueError: a URL or a field that cannot be; the message says which.
    """
    plain = ("model", "key_variable", "concurrency", "requests_per_minute", "tokens_per_minute", "call_seconds",
             "total_seconds", "keep_alive")  # fmt: skip
    try:
        return EndpointOptions(
            urls=tuple(url.strip() for url in endpoint.urls.split(",") if url.strip()),
            extra=config_lib.extra_fields(endpoint, name),
            **{field: endpoint[field] for field in plain},
        )
    except ValueError as error:
        raise ValueError(f"{name}.endpoint.urls: {error}") from error


def chunk_share(config: ConfigDict, step: int) -> float:
    """How much of the chunk reward is likelihood at a training step (counted from 0)."""
    first, last, steps = (config.likelihood[name] for name in ("chunk_share", "final_chunk_share", "anneal_steps"))
    return first + (last - first) * min(step / steps, 1.0) if steps else first


def local_name(config: ConfigDict, params: Params) -> str:
    """Tells a model and how it is computed from all others; of the parameters, by a checksum."""
    sums = jax.jit(lambda params: jax.tree.map(_sum_of_bits, params))(params)
    leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(sums), strict=True)
    described = [
        (jax.tree_util.keystr(path), leaf.shape, leaf.dtype.name, int(total)) for (path, leaf), total in leaves
    ]
    digest = hashlib.blake2b(repr(described).encode(), digest_size=12).hexdigest()
    settings = [config.sampler.dtype, config.sampler.int8, config.model.thinking, config.model.tokenizer]
    return json.dumps([_GENERATION, digest, *settings])


def _sum_of_bits(leaf):
    """A sum modulo 2^32 that changes with every bit, and with nearly every exchange of elements."""
    unsigned = {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    weights = jnp.uint32(1)
    for axis, size in enumerate(leaf.shape):
        # Odd, and other ones along every axis.
        own = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(2 * (0x9E3779B1 * (axis + 1) % 2**30)) + 1
        weights = weights * jax.lax.expand_dims(own, [other for other in range(leaf.ndim) if other != axis])
    return (bits * weights).sum(dtype=jnp.uint32)


def _open(config, workdir):
    name = config.answers.file
    if not name or (name == "auto" and workdir is None):
        return None
    path = workdir / "answers.sqlite" if name == "auto" else pathlib.Path(name).expanduser()
    return Answers(path, config.answers.max_megabytes * 10**6)
