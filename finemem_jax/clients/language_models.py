"""From a config to language models, chats in and replies out: the frozen one in this process, servers, and a file.

Who wants replies, readers, judges or a maker of questions, does not see which it is. What a model has said once stands
on file (`reply_cache`), and is not asked again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable

import jax

from finemem_jax.clients import chat, reply_cache
from finemem_jax.clients.chat import LanguageModel
from finemem_jax.clients.endpoint import Endpoint, EndpointOptions
from finemem_jax.clients.reply_cache import Cached, ReplyCache
from finemem_jax.config import checks
from finemem_jax.config.sections import Config, Judge, QuestionModel, Reader
from finemem_jax.models.decoder import Params
from finemem_jax.models.tokenizer import Tokenizer
from finemem_jax.runtime import checksums, workers
from finemem_jax.sampling.sampler import Sampler, SamplerStats

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


class LanguageModels:
    """All that are used in a run. `close` it when the run is over.

    Attributes:
        generates: Whether the frozen model is among them, so that there is something to compile.
    """

    def __init__(self, config: Config, local: Local, workdir: pathlib.Path | None):
        """Args:
        workdir: Where `answers.file="auto"` is; None for no such file.

        Raises:
            ValueError: the file of answers cannot be what it is said to be.
        """
        self._config, self._local = config, local
        self._made: Sampler | None = None
        self._file = _open(config, workdir)
        self._endpoints: dict[str, Endpoint] = {}
        self._cached: list[Cached] = []
        # By the entry of `servers`; None is the frozen model.
        self._models: dict[str | None, workers.Shared] = {}

    def model(self, name: str, role: Reader | Judge | QuestionModel | None = None) -> LanguageModel:
        """A language model: one more user of the frozen one, or of servers.

        Args:
            name: Who asks, as the settings are called: "reader", "judge", ….
            role: Its settings, which say whom it asks; None for the frozen one.

        Raises:
            ValueError: servers that cannot be as they are named.
        """
        server = role.server if role is not None and role.kind == "server" else None
        if server not in self._models:
            asked = self._in_process() if server is None else self._servers(name, server)
            self._models[server] = workers.Shared(asked)
        return self._models[server].port()

    @property
    def generates(self) -> bool:
        return None in self._models

    @property
    def has_sampler(self) -> bool:
        """Whether there is a sampler, for generating or only to compute with its weights."""
        return self._made is not None

    def sampler(self) -> Sampler:
        """The frozen model's; made when it is first wanted."""
        if self._made is None:
            self._made = self._local.sampler()
        return self._made

    def set_poll(self, between: Callable[[], bool | None]) -> None:
        """Has all of them call this function while they work or are waited for; see `Sampler.poll`."""
        for asked in (*self._endpoints.values(), *([self.sampler()] if self.generates else [])):
            asked.poll = between

    def reset(self) -> None:
        """Empties the frozen model's slots; see `Sampler.reset`."""
        if self._made is not None:
            self._made.reset()

    def take_stats(self) -> SamplerStats:
        """What was generated in this process since the last call."""
        return SamplerStats() if self._made is None else self._made.take_stats()

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
        return found

    def close(self) -> None:
        """Ends what is being asked, and closes the file."""
        for endpoint in self._endpoints.values():
            endpoint.close()
        if self._file is not None:
            self._file.close()

    def _in_process(self):
        model = chat.in_process(self.sampler(), self._local.tokens, self._config.seed)
        name = f"{self._local.name()} {self._config.seed}" if self._file is not None else ""
        return self._on_file(model, name, stores=True)

    def _servers(self, name, server):
        options = endpoint_options(self._config, server)
        # What else may stand in a request decides what is replied; where it goes does not.
        known_as = json.dumps([options.model, dict(options.extra)], sort_keys=True)
        keep = functools.partial(reply_cache.keep, self._file, known_as) if self._file is not None else None
        self._endpoints[name] = Endpoint(options, keep)
        return self._on_file(self._endpoints[name], known_as, stores=False)

    def _on_file(self, model, name, stores):
        if self._file is None:
            return model
        self._cached.append(Cached(model, self._file, name, stores))
        return self._cached[-1]


def endpoint_options(config: Config, name: str) -> EndpointOptions:
    """The servers that an entry of `servers` describes.

    Raises:
        ValueError: a URL or a field that cannot be; the message says which.
    """
    server = config.servers[name]
    plain = ("model", "key_variable", "concurrency", "requests_per_minute", "tokens_per_minute", "call_seconds",
             "total_seconds", "keep_alive")  # fmt: skip
    try:
        return EndpointOptions(
            urls=tuple(url.strip() for url in server.urls.split(",") if url.strip()),
            extra=checks.extra_fields(config, name),
            **{field: getattr(server, field) for field in plain},
        )
    except ValueError as error:
        raise ValueError(f"servers.{name}.urls: {error}") from error


def local_name(config: Config, params: Params) -> str:
    """Tells a model and how it is computed from all others; of the parameters, by a checksum."""
    described = [(path, leaf.shape, total) for leaf, (path, total) in zip(
        jax.tree.leaves(params), checksums.checksums(params).items(), strict=True
    )]  # fmt: skip
    digest = hashlib.blake2b(repr(described).encode(), digest_size=12).hexdigest()
    settings = [config.sampler.dtype, config.sampler.int8, config.model.thinking, config.model.tokenizer]
    return json.dumps([_GENERATION, digest, *settings])


def _open(config: Config, workdir: pathlib.Path | None) -> ReplyCache | None:
    name = config.answers.file
    if name == "auto":
        path = None if workdir is None else workdir / "answers.sqlite"
    else:
        path = pathlib.Path(name).expanduser() if name else None
    if path is None:
        return None
    return ReplyCache(path, config.answers.max_megabytes * 10**6)
