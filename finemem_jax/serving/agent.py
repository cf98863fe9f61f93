"""Serves a trained manager as a library: observes texts, answers questions, and keeps a memory for each user.

One thread owns manager and reader (`scheduler.Calls`). Callers on any thread hand it a call and wait; it decodes all
that is pending together, and takes the calls of one user in the order in which they came.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

from finemem_jax import config as config_lib
from finemem_jax.config import ConfigDict
from finemem_jax.config.sections import Config
from finemem_jax.memory import retrieval, transition
from finemem_jax.memory import store as store_lib
from finemem_jax.memory.store import Conflict, Saved, Store
from finemem_jax.reading import prompts
from finemem_jax.reading.reader import Query
from finemem_jax.rl.rollout import Players, RolloutOptions
from finemem_jax.runtime import files, workers
from finemem_jax.serving import load as load_lib
from finemem_jax.serving.scheduler import Calls, Work
from finemem_jax.types import (
    Chunk,
    Completion,
    Memory,
    MemoryItem,
    Outcome,
    Refusal,
    Request,
    Stream,
    random_key,
    to_json,
)

_COPY_FORMAT = 1
_LONGEST_NAME = 256
# Users whose memory stays indexed; another's is read from the store when it is needed.
_INDEXED = 256
# Stands for a memory that has not been read yet; versions in the store are 0 or more.
_UNREAD = Saved(Memory(), {}, -1)


@dataclasses.dataclass(frozen=True)
class Observed:
    """Tells what the manager made of a text.

    Attributes:
        outcomes: The operations that it wrote, in order, each with what became of it: `status` says why one is not
            valid, `operation.reason` why a line is no operation.
        chunks: How many chunks the text was cut into.
        items: How many items the user's memory holds now.
        tokens: Their total length, in the manager's tokens.
    """

    outcomes: tuple[Outcome, ...]
    chunks: int
    items: int
    tokens: int

    @property
    def valid(self) -> int:
        """Counts the valid operations."""
        return sum(outcome.valid for outcome in self.outcomes)


@dataclasses.dataclass(frozen=True)
class Reply:
    """Holds the reader's answer, and the memory items that it was shown, best first."""

    answer: str
    evidence: tuple[MemoryItem, ...]


