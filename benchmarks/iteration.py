"""Compares one whole GRPO iteration of SmolLM2-135M-Instruct with TRL's GRPOTrainer on PyTorch: time.

    python benchmarks/iteration.py [--repeats=3]

An iteration samples 8 replies of at most 80 tokens to each of two prompts, rewards them, compares each with its group,
and makes one AdamW update of all weights, in float32; the next one samples with what came out. The prompts are the
manager's own: two one-chunk streams of experiments/smollm2_135m.py behind its instructions and two worked examples.

TRL reads weights and tokenizer from the Hugging Face folder that ours exports. Both encode the prompts to the same ids,
draw at the same temperature, stop at the same end token, call the same `reward`, and train on all replies, those of
groups without a difference too. How likely they find a given reply is compared before anything is timed. Ours makes the
calls that training makes; `Theirs` says what of TRL's settings is not its own.

Each side is a process of its own, and they take turns; times are of the second iteration on. Replies end where the
model ends them: sampled tokens are counted, and a second ratio is of seconds per token.
"""

from __future__ import annotations

import gc
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import _common as common
import jax
import numpy as np

from experiments import smollm2_135m
from finemem_jax import build, input_pipeline
from finemem_jax import config as config_lib
from finemem_jax.config.sections import Config
from finemem_jax.memory import operations
from finemem_jax.models import tokenizer
from finemem_jax.rl import batching, grpo, learner
from finemem_jax.rl.method import Method
from finemem_jax.types import Completion, Memory, Operation, Request, Step, random_key
from finemem_jax.weights import hf_weights

GROUP_SIZE, MAX_NEW_TOKENS = 8, 80
SCORED = '{"name": "memory_insert", "arguments": {"content": "Nadia plays the flute."}}'


def reward(text: str, answers: Sequence[str]) -> float:
    """Adds the share of valid operations in a reply and the share of a chunk's gold answers in what these store."""
    written = operations.parse(text)
    valid = [one for one in written if isinstance(one, Operation)]
    stored = "\n".join(one.content for one in valid).lower()
    return len(valid) / max(len(written), 1) + sum(answer.lower() in stored for answer in answers) / len(answers)


def settings() -> Config:
    """Returns the experiment's settings, but for sizes, one update an iteration, and that equal groups stay."""
    config = smollm2_135m.get_config()
    config.data.chunks_per_stream = config.train.minibatches = 1
    config.rollout.group_size, config.rollout.max_new_tokens = GROUP_SIZE, MAX_NEW_TOKENS
    return config_lib.parse(config)


def make_prompts(parts: build.Components, config: Config) -> list[dict[str, Any]]:
    """Makes the prompts, each a row of TRL's data; `ids` and `cuts` are for our sampler."""
    streams, tokens = input_pipeline.streams(config, "train", parts.environment), parts.tokenizer
    prompts: list[dict[str, Any]] = []
    for chunk in (streams[i].chunks[0] for i in range(config.rollout.streams_per_step)):
        chat = parts.environment.observe(chunk, Memory())
        # We encode a prompt part by part, which gives other ids than its whole text does. Here both take the text's.
        starts = [tokens.decode(chat.ids[:cut]) for cut in chat.cuts]
        encoded = [tokens.encode_template(start) for start in starts]
        cuts = [len(os.path.commonprefix([start, encoded[-1]])) for start in encoded]  # noqa: RUF071
        answers = [question.answers[0] for question in chunk.questions]
        prompts.append({"prompt": starts[-1], "ids": encoded[-1], "cuts": cuts, "answers": answers})
    return prompts


