"""Runs --mode=questions: makes chunk questions for the streams of a config, and writes streams that training reads."""

from __future__ import annotations

import contextlib
import pathlib
import time

from finemem_jax import build as build_lib
from finemem_jax import input_pipeline
from finemem_jax.clients import chat
from finemem_jax.clients.language_models import LanguageModels
from finemem_jax.config import checks
from finemem_jax.config.sections import Config
from finemem_jax.memory import build
from finemem_jax.models.tokenizer import Tokenizer
from finemem_jax.questions import costs
from finemem_jax.questions.options import QuestionOptions
from finemem_jax.questions.pipeline import Models, Pipeline, Progress
from finemem_jax.questions.report import Report
from finemem_jax.runtime import checkpoint
from finemem_jax.runtime.display import Display

# Between two lines of progress where there is no terminal (s).
_QUIET = 30.0


def run(config: Config, workdir: pathlib.Path) -> list[str]:
    """Makes questions for every split; returns what to say in the end.

    What is in `WORKDIR/questions` stays until the same split is done anew. A command that was stopped goes on where it
    was: what has been asked stands on file.

    Raises:
        ValueError: settings, streams or a budget that will not do; nothing has been asked then.
        BudgetError, EndpointError: the budget is used up, or no server answers; the same command goes on.
    """
    options, prices = options_of(config), checks.prices(config)
    loaded = build_lib.load(config)
    environment = build.environment(config, loaded.tokenizer)
    splits = [name.strip() for name in config.questions.splits.split(",")]
    streams = {split: input_pipeline.streams(config, split, environment) for split in splits}
    for split, found in streams.items():
        if not len(found):
            raise ValueError(f"There are no streams of the split {split!r}; set questions.splits to those there are.")
    checkpoint.check(workdir, config)
    checkpoint.claim(workdir, config)
    folder, lines = workdir / "questions", []
    roles = {"generator": config.questions.generator, "verifier": config.questions.verifier}
    with contextlib.closing(LanguageModels(config, build_lib.frozen(config, loaded), workdir)) as models:
        asked = Models(
            **{name: models.model(f"questions.{name}", role) for name, role in roles.items()},
            count_tokens=environment.count_tokens,
            prices=prices,
            servers=[name for name, role in roles.items() if role.kind == "server"],
        )
        if models.generates:
            _warm_up(models, environment.tokenizer, options, chunk_tokens=config.manager.chunk_tokens)
        for split, found in streams.items():
            print(f"{split}: {costs.estimate(found, options, environment.count_tokens, prices=prices)}", flush=True)
        with Display(0) as display:
            for split, found in streams.items():
                report = Pipeline(found, options, asked, progress=_progress(display, split)).write(folder, split)
                lines += _closing_lines(folder, split, report)
    return [*lines, f"train on them  --config.data.name=streams --config.data.source_dir={folder}"]


def options_of(config: Config) -> QuestionOptions:
    """Takes the options from the settings.

    Raises:
        ValueError: a setting that cannot be.
    """
    return QuestionOptions(**vars(config.questions), seed=config.seed)


def _warm_up(models: LanguageModels, tokens: Tokenizer, options: QuestionOptions, *, chunk_tokens: int) -> None:
    prompts = [chat.encode(tokens, one) for one in (options.generator_chat("", 1), options.verifier_chat("", ""))]
    shared_prefix = max(prompt.cuts[0] for prompt in prompts)
    own = max(len(prompt.ids) - prompt.cuts[0] for prompt in prompts)
    positions = own + chunk_tokens + max(options.proposal_tokens, options.answer_tokens + 64)
    with Display(0) as display:
        models.sampler().warm_up(
            shared_prefix, positions, lambda done, total: display.phase(f"compiling: {done} of {total} programs")
        )


def _progress(display: Display, split: str) -> Progress:
    said = began = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        display.phase(f"{split}: {done:,} of {total:,} chunks")
        if time.monotonic() - said > _QUIET:
            said = time.monotonic()
            display.say(f"{split}: {done:,} of {total:,} chunks in {said - began:.0f} s")

    return progress


def _closing_lines(folder: pathlib.Path, split: str, report: Report) -> list[str]:
    return [
        f"{split:14} {report.kept:,} questions kept of {report.proposed:,} proposed ({report.acceptance:.1%}); of "
        f"{report.chunks:,} chunks {report.full:,} have all, {report.empty:,} none; {report.tokens.total:,} tokens, "
        f"money {report.money:,.2f}",
        f"{'':14} {folder}/{split}.jsonl, to read: report_{split}.md",
    ]