class MemoryAgent:
    """Runs a memory manager, and the reader that answers from its memories. A context manager.

    Threads may share an agent, and processes its file of memories: no update is lost, because whoever comes second
    reads the memory again. A call that fails raises where it was made, and leaves the memory as it was.

        >>> from experiments import smoke
        >>> from finemem_jax import MemoryAgent
        >>> with MemoryAgent.from_config(smoke.get_config()) as agent:
        ...     observed = agent.observe("Ada moved to Oslo in May.", user="ada")
        ...     reply = agent.ask("Where does Ada live?", user="ada")
        ...     kept = agent.memory("ada")
        >>> observed.chunks, observed.items == len(kept)
        (1, True)
        >>> set(reply.evidence) <= set(kept)
        True
    """

    def __init__(
        self,
        players: Players,
        options: RolloutOptions,
        store: str | pathlib.Path | None = None,
        *,
        step: int = 0,
        waits: bool = True,
    ):
        """Makes an agent of given players; `load` and `from_config` make these, too.

        Args:
            options: As of evaluation.
            store: A file of memories, made where there is none; None for memories that end with this agent.
            step: After how many training steps the manager's weights are; noted in the store.
            waits: Whether the reader computes here; False where servers do, whose answers need no waiting.

        Raises:
            ValueError: the store is no file of memories, or cannot be written.
        """
        self._environment, self._options, self._embed = players.environment, options, players.embed
        self._step = step
        # With credit rule "cited" the reader names its evidence, in evaluation too; that is cut off its answers.
        self._cites = "citations" in options.needs and options.cited_by == "reader"
        self._indexed: collections.OrderedDict[str, _Indexed] = collections.OrderedDict()
        self._closing = contextlib.ExitStack()
        path = store_lib.IN_PROCESS if store is None else pathlib.Path(store).expanduser()
        self._store = self._closing.enter_context(Store(path))
        self._calls = Calls(workers.as_worker(players.policy), workers.as_worker(players.reader), waits)
        self._closing.callback(self._calls.close)

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path,
        store: str | pathlib.Path | None = None,
        *,
        warm_up: Callable[[str], None] | None = None,
        **overrides: Any,
    ) -> MemoryAgent:
        """Loads the manager that a run has trained.

        Args:
            path: The run's workdir, or the folder of an exported model, whose reader is then that model too; or for a
                manager without training, an experiment's file as --config takes it, or "" for our default.
            store: A file of memories, made where there is none; None for memories that end with this agent.
            warm_up: Compile all programs now, and call this with what is being compiled; else the first calls wait.
            overrides: Settings by dotted name, {"reader.kind": "evidence"}, instead of those of training. The mesh is
                that of this machine, and no file of answers is kept, unless they say so.

        Raises:
            ValueError: nothing is there that can be used, or a setting cannot work; the message says what to do.
        """
        config, workdir = load_lib.find(str(path))
        return cls._begin(config, workdir, store, warm_up=warm_up, overrides=overrides)

    @classmethod
    def from_config(
        cls,
        config: Config | ConfigDict,
        store: str | pathlib.Path | None = None,
        *,
        warm_up: Callable[[str], None] | None = None,
        **overrides: Any,
    ) -> MemoryAgent:
        """Loads the manager that a config begins with: its `model.weights`, without training. Else as `load`."""
        typed = config if isinstance(config, Config) else config_lib.parse(config)
        return cls._begin(typed, None, store, warm_up=warm_up, overrides=overrides)

    @classmethod
    def _begin(
        cls,
        config: Config,
        workdir: pathlib.Path | None,
        store: str | pathlib.Path | None,
        *,
        warm_up: Callable[[str], None] | None,
        overrides: dict[str, Any],
    ) -> MemoryAgent:
        # Imports JAX, which takes seconds: importing this class should not.
        from finemem_jax import build
        from finemem_jax.rl.method import rollout_options

        config = load_lib.for_use(config, overrides)
        components = build.build(config)
        with contextlib.ExitStack() as closing:
            closing.callback(components.answering.close)
            build.check_lengths(config, components)
            step = 0 if workdir is None else build.use_checkpoint(components, workdir)
            if warm_up is not None:
                build.warm_up(config, components, warm_up)
            options = rollout_options(config, evaluation=True, constraint=components.constraint)
            agent = cls(components.players, options, store, step=step, waits=config.reader.kind != "server")
            # While a new call waits, samplers come back between two decoding steps, not only when something is done.
            components.manager.poll = agent._calls.is_wanted
            components.answering.set_poll(agent._calls.is_wanted)
            closing.push(agent._closing.pop_all())
            agent._closing = closing.pop_all()
        return agent

    # ---------------------------------------------------------------------------------- calls, on any thread

    def observe(self, text: str, user: str = "default") -> Observed:
        """Has the manager read a text, and write to the user's memory what it finds worth keeping.

        The text is cut as in training, one response for each piece; each is saved when it has been applied.

        Raises:
            ValueError: the text is blank, or a piece of it is refused; the message says which setting to change.
            OSError: the store cannot be written.
            RuntimeError: the agent is closed.
        """
        _check_text(text, "text")
        # In the caller's thread: cutting a book takes longer than a response.
        stream = self._environment.fit(Stream(_checked_user(user), "agent", (Chunk(text),)))
        return self._calls.make(user, self._observe(user, stream.chunks))

    def ask(self, question: str, user: str = "default") -> Reply:
        """Answers a question from what the user's memory holds.

        Raises:
            ValueError: the question is blank, or too long for the reader.
            EndpointError: no server has answered.
            OSError: the store cannot be read.
            RuntimeError: the agent is closed.
        """
        _check_text(question, "question")
        return self._calls.make(_checked_user(user), self._ask(user, question))

    def memory(self, user: str = "default") -> tuple[MemoryItem, ...]:
        """Returns all items of a user's memory, oldest first; () for an unknown user."""
        return self._store.load(_checked_user(user))[0].items

    def users(self) -> list[str]:
        """Lists who has a memory in the store, in order."""
        return self._store.names()

    def forget(self, user: str = "default", item_ids: Collection[int] | None = None) -> int:
        """Removes items from a user's memory; returns how many.

        Args:
            item_ids: Which ones; None for all, and for the user's entry in the store.

        Raises:
            ValueError: there are no such items; none is removed.
        """
        while True:
            saved = self._store.read(_checked_user(user))
            held, gone = saved.memory.items, {item.item_id for item in saved.memory.items}
            if item_ids is not None:
                unknown, gone = set(item_ids) - gone, set(item_ids)
                if unknown:
                    raise ValueError(f"There are no items {sorted(unknown)} in this memory; look at what it holds.")
            left = Memory(tuple(item for item in held if item.item_id not in gone), saved.memory.next_id)
            with contextlib.suppress(Conflict):
                if item_ids is None:
                    self._store.remove(user, saved.version)
                elif gone:
                    self._store.save(user, left, saved.state, saved.version)
                return len(gone)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes all memories to a JSON file, which `restore` reads.

        Raises:
            OSError: it cannot be written.
        """
        copies = {}
        for user in self.users():
            memory, state = self._store.load(user)
            copies[user] = {"steps": state.get("step", 0), **to_json(memory)}
        text = json.dumps({"format": _COPY_FORMAT, "memories": copies}, indent=1, ensure_ascii=False)
        files.replace_text(pathlib.Path(path).expanduser(), text + "\n")

    def restore(self, path: str | pathlib.Path) -> list[str]:
        """Replaces users' memories by those of a file that `save` wrote; returns whose.

        Raises:
            ValueError: it is no such file; no memory was changed.
        """
        copies = _read_copies(pathlib.Path(path).expanduser())
        for user, (memory, _) in copies.items():
            self._check_layout(user, memory)
        for user, (memory, steps) in copies.items():
            self._store.save(user, memory, {"step": steps, "weights": self._step})
        return sorted(copies)

    def close(self) -> None:
        """Ends all calls that are still waiting, with a RuntimeError where they were made, and closes the store."""
        self._closing.close()

    def __enter__(self) -> MemoryAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------- on the thread of the calls

    def _observe(self, user: str, chunks: Sequence[Chunk]) -> Work:
        outcomes: list[Outcome] = []
        memory, before = Memory(), _UNREAD
        version = _UNREAD.version
        try:
            for chunk in chunks:
                while True:
                    held = self._look(user)
                    if held.saved.version != version:
                        # Somebody else has written: what they wrote stays, whatever becomes of this call.
                        before = held.saved
                    completion = yield self._request(user, chunk, held)
                    if isinstance(completion, Refusal):
                        raise ValueError(completion.reason)
                    with contextlib.suppress(Conflict):
                        written = self._write(user, completion, held)
                        break
                outcomes += written
                memory, _, version = held.saved
        except BaseException:
            self._undo(user, before, version)
            raise
        tokens = self._environment.memory_tokens(memory)
        return Observed(tuple(outcomes), len(chunks), len(memory.items), tokens)

    def _request(self, user: str, chunk: Chunk, held: _Indexed) -> Request:
        search = functools.partial(held.find, k=self._options.view_top_k)
        prompt = self._environment.observe(chunk, held.saved.memory, search)
        return self._options.request(prompt, random_key("agent", user, held.saved.state.get("step", 0)))

    def _write(self, user: str, completion: Completion, held: _Indexed) -> Sequence[Outcome]:
        """Applies a response to the memory that it was written for, and saves that; raises Conflict if it changed."""
        memory, state, version = held.saved
        t = state.get("step", 0)
        after, outcomes, _ = self._environment.act(memory, completion.ids, t)
        state = state | {"step": t + 1, "weights": self._step}
        held.saved = Saved(after, state, self._store.save(user, after, state, version))
        return outcomes

    def _undo(self, user: str, before: Saved, version: int) -> None:
        """Restores the memory as it was before a call that failed, unless somebody else has written since."""
        if version in (_UNREAD.version, before.version):
            return  # The call has saved nothing.
        with contextlib.suppress(Conflict):
            if before.memory == Memory() and not before.state:
                self._store.remove(user, version)
            else:
                self._store.save(user, before.memory, before.state, version)

    def _ask(self, user: str, question: str) -> Work:
        evidence = self._look(user).find(question, self._options.top_k)
        answer = yield Query(question, tuple(item.text for item in evidence))
        if self._cites:
            answer, _ = prompts.split_citations(answer, len(evidence))
        return Reply(answer, evidence)

    def _look(self, user: str) -> _Indexed:
        """Returns the user's memory as it is now, from the store if another process has written."""
        held = self._indexed.pop(user, None)
        if held is None:
            held = _Indexed(retrieval.Index(self._options.retrieval, self._embed))
        if held.saved.version != self._store.version(user):
            held.saved = self._store.read(user)
            self._check_layout(user, held.saved.memory)
        self._indexed[user] = held
        while len(self._indexed) > _INDEXED:
            self._indexed.popitem(last=False)
        return held

    def _check_layout(self, user: str, memory: Memory) -> None:
        layout = self._environment.dialect.layout
        if any(bool(item.memory_type) != (layout == "typed") for item in memory.items):
            raise ValueError(
                f"The memory of {user!r} was not written in this manager's layout (memory.layout={layout!r}); use the "
                "manager that wrote it, or another store."
            )