class Ours:
    """Our sampler and learner, as training calls them."""

    def __init__(self, folder: pathlib.Path):
        """Builds them, and writes what TRL reads into `folder`."""
        self.config = settings()
        self.parts, self.method = build.build(self.config), Method.from_config(self.config)
        self.prompts = make_prompts(self.parts, self.config)
        (folder / "prompts.json").write_text(json.dumps(self.prompts), encoding="utf-8")
        hf_weights.save(folder / "model", self.parts.model, self.parts.params, tokenizer=self.parts.tokenizer)
        compute, _ = build.compute(self.config, self.parts.mesh)
        options = learner.LearnerOptions(self.parts.model, compute, self.method.objective)
        temperature = np.float32(self.config.rollout.temperature)
        self.learner = learner.Learner({}, temperature, options, learner.make_optimizer(self.config.optimizer))
        scored = self.parts.tokenizer.encode(SCORED)
        reply = Completion(tuple(scored), (0.0,) * len(scored), "length", 0)
        [batch] = self.batches([[reply] * GROUP_SIZE] * len(self.prompts))
        log_probs = learner.score(self.parts.params, batch, np.float32(1), options=options)
        self.mean = float(log_probs[:, : len(scored)].mean())
        self.state = learner.init(self.parts.params, self.learner.optimizer)

    def sample(self, number: int) -> list[list[Completion]]:
        """Draws a list of completions for each prompt."""
        requests = [
            Request(
                tuple(prompt["ids"]), tuple(prompt["cuts"]), MAX_NEW_TOKENS, self.config.rollout.temperature,
                random_key(number, s, i),
            )
            for s, prompt in enumerate(self.prompts)
            for i in range(GROUP_SIZE)
        ]  # fmt: skip
        found = common.completions(self.parts.manager.generate(requests))
        return [found[start : start + GROUP_SIZE] for start in range(0, len(found), GROUP_SIZE)]

    def batches(self, completions: Sequence[Sequence[Completion]]) -> list[batching.Batch]:
        """Rewards completions, compares them, and packs them for the update."""
        tokens, train = self.parts.tokenizer, self.config.train
        rewards: list[list[list[float]]] = []
        steps: list[list[Step]] = []
        for prompt, group in zip(self.prompts, completions, strict=True):
            texts = [tokens.decode(tokenizer.strip_end(tokens, one.ids)) for one in group]
            rewards.append([[reward(text, prompt["answers"])] for text in texts])
            steps.append([Step(tuple(prompt["ids"]), tuple(prompt["cuts"]), one, (), Memory()) for one in group])
        scores = np.asarray(rewards, np.float32)
        standardized, _ = grpo.standardize(scores, np.ones(scores.shape, bool), 1, self.method.normalizer)
        groups = []
        for s, group in enumerate(steps):
            advantages = np.asarray(standardized[s]).repeat(MAX_NEW_TOKENS, axis=1)
            each = tuple(row[: len(step.completion.ids)] for row, step in zip(advantages, group, strict=True))
            groups.append(batching.Group(s, 0, tuple(group), each, (True,) * len(group)))
        packing = batching.Packing(
            train.groups_per_microbatch, train.length_multiple, MAX_NEW_TOKENS, tokens.end_ids[0],
            self.config.objective.aggregation,
        )  # fmt: skip
        return [jax.device_put(batch) for batch, _ in batching.microbatches(groups, packing)]

    def run(self, turns: Iterator[int], tokens: list[int]) -> None:
        """Makes one iteration for each turn; appends how many tokens it sampled."""
        for number in turns:
            completions = self.sample(number)
            batches = self.batches(completions)
            self.parts.manager.offload()
            self.state, metrics = learner.update(self.learner, self.state, batches)
            assert metrics["policy/absolute_log_ratio"] < 1e-3, f"sampler and trainer disagree: {metrics}"
            self.parts.manager.update(self.state.params, number + 1)
            jax.block_until_ready(self.state.params)
            tokens.append(sum(len(one.ids) for group in completions for one in group))


