"""Has the manager read a text file that is still being written (--mode=follow), without end if need be.

After each chunk the memory and the position in the file are saved in `WORKDIR/memory.sqlite`; the same command goes on
there. With `memory.budget_tokens` the memory keeps to that length, however long the text becomes.
"""

from __future__ import annotations

import pathlib

from finemem_jax import build, input_pipeline
from finemem_jax.build import Components
from finemem_jax.config.sections import Config
from finemem_jax.memory import retrieval
from finemem_jax.memory.store import Store
from finemem_jax.rl.method import rollout_options
from finemem_jax.rl.rollout import RolloutOptions
from finemem_jax.runtime import workers
from finemem_jax.runtime.display import Display
from finemem_jax.types import Chunk, Memory, MemoryItem, Refusal, Stream, random_key

FILE = "memory.sqlite"
# How often to look whether the file has grown.
_POLL_SECONDS = 1.0


def check(config: Config) -> None:
    """Refuses settings that cannot work, before anything is loaded.

    Raises:
        ValueError: there is no file to follow.
    """
    if not pathlib.Path(config.follow.file).expanduser().is_file():
        raise ValueError(f"follow.file={config.follow.file!r} is no file. Name the text file that is to be followed.")


def run(config: Config, workdir: pathlib.Path, components: Components, *, step: int) -> list[str]:
    """Reads on until nothing has come for `follow.idle_seconds`; returns lines to print.

    Args:
        step: After how many training steps the manager's weights are.

    Raises:
        ValueError: there is no such file, or it is not what it was.
        KeyboardInterrupt: Ctrl-C; all finished chunks are saved.
    """
    path = pathlib.Path(config.follow.file).expanduser()
    name = str(path.resolve())
    texts = input_pipeline.builder("texts")
    options = rollout_options(config, evaluation=True, constraint=components.constraint)
    with Store(workdir / FILE) as store, Display(0) as display:
        memory, state = store.load(name)
        offset, t = state.get("offset", 0), state.get("step", 0)
        if t:
            display.say(f"going on at byte {offset:,} of {path}, after {t} chunks")
        build.warm_up(config, components, display.phase)
        display.phase(f"waiting for {path}")
        manager = _Manager(config, components, options)
        waiting = texts.Waiting(config.follow.idle_seconds, _POLL_SECONDS)
        for text, end in texts.follow(
            path, offset, chunk_words=config.data.chunk_words, chunking=config.data.chunking, waiting=waiting
        ):
            # A text that is too long for a prompt becomes several steps, saved as one: they share a place in the file.
            for chunk in components.environment.fit(Stream(name, "follow", (Chunk(text),))).chunks:
                memory, valid, written = manager.read(chunk, memory, t)
                t += 1
                tokens = components.environment.memory_tokens(memory)
                shown = f"chunk {t}: {valid} of {written} operations valid"
                display.say(f"{shown}; memory of {len(memory.items)} items, {tokens} tokens")
            store.save(name, memory, {"offset": end, "step": t, "weights": step})
    return [f"memory         {workdir / FILE}: {len(memory.items)} items after {t} chunks of {path}"]


class _Manager:
    """Reads one endless stream, chunk by chunk."""

    def __init__(self, config: Config, components: Components, options: RolloutOptions):
        self._seed, self._policy, self._options = config.seed, components.manager, options
        self._environment = components.environment
        self._index = retrieval.Index(options.retrieval, components.embed)

    def read(self, chunk: Chunk, memory: Memory, t: int) -> tuple[Memory, int, int]:
        """Returns M_t, and how many operations were valid, of how many."""

        def search(text: str) -> tuple[MemoryItem, ...]:
            self._index.update(memory.items)
            return self._index.retrieve(text, self._options.view_top_k)

        prompt = self._environment.observe(chunk, memory, search)
        request = self._options.request(prompt, random_key(self._seed, "follow", t))
        (completion,) = workers.run_all(self._policy, [request])
        if isinstance(completion, Refusal):
            raise ValueError(completion.reason)
        after, outcomes, _ = self._environment.act(memory, completion.ids, t)
        return after, sum(outcome.valid for outcome in outcomes), len(outcomes)
