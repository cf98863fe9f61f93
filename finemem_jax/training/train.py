"""Training: one loop, six calls per step, in the order of the paper."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finemem_jax import build as build_lib
from finemem_jax import config as config_lib
from finemem_jax import input_pipeline
from finemem_jax.build import Components
from finemem_jax.clients.endpoint import EndpointError
from finemem_jax.config.sections import Config
from finemem_jax.evaluation import evaluate
from finemem_jax.input_pipeline import Mixture
from finemem_jax.memory import build
from finemem_jax.models import logical_axes, lora, sharding
from finemem_jax.models.decoder import Params
from finemem_jax.reading import answering
from finemem_jax.rl import batching, learner, records, rewards, rollout
from finemem_jax.rl.batching import Batch
from finemem_jax.rl.learner import LearnerOptions
from finemem_jax.rl.method import Method, reward_sizes, rollout_options, with_likelihoods
from finemem_jax.runtime import checkpoint, compilation, files
from finemem_jax.runtime import metric_writer as metric_writer_lib
from finemem_jax.runtime.display import Display
from finemem_jax.runtime.distributed import StoppedByPeer
from finemem_jax.runtime.preemption import Interrupt
from finemem_jax.runtime.watchdog import StopError, Watchdog
from finemem_jax.training import metrics, precompile
from finemem_jax.types import Trajectory


def train(
    config: Config, workdir: pathlib.Path, parts: Components, train_streams: Mixture, test_streams: Mixture
) -> None:
    """Trains the manager, from the workdir's newest checkpoint if it has one.

    Where several processes train together, each rolls out its share of the streams; then all have all trajectories, and
    do the same with them. The first one writes.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM (`Terminated`), once a checkpoint is saved.
        EndpointError: servers that answer questions do not; likewise.
        StopError: the host's memory or the gradients have gone beyond their bounds; likewise.
        PeerError: another process is missing or has failed.
        OSError: something cannot be written; checkpoints are as they were.
    """
    began, processes = time.monotonic(), parts.processes
    method, sizes = Method.from_config(config), reward_sizes(config)
    compute, remark = build_lib.compute(config, parts.mesh)
    options = LearnerOptions(parts.model, compute, method.objective)
    tx = learner.make_optimizer(config.optimizer)
    sampling = rollout_options(config, evaluation=False)
    stages = input_pipeline.stages(config, parts.environment, train_streams)
    share = processes.index, processes.count
    batches = input_pipeline.training_order(stages, config.seed, config.rollout.streams_per_step, share)
    # The learner takes the trained arrays over; the samplers hold their own copies.
    frozen, trained = lora.split(parts.params)
    reference = _reference(config, frozen or trained)
    state = learner.init(trained, tx)

    with (
        Display(config.train.num_steps, silent=not processes.is_first) as display,
        _checkpoints(config, workdir, display, processes) as checkpoints,
        metric_writer_lib.MetricWriter(workdir, silent=not processes.is_first) as metric_writer,
        Interrupt(processes) as interrupt,
        _looking_up(parts, interrupt.check),
    ):
        check = interrupt.check_together
        if remark:
            display.say(remark)
        step, saved_position, measures = 0, batches.get_state(), {}
        guard = Watchdog(config, workdir)
        if checkpoints.latest is not None:
            state, step, saved_position = checkpoints.restore(state)
            batches.set_state(saved_position)
            display.say(f"continuing {workdir} after step {step}")
        metric_writer.rewind(step)
        parts.manager.update(build_lib.policy_params(parts, frozen, state.params), step)
        compiled = compilation.counts()
        try:

            def compiling(line):
                interrupt.check()
                display.phase(line)

            build_lib.warm_up(config, parts, compiling)
            if config.train.precompile:
                _precompile(config, parts, options, tx, frozen, state, reference, method, compiling)
            if step == 0 and config.train.evaluate_first:
                display.phase("evaluating before training")
                _evaluate(config, workdir, parts, test_streams, "before", display, step)
            while step < config.train.num_steps:
                interrupt.check()
                # Not at the end of the step, so that a run that was killed meanwhile makes up for it.
                _evaluate_if_due(config, workdir, parts, test_streams, display, step)
                step_began = time.monotonic()
                saved_position = batches.get_state()
                streams = next(batches)

                display.phase(f"step {step + 1}: rollouts and reader")
                _begin_anew(parts)
                mine = rollout.run(
                    streams, with_likelihoods(config, sampling, step), parts.players, (config.seed, "train", step)
                )
                trajectories, costs = _together(parts, mine)
                # From here on all processes do the same: what one gave up alone, the others would wait for.
                interrupt.updating = processes.count > 1
                starting = _score_all(config, parts, options, reference, trajectories, check)
                kl = _divergence(trajectories, starting) if config.credit.kl_weight else None
                needs = method.rule.needs
                inputs = rewards.to_arrays(trajectories, parts.environment.count_tokens, kl, sizes=sizes, needs=needs)
                credit = dataclasses.replace(method.credit, likelihood_share=answering.chunk_share(config, step))
                earned, compared = rewards.compute(inputs, credit, method.normalizer)
                advantages, factors = rewards.per_token(trajectories, compared, sizes.tokens)
                groups = batching.groups(
                    trajectories, advantages, compared.alive,
                    drop_dead=config.objective.drop_dead_groups,
                    drop_truncated=config.objective.drop_truncated,
                    unclipped_factors=factors if method.credit.type_factor_on == "unclipped" else None,
                )  # fmt: skip
                whole = lora.combine(frozen, state.params)
                groups = _with_log_probs(config, parts, options, whole, groups, starting, check)

                display.phase(f"step {step + 1}: update")
                update_began = time.monotonic()
                loss_metrics: dict[str, float] = {}
                # The sampler's copy is about to be out of date, and the update needs the memory.
                parts.manager.offload()
                for number, minibatch in enumerate(_minibatches(config, parts, groups, step)):
                    batches_of_it = _until_updating(minibatch, interrupt) if number == 0 else minibatch
                    state, measured = learner.update(
                        options, tx, frozen, state, batches_of_it, config.rollout.temperature
                    )
                    guard.observe(step, minibatch, measured)
                    loss_metrics = metrics.of_sampler_difference(groups, measured) | loss_metrics | measured
                loss_metrics["loss/skipped_updates"] = guard.skipped_in(step)
                step, saved_position = step + 1, batches.get_state()
                parts.manager.update(build_lib.policy_params(parts, frozen, state.params), step)
                interrupt.updating = False

                now = time.monotonic()
                measures = metrics.of_rewards(inputs, earned, compared) | metrics.of_operations(trajectories)
                measures |= loss_metrics | metrics.of_answers(trajectories)
                measures |= costs
                measures |= metrics.of_compilation(compiled)
                compiled = compilation.counts()
                measures["time/update_seconds"] = now - update_began
                measures["time/step_seconds"] = now - step_began
                measures["memory/peak_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                measures["memory/host_gigabytes"] = guard.memory()
                _write_trajectories(workdir, step, trajectories, inputs, earned, compared, parts)
                metric_writer.write(step - 1, measures)
                display.step(step - 1, measures)

                limit = config.train.stop_after_seconds
                late = limit > 0 and processes.broadcast(now - began > limit)
                done = step == config.train.num_steps or late
                if done or step % config.train.checkpoint_every == 0:
                    if _ranks_by_evaluation(config) and not done:
                        _evaluate_if_due(config, workdir, parts, test_streams, display, step)
                    checkpoints.save(step, state, saved_position, _ranking(config, workdir, processes, measures))
                guard.check(processes)
                if done:
                    if step < config.train.num_steps:
                        display.say(f"stopping after step {step}: train.stop_after_seconds={limit} have passed")
                    break
            display.phase("evaluating after training")
            _evaluate(config, workdir, parts, test_streams, "after", display, step)
        except (KeyboardInterrupt, EndpointError, StopError) as reason:
            if not isinstance(reason, (StoppedByPeer, StopError)):
                processes.stop(f"{type(reason).__name__} {reason}".strip())
            checkpoints.save(step, state, saved_position, _ranking(config, workdir, processes, measures))
            stopped = {EndpointError: "no answer", StopError: "stopped"}.get(type(reason), "interrupted")
            display.say(f"{stopped}: step {step} is saved; the same command continues from there")
            raise


def state_shapes(config: Config, parts: Components) -> Any:
    """Shapes of what training changes: the parameters, and what the optimizer keeps of them."""
    trained = lora.split(parts.params)[1]
    tx = learner.make_optimizer(config.optimizer)
    return jax.eval_shape(lambda params: (params, tx.init(params)), trained)


def _checkpoints(config: Config, workdir, display, processes):
    asked = config.train
    return checkpoint.Checkpoints(
        workdir, asked.keep_checkpoints, asked.keep_best, asked.best_metric, display.say, processes,
        config_lib.flatten(config),
    )  # fmt: skip


def _together(parts: Components, mine: list[list[Trajectory]]) -> tuple[list[list[Trajectory]], dict[str, float]]:
    """All processes' groups, in the order in which one process alone has them, and what making them has cost."""
    costs = parts.manager.take_stats(), parts.answering.take_stats(), parts.answering.take_metrics()
    shares, managers, readers, others = zip(*parts.processes.all_gather((mine, *costs)), strict=True)
    measures = metrics.of_samplers(metrics.together(managers), metrics.together(readers)) | metrics.mean(others)
    return input_pipeline.interleave(shares), measures


