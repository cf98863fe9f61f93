"""Makes chunk questions for any text: a generator proposes them, and a verifier must answer them from the chunk alone.

The generator is asked for questions about a chunk, with short answers. What it proposes goes through filters, the cheap
ones first, and the first `keep` survivors in the order of proposal become the chunk's questions. Where too few survive,
it is asked again with another seed.

Which chats are asked, and what comes of them, depends on streams and options alone, not on the order in which replies
come. So a rerun with models that remember (`reply_cache.Cached`) asks for nothing twice. Knows nothing of who replies.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from finemem_jax.clients import chat as chat_lib
from finemem_jax.clients.chat import LanguageModel
from finemem_jax.config.sections import Prices
from finemem_jax.questions import costs, proposals
from finemem_jax.questions import report as question_report
from finemem_jax.questions.costs import BudgetError
from finemem_jax.questions.options import QuestionOptions
from finemem_jax.questions.proposals import AskedBefore, Proposal, Worded
from finemem_jax.questions.report import KEPT, Example, Report, plain
from finemem_jax.reading import scoring
from finemem_jax.runtime import files, workers
from finemem_jax.runtime.workers import Pending
from finemem_jax.types import Chat, Chunk, Malformed, Question, Stream, StreamSource, random_key, to_json

KIND = "generated"

# Called with the number of chunks that are done, and of all.
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Models:
    """Who is asked.

    Attributes:
        generator: Proposes questions.
        verifier: Answers them; may be the same worker.
        count_tokens: Length of a text in tokens, for both.
        prices: Of what goes into and comes out of them.
        servers: Which of "generator" and "verifier" go on without being waited for.
    """

    generator: LanguageModel
    verifier: LanguageModel
    count_tokens: Callable[[str], int]
    prices: Prices = dataclasses.field(default_factory=Prices)
    servers: Collection[str] = ()


@dataclasses.dataclass(eq=False)
class _Candidate:
    """A proposal on its way; `fate` is KEPT, a reason, or "" while it is not decided."""

    proposal: Proposal
    fate: str = ""
    is_asked: bool = False
    reply: str = ""

    @functools.cached_property
    def worded(self) -> Worded:
        return Worded.of(self.proposal.question, (self.proposal.answer,))


class _OpenChunk:
    """A chunk that is being worked on.

    Its candidates are gone through in order: a near-duplicate of a kept one is dropped, any other verified, until
    enough are kept. As many as may still be needed are verified together, but none beside one that it resembles; so
    exactly those are verified that would be one after the other, in whatever order the replies come.
    """

    def __init__(self, stream: _OpenStream, step: int, options: QuestionOptions):
        self.stream, self.step, self.chunk = stream, step, stream.stream.chunks[step]
        self.existing = options.existing(self.chunk)
        self.needed = max(options.keep - len(self.existing), 0)
        self.candidates: list[_Candidate] = []
        self.rounds, self.is_proposing = 0, False
        self.is_settling = False  # Whether it is being compared with the chunks before it, which are done.
        self._seen: set[tuple[str, str]] = set()

    def add(self, replied: Iterable[Proposal | Malformed], options: QuestionOptions) -> None:
        """Takes what a reply proposes, and decides what needs no model."""
        well_formed = 0
        for item in replied:
            if isinstance(item, Malformed):
                self.candidates.append(_Candidate(Proposal(item.text, ""), "malformed"))
                continue
            well_formed += 1
            flaw = "surplus" if well_formed > options.proposals else ""
            flaw = flaw or proposals.text_flaw(item, self.chunk.text, options.max_answer_words)
            if not flaw:
                key = scoring.normalize(item.question), scoring.normalize(item.answer)
                flaw = "duplicate" if key in self._seen else ""
                self._seen.add(key)
            self.candidates.append(_Candidate(item, flaw))

    def with_fate(self, fate: str) -> list[_Candidate]:
        return [candidate for candidate in self.candidates if candidate.fate == fate]

    @property
    def is_ready(self) -> bool:
        """True if nothing more is to come."""
        return not self.is_proposing and (len(self.with_fate(KEPT)) >= self.needed or not self.with_fate(""))


class _OpenStream:
    """A stream that is being worked on.

    Its chunks are worked on side by side, and compared with each other afterwards, from the first to the last.
    """

    def __init__(self, stream: Stream, options: QuestionOptions):
        self.stream = stream
        self.next_step = 0
        self.open: collections.deque[_OpenChunk] = collections.deque()
        self.asked = AskedBefore(options.duplicate)
        for chunk in stream.chunks:
            for question in options.existing(chunk):
                self.asked.add(Worded.of(question.text, question.answers))
        self.done: list[Chunk] = []
        self.examples: dict[str, list[tuple[Any, Example]]] = {}

    @property
    def is_done(self) -> bool:
        return len(self.done) == len(self.stream.chunks)


# Between two looks at servers (s).
_PAUSE = 0.005
# Finished streams wait for those before them: of all that are open, there are so many times the chunks in flight.
_OPEN_STREAMS = 4


class Pipeline:
    """Makes the questions of some streams: `run` it once, or `write`, which runs it.

    What either model has done is taken as soon as it is there, and what can be asked then is asked at once.

    Attributes:
        report: What has become of the proposals so far.
    """

    def __init__(
        self,
        streams: Sequence[Stream] | StreamSource,
        options: QuestionOptions,
        models: Models,
        *,
        progress: Progress | None = None,
    ):
        """Estimates what it will take; asks nothing yet.

        Raises:
            ValueError: the streams or the budget will not do.
        """
        self._streams, self._options, self._progress = streams, options, progress
        self._estimate = costs.estimate(streams, options, models.count_tokens, prices=models.prices)
        costs.check_budget(self._estimate, options, models.prices)
        self.report = Report(options, models.prices)
        asked = {"verifier": models.verifier, "generator": models.generator}
        if models.generator is models.verifier:
            shared = workers.Shared(models.generator)
            asked = {name: shared.port() for name in asked}
        # Who has been asked, with the function that takes the reply; in the order in which they are looked at.
        self._pending: dict[str, Pending[Chat, str, Callable[[str], None]]] = {
            name: Pending(model) for name, model in asked.items()
        }
        self._servers = models.servers
        self._count_tokens, self._count = models.count_tokens, costs.counter(models.count_tokens)
        self._loaded, self._in_flight = 0, 0
        self._open: collections.deque[_OpenStream] = collections.deque()
        # What orders them, and the examples of each fate.
        self._examples: dict[str, list[tuple[Any, Example]]] = {}

    def write(self, folder: pathlib.Path, split: str) -> Report:
        """Runs it, and writes the streams into files of a folder; returns the report.

        `{split}.jsonl` holds a stream a line, as the builder "streams" reads them; `report_{split}.md` and `.json` the
        report. The first is written last, whole or not at all: if it is there, all is done.

        Raises:
            ValueError: the name of the split is no part of a file's name. And as `run` does.
        """
        if not re.fullmatch(r"[\w-]+", split):
            raise ValueError(f"a split's name must consist of letters, digits, _ and -, got {split!r}.")
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{split}.jsonl.partial"
        try:
            with temporary.open("wb") as file:
                for stream in self.run():
                    file.write(json.dumps(to_json(stream), ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            report = self.report
            record = {"split": split, "acceptance": report.acceptance, "money": report.money} | to_json(report)
            files.replace_text(
                folder / f"report_{split}.json", plain(json.dumps(record, ensure_ascii=False, indent=1)) + "\n"
            )
            files.replace_text(folder / f"report_{split}.md", question_report.markdown(report, split))
            os.replace(temporary, folder / f"{split}.jsonl")
        finally:
            temporary.unlink(missing_ok=True)
        return report

    def run(self) -> Iterator[Stream]:
        """Yields the streams with questions for each of their chunks, in their order.

        Raises:
            BudgetError: more was used than the budget allows. Replies from a file count as well, so that a limit holds
                for a job and not for each of its runs.
        """
        try:
            while self._admit():
                while self._open and self._open[0].is_done:
                    yield self._close(self._open.popleft())
                if self._in_flight:
                    for receive, reply in self._collect():
                        receive(reply)
        except BaseException as error:
            for pending in self._pending.values():
                if isinstance(error, BudgetError):
                    pending.collect(wait=False)  # What has been paid for goes on file.
                pending.cancel_all()
            raise

    def _admit(self) -> bool:
        """Begins with as many chunks as may be worked on together; returns whether there is anything left to do."""
        limit = self._options.chunks_in_flight
        while self._in_flight < limit:
            if not self._open or self._open[-1].next_step == len(self._open[-1].stream.chunks):
                if self._loaded == len(self._streams) or len(self._open) >= _OPEN_STREAMS * limit:
                    break
                self._open.append(_OpenStream(self._streams[self._loaded], self._options))
                self._loaded += 1
            stream = self._open[-1]
            chunk = _OpenChunk(stream, stream.next_step, self._options)
            stream.next_step += 1
            stream.open.append(chunk)
            self._in_flight += 1
            self._go_on(chunk)
        return bool(self._open) or self._loaded < len(self._streams)

    def _collect(self) -> list[tuple[Callable[[str], None], str]]:
        """Takes replies of either model; neither is waited for while the other could go on."""
        busy = {name: pending for name, pending in self._pending.items() if pending.busy}
        if found := [reply for pending in busy.values() for reply in pending.collect(wait=False)]:
            return found
        # Who works in this process works while it is waited for, and by turns.
        self._pending = dict(reversed(self._pending.items()))
        here = [name for name in self._pending if name in busy and name not in self._servers]
        if here or len(busy) == 1:
            return busy[(here or list(busy))[0]].collect(wait=True)
        time.sleep(_PAUSE)
        return []

    # ---------------------------------------------------------------------------------- one chunk

    def _go_on(self, chunk: _OpenChunk) -> None:
        """Does all that can be done for a chunk, and for those behind it in the stream that wait for it."""
        self._select(chunk)
        waiting = chunk.stream.open
        while waiting and waiting[0].is_ready:
            first = waiting[0]
            if not first.is_settling:
                first.is_settling = True
                for candidate in first.with_fate(KEPT):
                    if first.stream.asked.holds_like(candidate.worded):
                        candidate.fate = "duplicate"
                self._select(first)
            if first.is_ready:
                self._finish(waiting.popleft())

    def _select(self, chunk: _OpenChunk) -> None:
        """Decides on near-duplicates, and asks for what is needed further."""
        options = self._options
        kept = [candidate.worded for candidate in chunk.with_fate(KEPT)]

        def like_any(others: Iterable[Worded]) -> bool:
            return any(proposals.alike(worded, other, options.duplicate) for other in others)

        before = [Worded.of(question.text, question.answers) for question in chunk.existing] + kept
        possible: list[Worded] = []
        for candidate in chunk.with_fate(""):
            if len(kept) + len(possible) >= chunk.needed:
                break
            worded = candidate.worded
            if like_any(before) or (chunk.is_settling and chunk.stream.asked.holds_like(worded)):
                candidate.fate = "duplicate"
                continue
            if not candidate.is_asked and not like_any(possible):
                candidate.is_asked = True
                (self._ask_closed_book if options.closed_book else self._verify)(chunk, candidate)
            possible.append(worded)
        is_short = len(kept) + len(chunk.with_fate("")) < chunk.needed
        if is_short and not chunk.is_proposing and chunk.rounds < options.rounds:
            self._propose(chunk)

    def _propose(self, chunk: _OpenChunk) -> None:
        chunk.rounds += 1
        chunk.is_proposing = True

        def receive(reply: str) -> None:
            chunk.is_proposing = False
            chunk.add(proposals.parse(reply), self._options)
            self._go_on(chunk)

        self._ask("generator", self._options.generator_chat(chunk.chunk.text, chunk.rounds), receive)

    def _ask_closed_book(self, chunk: _OpenChunk, candidate: _Candidate) -> None:
        def receive(reply: str) -> None:
            if self._answers(chunk, candidate, reply):
                candidate.fate = "closed_book"
                self._go_on(chunk)
            else:
                self._verify(chunk, candidate)

        self._ask("verifier", self._options.closed_book_chat(candidate.proposal.question), receive)

    def _verify(self, chunk: _OpenChunk, candidate: _Candidate) -> None:
        def receive(reply: str) -> None:
            candidate.fate = KEPT if self._answers(chunk, candidate, reply) else "unanswerable"
            self._go_on(chunk)

        chat = self._options.verifier_chat(chunk.chunk.text, candidate.proposal.question)
        self._ask("verifier", chat, receive)

    def _answers(self, chunk: _OpenChunk, candidate: _Candidate, reply: str) -> bool:
        """Notes a reply; returns whether it answers the candidate's question."""
        candidate.reply = (chat_lib.after_thinking(reply) or "").strip()
        return scoring.score(candidate.reply, self._question(chunk, candidate)) >= self._options.min_score

    def _question(self, chunk: _OpenChunk, candidate: _Candidate) -> Question:
        question, answer = candidate.proposal
        return Question(question, (answer,), self._options.metric, (chunk.step,), KIND)

    # ---------------------------------------------------------------------------------- the budget

    def _ask(self, name: str, chat: Chat, receive: Callable[[str], None]) -> None:
        def count_and_receive(reply: str) -> None:
            self._spend(f"{name}_new", self._count_tokens(reply))
            receive(reply)

        self._spend(f"{name}_prompt", self._count(chat))
        self.report.chats[name] += 1
        self._pending[name].submit(chat, count_and_receive)

    def _spend(self, field: str, count: int) -> None:
        report, options = self.report, self._options
        setattr(report.tokens, field, getattr(report.tokens, field) + count)
        if name := costs.exceeded(options, report.tokens, report.money):
            raise BudgetError(
                f"questions.{name}={getattr(options, name):,} is used up after {report.chunks:,} of "
                f"{self._estimate.chunks:,} chunks, with {report.kept:,} questions kept: {report.tokens.total:,} "
                f"tokens, money {report.money:,.2f}. The same command with a higher questions.{name} goes on; what is "
                "in the file of answers is not asked again, but counts."
            )

    # ---------------------------------------------------------------------------------- the results

    def _finish(self, chunk: _OpenChunk) -> None:
        stream, options, report = chunk.stream, self._options, self.report
        for candidate in chunk.with_fate(""):
            candidate.fate = "surplus"
        kept = chunk.with_fate(KEPT)
        for candidate in kept:
            stream.asked.add(candidate.worded)
        for i, candidate in enumerate(chunk.candidates):
            report.proposed += 1
            if candidate.fate != KEPT:
                report.rejected[candidate.fate] += 1
            question, answer = candidate.proposal
            example = Example(stream.stream.stream_id, chunk.step, question, answer, candidate.reply)
            key = random_key(stream.stream.stream_id, chunk.step, i)
            stream.examples.setdefault(candidate.fate, []).append((key, example))
        for fate, examples in stream.examples.items():
            stream.examples[fate] = _least(examples, options.samples)
        questions = (*chunk.existing, *(self._question(chunk, candidate) for candidate in kept))
        stream.done.append(Chunk(chunk.chunk.text, questions))
        report.chunks += 1
        report.kept += len(kept)
        report.existing += len(chunk.existing)
        report.full += len(questions) >= options.keep
        report.partial += 0 < len(questions) < options.keep
        report.empty += not questions
        self._in_flight -= 1
        if self._progress:
            self._progress(report.chunks, self._estimate.chunks)

    def _close(self, stream: _OpenStream) -> Stream:
        """Returns the stream with its new questions; its examples compete for their places in the report."""
        report = self.report
        report.streams += 1
        for fate, examples in stream.examples.items():
            # The first of every stream before the second of any.
            ranked = [((rank, key), example) for rank, (key, example) in enumerate(examples)]
            self._examples[fate] = _least([*self._examples.get(fate, ()), *ranked], self._options.samples)
            report.examples[fate] = [example for _, example in self._examples[fate]]
        return dataclasses.replace(stream.stream, chunks=tuple(stream.done))


def _least(pairs: Iterable[tuple[Any, Example]], count: int) -> list[tuple[Any, Example]]:
    return sorted(pairs, key=lambda pair: pair[0])[:count]
