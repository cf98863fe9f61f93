"""Makes the reader, the judges and the likelihood scorer of a config, and the language models behind them."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

from finemem_jax.clients import chat
from finemem_jax.clients.language_models import LanguageModels, Local
from finemem_jax.config import checks, schedules
from finemem_jax.config.sections import Config
from finemem_jax.models.tokenizer import EncodedChat
from finemem_jax.reading import judges, reader
from finemem_jax.reading.judges import AnswerJudge, ContentJudge, Judge
from finemem_jax.reading.likelihood import Likelihoods
from finemem_jax.reading.reader import LikelihoodScorer, Query, Reader
from finemem_jax.runtime import workers

# Which rules ask for a content judge, and which for citations (`credit_rules.Rule.needs`).
_CONTENT, _CITATIONS = "content", "citations"


class Answering(LanguageModels):
    """All who are asked in a run, over the language models that they share. `close` it when the run is over.

    Attributes:
        answer: The reader.
        content_judge: Judges what was written; None where the credit rule does not ask.
        answer_judge: Judges answers; None where nobody can (`reader.kind="evidence"` with `judge.kind="reader"`).
        likelihood_scorer: Computes likelihoods; None where they are not used.
    """

    def __init__(self, config: Config, local: Local, *, needs: frozenset[str], workdir: pathlib.Path | None):
        """Makes whom the config asks for; compiles nothing.

        Args:
            needs: What the credit rule must have measured.
            workdir: Where `answers.file="auto"` is; None for no such file.

        Raises:
            ValueError: servers or files that cannot be as they are named.
        """
        super().__init__(config, local, workdir)
        self._cites = _CITATIONS in needs and checks.rule_args(config).cited_by == "reader"
        if config.reader.kind == "evidence":
            self.answer: Reader = workers.Batched(reader.evidence(self._cites))
        else:
            self.answer = reader.language_model(self.model("reader", config.reader), config.reader, self._cites)
        self.answer_judge: AnswerJudge | None = None
        self.content_judge: ContentJudge | None = None
        self._judges: list[Judge] = []
        self._make_judges(config, _CONTENT in needs)
        self.likelihood_scorer: LikelihoodScorer | None = None
        self._likelihoods: Likelihoods | None = None
        shares = schedules.chunk_share(config.likelihood.chunk_share)
        if any(share for _, share in shares) or config.likelihood.probes:
            self._likelihoods = Likelihoods(
                self.sampler().engine, local.tokens, self.prompt,
                tokens_together=config.likelihood.batch_tokens, max_length=local.max_length,
            )  # fmt: skip
            # It remembers: the likelihood without evidence, above all, is wanted again and again.
            self.likelihood_scorer = workers.Memoized(self._likelihoods)
            self._polled.append(self._likelihoods)
            self._measures.append(self._take_likelihood_metrics)

    def _make_judges(self, config: Config, judges_content: bool) -> None:
        # Whoever reads may judge as well, over the same connections.
        name, role = ("reader", config.reader) if config.judge.kind == "reader" else ("judge", config.judge)
        if role.kind != "evidence":
            answer_judge = judges.answer_judge(self.model(name, role), config.judge)
            self.answer_judge = answer_judge
            self._judges.append(answer_judge)
            if judges_content:
                content_judge = judges.content_judge(self.model(name, role), config.judge)
                self.content_judge = content_judge
                self._judges.append(content_judge)
            self._measures.append(self._take_judge_metrics)
        elif judges_content:
            raise ValueError(
                f"credit.rule={config.credit.rule!r} needs a judge of contents, and reader.kind='evidence' is none; "
                "set judge.kind to 'model' or 'server'."
            )

    def prompt(self, query: Query) -> EncodedChat:
        """Encodes what the frozen model is asked."""
        return chat.encode(self._local.tokens, reader.to_chat(query, self._config.reader, self._cites))

    def warm_up(self, shared_prefix: int, positions: int, say: Callable[[str], None]) -> None:
        """Compiles what is generated and computed with in this process.

        Args:
            shared_prefix: Tokens of the longest shared prefix; as long as the manager's, programs are shared with it.
            positions: Tokens beyond it, new ones included.
            say: Shows a line about it, in place of the last one.
        """
        users = {"what the reader generates with": self.sampler()} if self.generates else {}
        scorers = {} if self._likelihoods is None else {"what likelihoods are computed with": self._likelihoods}
        for what, one in (users | scorers).items():

            def progress(done: int, total: int, what: str = what) -> None:
                say(f"compiling {what}: {done} of {total} programs")

            one.warm_up(shared_prefix, positions, progress)

    def _take_judge_metrics(self) -> dict[str, float]:
        found = {f"judge/{name}": float(sum(getattr(one, name) for one in self._judges)) for name in judges.COUNTS}
        for one in self._judges:
            one.retried = one.undecided = 0
        return found

    def _take_likelihood_metrics(self) -> dict[str, float]:
        assert self._likelihoods is not None
        stats = self._likelihoods.take_stats()
        return {"likelihood/claims": float(stats.claims), "time/likelihood_seconds": stats.seconds}


def chunk_share(config: Config, step: int) -> float:
    """Gives the share of likelihoods in the chunk reward at a training step (counted from 0)."""
    return schedules.at(schedules.chunk_share(config.likelihood.chunk_share), step)
