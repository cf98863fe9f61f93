"""Makes the language models of a config, chats in and replies out: the frozen one in this process, and servers.

Who wants replies, readers, judges or a maker of questions, does not see which it is. What a model has said once stands
on file (`reply_cache`), and is not asked again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Protocol

import jax

from finemem_jax.clients import chat
from finemem_jax.clients.chat import LanguageModel
from finemem_jax.clients.endpoint import Endpoint, urls_of
from finemem_jax.clients.reply_cache import Cached, ReplyCache
from finemem_jax.config import checks
from finemem_jax.config.sections import Config, Judge, QuestionModel, Reader
from finemem_jax.models.decoder import Params
from finemem_jax.models.tokenizer import Tokenizer
from finemem_jax.runtime import checksums, workers
from finemem_jax.sampling.sampler import Sampler, SamplerStats
from finemem_jax.types import Chat

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


class Polled(Protocol):
    """What works while it is waited for, and calls a function meanwhile; see `Sampler.poll`."""

    poll: Callable[[], bool | None]


class LanguageModels:
    """The language models of a run, made when they are first wanted. `close` them when it is over."""

    def __init__(self, config: Config, local: Local, workdir: pathlib.Path | None):
        """Opens the file of replies, if there is to be one.

        Args:
            workdir: Where `answers.file="auto"` is; None for no such file.

        Raises:
            ValueError: the file of replies cannot be what it is said to be.
        """
        self._config, self._local = config, local
        self._sampler: Sampler | None = None
        # By the entry of `servers`; None is the frozen model.
        self._models: dict[str | None, workers.Shared[Chat, str]] = {}
        self._cached: list[Cached] = []
        # What `set_poll`, `take_metrics` and `close` go through; subclasses add to it.
        self._polled: list[Polled] = []
        self._measures: list[Callable[[], dict[str, float]]] = [self._take_hits]
        self._closing = contextlib.ExitStack()
        self._replies = _open(config, workdir)
        if self._replies is not None:
            self._closing.callback(self._replies.close)

    def model(self, name: str, role: Reader | Judge | QuestionModel | None = None) -> LanguageModel:
        """Returns a language model: one more user of the frozen one, or of servers.

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
        """True if the frozen model is among them, so that there is something to compile."""
        return None in self._models

    def sampler(self) -> Sampler:
        """Returns the frozen model's sampler, for generating or only to compute with its weights."""
        if self._sampler is None:
            self._sampler = self._local.sampler()
        return self._sampler

    def set_poll(self, poll: Callable[[], bool | None]) -> None:
        """Has all that are asked call this function while they work or are waited for.

        Where it returns True, who waits gets nothing yet; what it raises ends the waiting.
        """
        for one in self._polled:
            one.poll = poll

    def reset(self) -> None:
        """Empties the frozen model's slots; see `Sampler.reset`."""
        if self._sampler is not None:
            self._sampler.reset()

    def take_stats(self) -> SamplerStats:
        """Returns what was generated in this process since the last call."""
        return SamplerStats() if self._sampler is None else self._sampler.take_stats()

    def take_metrics(self) -> dict[str, float]:
        """Returns what asking has cost since the last call, beside `take_stats`; only of what is there."""
        return {name: value for take in self._measures for name, value in take().items()}

    def close(self) -> None:
        """Ends what is being asked, and closes the file."""
        self._closing.close()

    def _in_process(self) -> LanguageModel:
        self._polled.append(self.sampler())
        model = chat.in_process(self.sampler(), self._local.tokens, self._config.seed)
        name = f"{self._local.name()} {self._config.seed}" if self._replies is not None else ""
        return self._with_cache(model, name, stores=True)

    def _servers(self, name: str, server: str) -> LanguageModel:
        section = self._config.servers[server]
        # What else may stand in a request decides what is replied; where it goes does not.
        known_as = json.dumps([section.model, checks.extra_fields(self._config, server)], sort_keys=True)
        keep = functools.partial(self._replies.keep, known_as) if self._replies is not None else None
        try:
            urls_of(section)
        except ValueError as error:
            raise ValueError(f"servers.{server}.urls: {error}") from error
        endpoint = Endpoint(section, keep)
        self._polled.append(endpoint)
        self._measures.append(functools.partial(_take_endpoint_metrics, name, endpoint))
        self._closing.callback(endpoint.close)
        return self._with_cache(endpoint, known_as, stores=False)

    def _with_cache(self, model: LanguageModel, name: str, stores: bool) -> LanguageModel:
        if self._replies is None:
            return model
        self._cached.append(Cached(model, self._replies, name, stores=stores))
        return self._cached[-1]

    def _take_hits(self) -> dict[str, float]:
        if not self._cached:
            return {}
        hits, misses = (sum(getattr(one, name) for one in self._cached) for name in ("hits", "misses"))
        for one in self._cached:
            one.hits = one.misses = 0
        return {"answers/on_file_fraction": hits / max(hits + misses, 1)}


def _take_endpoint_metrics(name: str, endpoint: Endpoint) -> dict[str, float]:
    stats = endpoint.take_stats()
    answered = float(stats.answered)
    # In place of those that this process answered, which are none.
    found = {"reader/questions_asked": answered} if name == "reader" else {}
    return found | {
        f"{name}/servers_answered": answered,
        f"{name}/servers_failed": float(sum(stats.faults.values())),
        f"{name}/servers_seconds_per_answer": stats.call_seconds / max(answered, 1),
        f"{name}/servers_prompt_tokens": float(stats.prompt_tokens),
        f"{name}/servers_new_tokens": float(stats.new_tokens),
    }


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
