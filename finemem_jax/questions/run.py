"""`--mode=questions`: makes chunk questions for the streams of a config, and writes streams that training reads."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable

from finemem_jax import build as build_lib
from finemem_jax import input_pipeline
from finemem_jax.clients import chat
from finemem_jax.clients.language_models import LanguageModels
from finemem_jax.config import checks
from finemem_jax.config.sections import Config
from finemem_jax.memory import build
from finemem_jax.questions import costs, pipeline
from finemem_jax.questions import options as question_options
from finemem_jax.questions.options import QuestionOptions
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
    models = LanguageModels(config, build_lib.frozen(config, loaded), workdir)
    with contextlib.closing(models):
        asked = config.questions
        generator = models.model("questions.generator", asked.generator)
        verifier = models.model("questions.verifier", asked.verifier)
        both = {"generator": asked.generator, "verifier": asked.verifier}
        servers = [name for name, role in both.items() if role.kind == "server"]
        if models.generates:
            _warm_up(models, environment, options, config)
        for split, found in streams.items():
            print(f"{split}: {costs.estimate(found, options, environment.count_tokens, prices)}", flush=True)
        with Display(0) as display:
            for split, found in streams.items():
                progress = _progress(display, split)
                report = pipeline.write(
                    folder,
                    split,
                    found,
                    options,
                    generator,
                    verifier,
                    environment.count_tokens,
                    prices,
                    progress,
                    servers,
                )
                lines += _closing_lines(folder, split, report)
    return [*lines, f"train on them  --config.data.name=streams --config.data.source_dir={folder}"]


def options_of(config: Config) -> QuestionOptions:
    """What the settings ask for.

    Raises:
        ValueError: a setting that cannot be.
    """
    return QuestionOptions(**vars(config.questions), seed=config.seed)


def _warm_up(models, environment, options, config: Config):
    sampler = models.sampler()
    chats = (question_options.generator_chat(options, "", 1), question_options.verifier_chat(options, "", ""))
    prompts = [chat.encode(environment.tokenizer, one) for one in chats]
    shared_prefix = max(prompt.cuts[0] for prompt in prompts)
    own = max(len(prompt.ids) - prompt.cuts[0] for prompt in prompts)
    with Display(0) as display:
        sampler.warm_up(
            shared_prefix,
            own + config.manager.chunk_tokens + max(options.proposal_tokens, options.answer_tokens + 64),
            lambda done, total: display.phase(f"compiling: {done} of {total} programs"),
        )


def _progress(display, split) -> Callable[[int, int], None]:
    said = began = time.monotonic()

    def progress(done, total):
        nonlocal said
        display.phase(f"{split}: {done:,} of {total:,} chunks")
        if time.monotonic() - said > _QUIET:
            said = time.monotonic()
            display.say(f"{split}: {done:,} of {total:,} chunks in {said - began:.0f} s")

    return progress


def _closing_lines(folder, split, report: Report):
    return [
        f"{split:14} {report.kept:,} questions kept of {report.proposed:,} proposed ({report.acceptance:.1%}); of "
        f"{report.chunks:,} chunks {report.full:,} have all, {report.empty:,} none; {report.tokens.total:,} tokens, "
        f"money {report.money:,.2f}",
        f"{'':14} {folder}/{split}.jsonl, to read: report_{split}.md",
    ]