class Theirs:
    """TRL's trainer, which samples with transformers' `generate`.

    From our config are the optimizer, the temperature, and the mean over replies (`loss_type`). Of the rest, only what
    must be is not TRL's own (the CPU, float32, sizes), and what makes it faster: nothing recomputed in the backward
    pass, no logs, no saving. The update's 16 rows are computed 4 at a time: at once they take 19 GB.
    """

    def __init__(self, folder: pathlib.Path):
        """Loads what `Ours` has written into `folder`."""
        packages = ("trl", "torch", "datasets")
        trl, torch, datasets = (common.peer(package, "pip install torch transformers trl") for package in packages)
        import transformers

        prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
        config, encoder = settings(), transformers.AutoTokenizer.from_pretrained(folder / "model")
        ids = encoder(text=[prompt["prompt"] for prompt in prompts])["input_ids"]
        assert ids == [prompt["ids"] for prompt in prompts], "both sides must have the same prompts"
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        scored = encoder(SCORED)["input_ids"]
        with torch.no_grad():
            rows = [model(torch.tensor([[*one, *scored]])).logits[0, len(one) - 1 : -1] for one in ids]
        log_probs = torch.stack(rows).log_softmax(-1)[:, range(len(scored)), scored]
        self.mean = float(log_probs.mean())
        most = 1_000  # Iterations; the benchmark stops long before.
        arguments = trl.GRPOConfig(
            output_dir=str(folder / "trl"), max_steps=most, use_cpu=True, bf16=False, num_generations=GROUP_SIZE,
            per_device_train_batch_size=4, gradient_accumulation_steps=len(prompts) * GROUP_SIZE // 4,
            shuffle_dataset=False,
            max_completion_length=MAX_NEW_TOKENS, temperature=config.rollout.temperature, beta=0.0, loss_type="grpo",
            learning_rate=config.optimizer.learning_rate, lr_scheduler_type="constant_with_warmup",
            warmup_steps=config.optimizer.warmup_steps, weight_decay=config.optimizer.weight_decay,
            adam_beta1=config.optimizer.b1, adam_beta2=config.optimizer.b2, max_grad_norm=config.optimizer.clip_norm,
            gradient_checkpointing=False, logging_strategy="no", save_strategy="no", report_to="none",
            disable_tqdm=True,
        )  # fmt: skip
        data = datasets.Dataset.from_list(prompts * most)
        self.trainer = trl.GRPOTrainer(model, self._rewards, arguments, data, processing_class=encoder)
        self._callback: Any = transformers.TrainerCallback

    def _rewards(
        self, completions: list[str], completion_ids: list[list[int]], answers: list[list[str]], **_: Any
    ) -> list[float]:
        self._tokens.append(sum(map(len, completion_ids)))
        return [reward(text, wanted) for text, wanted in zip(completions, answers, strict=True)]

    def run(self, turns: Iterator[int], tokens: list[int]) -> None:
        """Makes one iteration for each turn; appends how many tokens it sampled."""

        class TakeTurns(self._callback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                next(turns)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = next(turns, None) is None

        self._tokens = tokens
        self.trainer.add_callback(TakeTurns())
        self.trainer.train()


def work(side: str, folder: pathlib.Path) -> None:
    """Works as a worker: makes one iteration for each line it reads."""
    said, sys.stdout = sys.stdout, sys.stderr  # Whatever else is printed must not come between.
    worker = {"ours": Ours, "theirs": Theirs}[side](folder)
    tokens: list[int] = []
    print(json.dumps({"mean": worker.mean}), file=said, flush=True)

    def turns() -> Iterator[int]:
        # An iteration is what happens between two requests for a turn: TRL's loop is its own.
        for number, _ in enumerate(sys.stdin):
            gc.collect()
            gc.disable()
            began, used = time.perf_counter(), time.process_time()
            yield number
            measured = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}
            gc.enable()
            measured |= {"tokens": tokens[-1], "peak_gigabytes": common.peak_gigabytes()}
            print(json.dumps(measured), file=said, flush=True)

    worker.run(turns(), tokens)


def main() -> None:
    """Measures, and prints the claims."""
    parser = common.parser(__doc__, repeats=3)
    parser.add_argument("--side", choices=["ours", "theirs"], help="be a worker (the benchmark starts its own)")
    parser.add_argument("--folder", type=pathlib.Path, help="what a worker reads")
    arguments = parser.parse_args()
    if arguments.side:
        work(arguments.side, arguments.folder)
        return
    turns: list[tuple[dict[str, Any], dict[str, Any]]] = []  # What both sides said of each iteration.
    with tempfile.TemporaryDirectory() as folder:
        # Ours first, and theirs when it is ready: it writes what theirs reads.
        ours = common.Worker(__file__, "--side=ours", f"--folder={folder}")
        own_mean = ours.read()["mean"]
        theirs = common.Worker(__file__, "--side=theirs", f"--folder={folder}")
        mean = theirs.read()["mean"]
        assert abs(own_mean - mean) < 1e-4 * abs(mean), f"{own_mean} is not {mean}"
        for repeat in range(arguments.repeats + 1):
            turns.append((ours.do("iterate"), theirs.do("iterate")))
            print("{}: ours {}, TRL {}".format("iteration" if repeat else "warm-up", *turns[-1]), flush=True)
        ours.close()
        theirs.close()

    def ratios(name: str, of: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[float]:
        return [peer[name] / own[name] for own, peer in of]

    seconds, tokens = ratios("seconds", turns[1:]), ratios("tokens", turns[1:])
    per_token = [ratio / more for ratio, more in zip(seconds, tokens, strict=True)]
    claims = [
        common.claim("GRPO iteration vs TRL", seconds, "x", target=3.0),
        common.claim("the same per sampled token", per_token, "x", target=3.0),
        common.claim("peak memory of TRL / ours", ratios("peak_gigabytes", turns[-1:]), "x"),
    ]
    common.report("iteration", claims, ["torch", "transformers", "trl", "accelerate", "flax", "optax"])


if __name__ == "__main__":
    main()