def _begin_anew(parts):
    """Has samplers start as they do in a run that goes on from here: what is drawn is then the same to the last bit."""
    parts.manager.reset()
    parts.answering.reset()


def _ranks_by_evaluation(config: Config):
    return config.train.keep_best > 0 and config.train.best_metric.removeprefix("-").startswith("evaluation/")


def _ranking(config: Config, workdir, processes, measures):
    """What checkpoints can be told apart by: a step's metrics, and the newest evaluation's means; None for nothing."""
    evaluations = sorted(read_evaluations(workdir).values(), key=lambda one: one["step"])
    newest = evaluations[-1]["estimates"] if evaluations else {}
    if not measures or (_ranks_by_evaluation(config) and not processes.broadcast(newest)):
        return None
    return measures | {
        f"evaluation/{name}": e["mean"] for name, e in processes.broadcast(newest).items() if e["mean"] is not None
    }


def _until_updating(minibatch, interrupt):
    """The first update of a step can be given up as long as it only adds up gradients."""
    for batch in minibatch:
        interrupt.check_together()
        yield batch
    interrupt.check_together()
    interrupt.updating = True


@contextlib.contextmanager
def _looking_up(parts: Components, check: Callable[[], None]) -> Iterator[None]:
    """Has all that work on rollouts look for Ctrl-C and SIGTERM again and again."""
    parts.manager.poll = check
    parts.answering.set_poll(check)
    try:
        yield
    finally:
        parts.manager.poll = lambda: None
        parts.answering.set_poll(lambda: None)


