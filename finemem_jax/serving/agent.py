"""The trained manager as a library: texts are observed, questions are answered, and each user has a memory.

One thread owns manager and reader. Whoever calls, from whichever thread, hands it a call and waits; it decodes all that
is pending together, and goes on with the calls of one user in the order in which they came.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
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
from finemem_jax.rl.method import rollout_options
from finemem_jax.rl.rollout import Players, RolloutOptions
from finemem_jax.runtime import files, workers
from finemem_jax.serving import load as load_lib
from finemem_jax.serving.scheduler import Calls, Work
from finemem_jax.types import Chunk, Memory, MemoryItem, Outcome, Refusal, Stream, random_key, to_json

_COPY_FORMAT = 1
_LONGEST_NAME = 256
# Users whose memory stays indexed; that of another is read from the store when it is needed.
_INDEXED = 256
# In place of a memory that nobody has looked at; no version is below 0.
_UNREAD = Saved(Memory(), {}, -1)


@dataclasses.dataclass(frozen=True)
class Observed:
    """What the manager made of a text.

    Attributes:
        outcomes: The operations that it wrote, in order, and what became of each: `status` says why one is not valid,
            and of what is no operation at all, `operation.reason`.
        chunks: In how many pieces it read the text.
        items: How many items its user's memory holds now.
        tokens: Their length together, in the manager's tokens.
    """

    outcomes: tuple[Outcome, ...]
    chunks: int
    items: int
    tokens: int

    @property
    def valid(self) -> int:
        """How many of the operations were valid."""
        return sum(outcome.valid for outcome in self.outcomes)


@dataclasses.dataclass(frozen=True)
class Reply:
    """The reader's answer, and the memory items that it was shown, best first."""

    answer: str
    evidence: tuple[MemoryItem, ...]


class MemoryAgent:
    """A memory manager at work, with the reader that answers from what it has written. A context manager.

    Threads may share one, and processes may share its file of memories: no update is lost, because whoever comes second
    looks at the memory again. A call that fails raises where it was made, and leaves the memory as it was.

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
        seed: int = 0,
        step: int = 0,
        waits: bool = True,
    ):
        """An agent of players that others made; `load` and `from_config` make them.

        Args:
            options: As of evaluation.
            store: A file of memories, made where there is none; None for memories that end with this agent.
            step: After how many training steps the manager's weights are; noted in the store.
            waits: False: the reader's answers come by themselves, from servers; it is not waited for.

        Raises:
            ValueError: the store is no file of memories, or cannot be written.
        """
        self._environment, self._options, self._embed = players.environment, options, players.embed
        self._seed, self._step = seed, step
        # Rules that have the reader name its evidence have it do so in evaluation too; the names are no answer.
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
        """The manager that a run has trained.

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
        return cls._begin(config, workdir, store, warm_up, overrides)

    @classmethod
    def from_config(
        cls,
        config: Config | ConfigDict,
        store: str | pathlib.Path | None = None,
        *,
        warm_up: Callable[[str], None] | None = None,
        **overrides: Any,
    ) -> MemoryAgent:
        """The manager that a config begins with: its `model.weights`, without training. Else as `load`."""
        typed = config if isinstance(config, Config) else config_lib.parse(config)
        return cls._begin(typed, None, store, warm_up, overrides)

    @classmethod
    def _begin(cls, config, workdir, store, warm_up, overrides):
        # Imported late, and with it JAX: whoever only imports this class should not wait for it.
        from finemem_jax import build

        config = load_lib.for_use(config, overrides)
        parts = build.build(config)
        with contextlib.ExitStack() as closing:
            closing.callback(parts.answering.close)
            build.check_lengths(config, parts)
            step = 0 if workdir is None else build.use_checkpoint(parts, workdir)
            if warm_up is not None:
                build.warm_up(config, parts, warm_up)
            options = rollout_options(config, evaluation=True, constraint=parts.constraint)
            agent = cls(parts.players, options, store, config.seed, step, waits=config.reader.kind != "server")
            # Whoever comes while others are served need not wait until one of these is done.
            parts.manager.poll = agent._calls.is_wanted
            parts.answering.set_poll(agent._calls.is_wanted)
            closing.push(agent._closing.pop_all())
            agent._closing = closing.pop_all()
        return agent

    # ---------------------------------------------------------------------------------- calls

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
        """All items of a user's memory, oldest first; () for a user that nothing is known of."""
        return self._store.load(_checked_user(user))[0].items

    def users(self) -> list[str]:
        """Who has a memory in the store, in order."""
        return self._store.names()

    def forget(self, user: str = "default", item_ids: Collection[int] | None = None) -> int:
        """Removes items from a user's memory; returns how many.

        Args:
            item_ids: Which ones; None for all, and that there was such a user.

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
        """Puts the memories of a file that `save` wrote in the place of those of the same users; returns whose.

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

    def __exit__(self, *_) -> None:
        self.close()

    # ---------------------------------------------------------------------------------- in the thread of the calls

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

    def _request(self, user, chunk, held):
        def search(text):
            return held.find(text, options.view_top_k)

        options, t = self._options, held.saved.state.get("step", 0)
        prompt = self._environment.observe(chunk, held.saved.memory, search)
        return options.request(prompt, random_key(self._seed, "agent", user, t))

    def _write(self, user, completion, held):
        """Applies a response to the memory that it was written for, and saves that; raises Conflict if it changed."""
        memory, state, version = held.saved
        t = state.get("step", 0)
        after, outcomes, _ = self._environment.act(memory, completion.ids, t)
        state = state | {"step": t + 1, "weights": self._step}
        held.saved = Saved(after, state, self._store.save(user, after, state, version))
        return outcomes

    def _undo(self, user, before, version):
        if version in (_UNREAD.version, before.version):
            return  # Nothing was saved since.
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

    def _look(self, user):
        """The user's memory as it is now."""
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

    def _check_layout(self, user, memory):
        layout = self._environment.dialect.layout
        if any(bool(item.memory_type) != (layout == "typed") for item in memory.items):
            raise ValueError(
                f"The memory of {user!r} was not written in this manager's layout (memory.layout={layout!r}); use the "
                "manager that wrote it, or another store."
            )


@dataclasses.dataclass
class _Indexed:
    """A memory as it was last seen, and where it is searched."""

    index: retrieval.Index
    saved: Saved = _UNREAD

    def find(self, text, k):
        self.index.update(self.saved.memory.items)
        return self.index.retrieve(text, k)


def _read_copies(path):
    """{user: (memory, steps taken)} of a file that `save` wrote."""
    found = load_lib.read_json(path)
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


def _checked_user(user):
    writable = isinstance(user, str) and user.strip() and user.isprintable()
    if not writable or len(user) > _LONGEST_NAME:
        raise ValueError(f"A user's name must be 1 to {_LONGEST_NAME} printable characters; got {user!r}.")
    return user


def _check_text(text, name):
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"The {name} must hold words; got {text!r}.")
