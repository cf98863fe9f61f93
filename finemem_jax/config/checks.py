"""Which settings can work: checked before anything is loaded or compiled, and without JAX."""

from __future__ import annotations

from finemem_jax.config import ConfigDict, curriculum, extra_fields, value_of

# Keys of rules.RULES, which says what each means; here, so that a config can be checked without loading JAX.
RULE_NAMES = (
    "outcome", "chunk", "evidence", "full", "cited", "ablation", "shapley", "persession", "cumulative", "hindsight",
    "hindsight_top", "type_weight", "step_gain", "mem_alpha",
)  # fmt: skip
# The least that a number may be.
_AT_LEAST = {
    "rollout.group_size": 2,
    "rollout.streams_per_step": 1,
    "rollout.max_new_tokens": 1,
    "data.chunks_per_stream": 1,
    "data.chunk_words": 1,
    "data.questions_per_chunk": 0,
    "data.questions_per_stream": 0,
    "data.num_train": 0,
    "data.num_test": 0,
    "memory.top_k": 1,
    "memory.view_tokens": 1,
    "memory.view_top_k": 1,
    "memory.budget_tokens": 0,
    "memory.view_items": 0,
    "memory.core_tokens": 1,
    "manager.chunk_tokens": 1,
    "lora.rank": 0,
    "sampler.num_slots": 1,
    "sampler.steps_per_call": 1,
    "sampler.prefill_tokens": 1,
    "reader.max_new_tokens": 1,
    "reader.num_slots": 1,
    "judge.max_new_tokens": 1,
    "judge.temperature": 0,
    "judge.tries": 1,
    "likelihood.anneal_steps": 0,
    "likelihood.check_every": 0,
    "likelihood.batch_tokens": 1,
    "answers.max_megabytes": 1,
    "follow.idle_seconds": 0,
    "follow.poll_seconds": 0,
    "evaluate.num_streams": -1,
    "evaluate.chunks_per_stream": 0,
    "evaluate.chunk_words": 0,
    "evaluate.questions_per_stream": 0,
    "evaluate.context_tokens": 1,
    "evaluate.rag_top_k": 1,
    "evaluate.summary_tokens": 1,
    "evaluate.batch": 1,
    "evaluate.resamples": 1,
    "export.verify_tokens": 1,
    "train.keep_best": 0,
    "train.max_skipped_updates": 1,
    "train.max_memory_gigabytes": 0,
    "train.num_steps": 0,
    "train.minibatches": 1,
    "train.epochs": 1,
    "train.groups_per_microbatch": 1,
    "train.length_multiple": 1,
    "train.checkpoint_every": 1,
    "train.keep_checkpoints": 1,
    "train.evaluate_every": 0,
    "train.stop_after_seconds": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.learning_rate": 0,
    "optimizer.clip_norm": 0,
    "reader.temperature": 0,
    "objective.clip_low": 0,
    "objective.clip_high": 0,
    "objective.advantage_epsilon": 0,
    "optimizer.weight_decay": 0,
    "rollout.global_question_threshold": 0,
    "rollout.top_k": 0,
    "credit.bloat_weight": 0,
    "credit.type_factor": 0,
    "objective.kl_weight": 0,
    "objective.importance_cap": 0,
    "objective.std_floor": 0,
}
# All that a setting may be.
_CHOICES = {
    "model.tokenizer": ("weights", "bytes", "bytes_and_operations"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "attention", "full", "offload"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "sampler.dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "xla", "blocked", "cudnn", "splash"),
    "manager.long_chunk": ("split", "refuse"),
    "manager.num_examples": (0, 1, 2),
    "manager.wire": ("json_lines", "hermes", "qwen_agent"),
    "memory.layout": ("flat", "typed"),
    "reader.num_examples": (0, 1, 2),
    "memory.retrieval": ("lucene", "okapi", "bm25s", "dense", "hybrid"),
    "memory.embedder": ("wordllama", "model"),
    "reader.kind": ("model", "endpoint", "evidence"),
    "judge.kind": ("reader", "model", "endpoint"),
    "questions.generator.kind": ("model", "endpoint"),
    "questions.verifier.kind": ("model", "endpoint"),
    "export.form": ("merged", "lora", "gguf"),
    "export.dtype": ("", "float32", "bfloat16", "float16"),
    "credit.rule": RULE_NAMES,
    "credit.type_factor_on": ("advantage", "unclipped"),
    "credit.gain_transform": ("prob", "log"),
    "credit.cited_by": ("reader", "overlap"),
    "objective.ratio": ("token", "sequence"),
    "objective.aggregation": ("row", "token", "stream", "constant"),
    "objective.advantage_scale": ("std", "none"),
    "objective.advantage_ddof": (0, 1),
}


def validate(config: ConfigDict) -> None:
    """Refuses settings that cannot work, before anything is loaded or compiled.

    Raises:
        ValueError: naming the field, what it must be, and its value.
    """
    for name, low in _AT_LEAST.items():
        if not value_of(config, name) >= low:
            why = " to compare trajectories" if name == "rollout.group_size" else ""
            raise ValueError(f"{name} must be at least {low}{why}, got {value_of(config, name)}.")
    if not config.rollout.temperature > 0:
        raise ValueError(
            "rollout.temperature must be above 0, or all rollouts of a group are the same; "
            f"got {config.rollout.temperature}."
        )
    for name in ("export.shard_gigabytes", "train.barrier_seconds"):
        if not value_of(config, name) > 0:
            raise ValueError(f"{name} must be above 0, got {value_of(config, name)}.")
    if not 0 < config.rollout.top_p <= 1:
        raise ValueError(f"rollout.top_p must lie in (0, 1], got {config.rollout.top_p}.")
    if config.credit.kl_weight and (config.rollout.top_k or config.rollout.top_p < 1):
        raise ValueError(
            "credit.kl_weight measures the divergence on what the whole policy draws; set rollout.top_k=0 and "
            "rollout.top_p=1, or use objective.kl_weight."
        )
    if config.sampler.in_place and (config.sampler.int8 or config.sampler.dtype != config.model.param_dtype):
        raise ValueError(
            "sampler.in_place=True decodes with the trainer's arrays as they are; set sampler.int8=False and "
            f"sampler.dtype={config.model.param_dtype!r} (model.param_dtype), or sampler.in_place=False."
        )
    if config.export.dtype == "float16" and config.export.form != "gguf":
        raise ValueError(
            f"export.dtype='float16' is for export.form='gguf' only, got export.form={config.export.form!r}; set "
            "export.dtype='bfloat16'."
        )
    for name in ("optimizer.b1", "optimizer.b2"):
        if not 0 <= value_of(config, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value_of(config, name)}.")
    unit = "credit.beta", "rollout.global_question_fraction", "objective.clip_low"
    for name in (*unit, "likelihood.chunk_share", "likelihood.final_chunk_share"):
        if not 0 <= value_of(config, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value_of(config, name)}.")
    for name, allowed in _CHOICES.items():
        if value_of(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value_of(config, name)!r}.")
    for name in ("reader", "judge", "questions.generator", "questions.verifier"):
        if value_of(config, name).kind == "endpoint":
            _validate_endpoint(value_of(config, name).endpoint, name)
    curriculum(config)


def _validate_endpoint(endpoint, name):
    for field in ("urls", "model"):
        if not endpoint[field].strip():
            raise ValueError(
                f"{name}.endpoint.{field} must not be empty where {name}.kind is 'endpoint'; got {endpoint[field]!r}. "
                f"E.g. --config.{name}.endpoint.urls=http://localhost:8000/v1 --config.{name}.endpoint.model=NAME."
            )
    for field in ("concurrency", "call_seconds", "total_seconds"):
        if not endpoint[field] > 0:
            raise ValueError(f"{name}.endpoint.{field} must be above 0, got {endpoint[field]}.")
    for field in ("requests_per_minute", "tokens_per_minute"):
        if not endpoint[field] >= 0:
            raise ValueError(f"{name}.endpoint.{field} must be at least 0, got {endpoint[field]}.")
    extra_fields(endpoint, name)