def _reference(config: Config, params: Params) -> Params | None:
    """The starting weights without adapters, if anything is compared with them.

    A copy as large as the model where all of it is trained; the frozen base itself where adapters are.
    """
    if not (config.objective.kl_weight or config.credit.kl_weight):
        return None
    return params if config.lora.rank else jax.tree.map(jnp.copy, params)


# Log-probabilities of responses, by (stream, step), one array for each rollout.
LogProbs = dict[tuple[int, int], tuple[np.ndarray, ...]]


def _score(config: Config, parts, options, params, groups, check) -> LogProbs:
    """log π of all response tokens of some groups under given weights."""
    found: LogProbs = {}
    for batch, packed in _microbatches(config, parts, groups):
        check()
        temperature = np.float32(config.rollout.temperature)
        scored = compilation.call(learner.score, params, _place(parts, batch), temperature, options=options)
        at = iter(sharding.whole(scored))
        for group in packed:
            found[group.stream, group.step] = tuple(next(at)[: len(step.completion.ids)] for step in group.steps)
    return found


def _score_all(config: Config, parts, options, reference, trajectories, check) -> LogProbs:
    """log π_ref of every response, dead groups' too; nothing where no reference is needed."""
    if reference is None:
        return {}
    shape = (len(trajectories), len(trajectories[0]), max(len(group[0].steps) for group in trajectories))
    nothing = np.zeros((*shape, config.rollout.max_new_tokens), np.float32)
    groups = batching.groups(trajectories, nothing, np.ones(shape[::2], bool), drop_dead=False)
    return _score(config, parts, _without_adapters(options), reference, groups, check)


def _divergence(trajectories, starting: LogProbs):
    """[s][i][t]: Σ over a response's tokens of log π_old - log π_ref, the k1 estimate of the KL, in nats."""
    return [
        [
            [sum(step.completion.log_probs) - float(starting[s, t][i].sum()) for t, step in enumerate(one.steps)]
            for i, one in enumerate(rollouts)
        ]
        for s, rollouts in enumerate(trajectories)
    ]


def _with_log_probs(config: Config, parts, options, params, groups, starting: LogProbs, check):
    """Adds to the groups what the objective compares the policy with, beyond the sampler's log-probabilities."""
    if config.objective.kl_weight:
        groups = [group._replace(reference_log_probs=starting[group.stream, group.step]) for group in groups]
    if _scores_policy(config):
        old = _score(config, parts, options, params, groups, check)
        groups = [group._replace(old_log_probs=old[group.stream, group.step]) for group in groups]
    return groups


def _scores_policy(config: Config):
    # The sampler's log-probabilities are the policy's only where it may draw any token, with the policy's own weights.
    cut = config.rollout.top_k or config.rollout.top_p < 1
    return config.objective.importance_cap or config.sampler.int8 or cut