@dataclasses.dataclass
class _Indexed:
    """Holds a memory as it was last seen, and the index that it is searched with."""

    index: retrieval.Index
    saved: Saved = _UNREAD

    def find(self, text: str, k: int) -> tuple[MemoryItem, ...]:
        self.index.update(self.saved.memory.items)
        return self.index.retrieve(text, k)


def _read_copies(path: pathlib.Path) -> dict[str, tuple[Memory, int]]:
    """Reads {user: (memory, steps taken)} from a file that `MemoryAgent.save` wrote."""
    found = files.read_json(path, load_lib.REMEDY, required=True)
    try:
        if found["format"] != _COPY_FORMAT:
            raise ValueError(f"its format is {found['format']!r}, and only {_COPY_FORMAT} can be read")
        copies = {}
        for user, copy in found["memories"].items():
            memory = Memory(tuple(MemoryItem(**item) for item in copy["items"]), copy["next_id"])
            broken = transition.invariants(memory, copy["steps"])
            if broken:
                raise ValueError(f"the memory of {user!r}: {broken[0]}")
            copies[_checked_user(user)] = memory, copy["steps"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no copy of memories ({error}); name a file that MemoryAgent.save wrote."
        ) from error
    return copies


def _checked_user(user: Any) -> str:
    writable = isinstance(user, str) and user.strip() and user.isprintable()
    if not writable or len(user) > _LONGEST_NAME:
        raise ValueError(f"A user's name must be 1 to {_LONGEST_NAME} printable characters; got {user!r}.")
    return user


def _check_text(text: Any, name: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"The {name} must hold words; got {text!r}.")
