"""From a config to who answers questions and who judges: language models that are asked for different things."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable

from finemem_jax.clients import chat
from finemem_jax.clients.language_models import LanguageModels, Local
from finemem_jax.config import checks, schedules
from finemem_jax.config.sections import Config
from finemem_jax.models.tokenizer import EncodedChat
from finemem_jax.reading import judges, reader
from finemem_jax.reading.judges import AnswerJudge, ContentJudge, Judge, JudgeOptions
from finemem_jax.reading.likelihood import Likelihoods
from finemem_jax.reading.reader import LikelihoodScorer, Query, Reader, ReaderOptions
from finemem_jax.runtime import workers
from finemem_jax.sampling.sampler import SamplerStats

# Which rules ask for a content judge, and which for citations (`rules.Rule.needs`).
_CONTENT, _CITATIONS = "content", "citations"


class Answering:
    """All who are asked in a run. `close` it when the run is over.

    Attributes:
        models: The language models behind them.
        answer: The reader.
        judge: Judges what was written; None where the credit rule does not ask.
        mark: Judges answers; None where nobody can (`reader.kind="evidence"` with `judge.kind="reader"`).
        likely: Computes likelihoods; None where they are not used.
    """

    def __init__(self, config: Config, local: Local, needs: frozenset[str], workdir: pathlib.Path | None):
        """Args:
        needs: What the credit rule must have measured.
        workdir: Where `answers.file="auto"` is; None for no such file.

        Raises:
            ValueError: servers or files that cannot be as they are named.
        """
        self._tokens = local.tokens
        self._verdicts: list[Judge] = []
        self._likelihoods: Likelihoods | None = None
        self.models = models = LanguageModels(config, local, workdir)
        cited_by = checks.rule_args(config).cited_by
        cite = _CITATIONS in needs and cited_by == "reader"
        self.reader_options = ReaderOptions(
            config.reader.max_new_tokens, config.reader.temperature, config.reader.num_examples, cite,
            config.reader.system,
        )  # fmt: skip
        if config.reader.kind == "evidence":
            self.answer: Reader = workers.Batched(reader.evidence(cite))
        else:
            self.answer = reader.language_model(models.model("reader", config.reader), self.reader_options)
        # Whoever reads may judge as well, over the same connections.
        name, judge = ("reader", config.reader) if config.judge.kind == "reader" else ("judge", config.judge)
        self.content_judge: ContentJudge | None = None
        self.answer_judge: AnswerJudge | None = None
        if judge.kind != "evidence":
            asked = JudgeOptions(config.judge.max_new_tokens, config.judge.temperature, config.judge.tries)
            answers_asked = dataclasses.replace(asked, system=config.judge.answer_system)
            self._verdicts.append(judges.answer_judge(models.model(name, judge), answers_asked))
            self.answer_judge = self._verdicts[-1]
            if _CONTENT in needs:
                contents_asked = dataclasses.replace(asked, system=config.judge.content_system)
                self._verdicts.append(judges.content_judge(models.model(name, judge), contents_asked))
                self.content_judge = self._verdicts[-1]
        elif _CONTENT in needs:
            raise ValueError(
                f"credit.rule={config.credit.rule!r} needs a judge of contents, and reader.kind='evidence' is none; "
                "set judge.kind to 'model' or 'server'."
            )
        self.likelihood_scorer: LikelihoodScorer | None = None
        shares = schedules.chunk_share(config.likelihood.chunk_share)
        if any(share for _, share in shares) or config.likelihood.probes:
            self._likelihoods = Likelihoods(
                models.sampler().engine, local.tokens, self.prompt, config.likelihood.batch_tokens, local.max_length
            )
            self.likelihood_scorer = self._likelihoods.once()

    def prompt(self, query: Query) -> EncodedChat:
        """What the frozen model is asked, in its tokens."""
        return chat.encode(self._tokens, reader.to_chat(query, self.reader_options))

    def warm_up(self, shared_prefix: int, positions: int, say: Callable[[str], None]) -> None:
        """Compiles what is generated and computed with in this process.

        Args:
            shared_prefix: Tokens of the longest shared prefix; as long as the manager's, programs are shared with it.
            positions: Tokens beyond it, new ones included.
            say: Shows a line about it, in place of the last one.
        """

        def progress(line, done, total):
            say(f"{line}: {done} of {total} programs")

        if self.models.generates:
            line = "compiling what the reader generates with"
            self.models.sampler().warm_up(shared_prefix, positions, functools.partial(progress, line))
        if self._likelihoods is not None:
            line = "compiling what likelihoods are computed with"
            self._likelihoods.warm_up(shared_prefix, positions, functools.partial(progress, line))

    def set_poll(self, between: Callable[[], bool | None]) -> None:
        """Has all who are asked call this function while they work or are waited for.

        Where it returns True, who waits gets nothing yet; what it raises ends the waiting.
        """
        self.models.set_poll(between)
        if self._likelihoods is not None:
            self._likelihoods.poll = between

    def reset(self) -> None:
        """Empties the slots of what generates in this process; see `Sampler.reset`."""
        self.models.reset()

    def take_stats(self) -> SamplerStats:
        """What was generated in this process since the last call."""
        return self.models.take_stats()

    def take_metrics(self) -> dict[str, float]:
        """What asking has cost since the last call, beside `take_stats`; only of what is there."""
        found = self.models.take_metrics()
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
        self.models.close()


def chunk_share(config: Config, step: int) -> float:
    """How much of the chunk reward is likelihood at a training step (counted from 0)."""
    return schedules.at(schedules.chunk_share(config.likelihood.chunk_share), step)