def _without_adapters(options):
    return dataclasses.replace(options, model=lora.without(options.model))


def _precompile(config: Config, parts, options, tx, frozen, state, reference, method, say):
    scored = [] if reference is None else [(_without_adapters(options), reference, False)]
    if _scores_policy(config):
        scored.append((options, lora.combine(frozen, state.params), True))
    precompile.updates(config, parts, options, tx, frozen, state, scored, say)
    precompile.credit(config, method)


def _minibatches(
    config: Config, parts: Components, groups: Sequence[batching.Group], step: int
) -> Iterator[list[Batch]]:
    """The optimizer updates of one training step, each as a list of micro-batches. At least one, maybe empty."""
    for epoch in range(config.train.epochs):
        shuffled = list(groups)
        random.Random(f"{config.seed}/{step}/{epoch}").shuffle(shuffled)
        size = max(1, math.ceil(len(shuffled) / config.train.minibatches))
        for start in range(0, max(len(shuffled), 1), size):
            packed = _microbatches(config, parts, shuffled[start : start + size])
            yield [_place(parts, batch) for batch, _ in packed]


def _microbatches(config: Config, parts, groups):
    return batching.microbatches(
        groups,
        config.train.groups_per_microbatch,
        config.train.length_multiple,
        config.rollout.max_new_tokens,
        parts.tokenizer.end_ids[0],
        config.objective.aggregation,
        logical_axes.size(parts.mesh, logical_axes.ROWS),
        build.prompt_lengths(config, parts.environment).trunk,
    )


def _place(parts, batch):
    return jax.tree.map(lambda array: sharding.put(array, sharding.rows(parts.mesh, len(array))), batch)


def read_evaluations(workdir: pathlib.Path) -> dict[str, Any]:
    """The workdir's `evaluation.json`; empty if there is none."""
    path = workdir / "evaluation.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _evaluate_if_due(config: Config, workdir, parts, test_streams, display, step):
    if step and config.train.evaluate_every and step % config.train.evaluate_every == 0:
        display.phase("evaluating on held-out streams")
        _evaluate(config, workdir, parts, test_streams, f"step {step}", display, step)


def _evaluate(config: Config, workdir, parts, test_streams, name, display, step):
    """Evaluates greedily on all held-out streams, unless that was done, and adds the result to `evaluation.json`."""
    processes = parts.processes
    if processes.broadcast(read_evaluations(workdir).get(name, {}).get("step") == step):
        return
    _begin_anew(parts)
    options = rollout_options(config, evaluation=True, constraint=parts.constraint)
    streams = [test_streams[i] for i in range(processes.index, len(test_streams), processes.count)]
    mine = evaluate.run(streams, options, parts.players, (config.seed, "evaluate"))
    trajectories = input_pipeline.interleave(processes.all_gather(mine))
    # What evaluation sampled must not count among the next step's tokens.
    parts.manager.take_stats()
    parts.answering.take_stats()
    parts.answering.take_metrics()
    if not processes.is_first:
        return
    lines = (records.evaluated(trajectory, parts.tokenizer.decode) for trajectory in trajectories)
    files.write_records(workdir / "evaluations" / f"{name.replace(' ', '_')}.jsonl.gz", lines)
    found = read_evaluations(workdir) | {name: {"step": step, **evaluate.summary(trajectories, parts.environment)}}
    files.replace_text(workdir / "evaluation.json", json.dumps(found, indent=1) + "\n")
    means = found[name]["estimates"]
    shown = " · ".join(
        f"{title} {means[metric]['mean']:.3f}" for metric, title in evaluate.METRICS.items() if means[metric]["n"]
    )
    display.say(f"held-out, {name}: {shown}")


def _write_trajectories(workdir, step, trajectories, inputs, earned, compared, parts):
    if not parts.processes.is_first:
        return
    decode = parts.tokenizer.decode
    lines = records.trajectories(trajectories, inputs, earned, advantages=compared, decode=decode)
    files.write_records(workdir / "trajectories" / f"step_{step:06d}.jsonl.gz", lines)


def closing_lines(workdir: pathlib.Path) -> list[str]:
    """Where to look next."""
    return [
        f"metrics        {workdir}/metrics.jsonl   (tensorboard --logdir {workdir})",
        f"trajectories   {workdir}/trajectories/   every prompt, operation, reward and advantage",
        f"evaluation     {workdir}/evaluation.json, {workdir}/evaluations/",
        f"checkpoints    {workdir}/checkpoints/   the same command with a larger --config.train.num_steps goes on",
    ]
