"""Fine-Mem's main run: Qwen3-4B learns to manage memory for a frozen reader, on Memalpha's training streams.

    python -m finemem_jax.main --config=experiments/qwen3_4b.py --mode=plan --topology=v5e:4x4
    python -m finemem_jax.main --config=experiments/qwen3_4b.py --workdir=runs/questions --mode=questions
    python -m finemem_jax.main --config=experiments/qwen3_4b.py --workdir=runs/qwen3_4b --config.data.name=streams \
        --config.data.source_dir=runs/questions/questions --config.data.chunks_per_stream=30
    python -m finemem_jax.main --config=experiments/qwen3_4b.py --workdir=runs/qwen3_4b --mode=evaluate \
        --config.train.continue_workdir=True --config.evaluate.sources=memalpha,memalpha_mab

The first makes the chunk questions that Memalpha's streams come without, with the starting weights (README.md says how
servers make them); without them, leave out "streams", and chunks earn nothing of their own. The last lays the result
beside the published rows. All fetch Memalpha from the Hub; --config.data.source_dir names a folder instead.

Hardware: 16 chips of TPU v5e (4x4), or 8 of v5p (2x2x2, with --config.mesh.tensor=1 and
--config.train.groups_per_microbatch=8). Both are planned, by compiling ahead of time (tables in docs/notes/plans.md);
the run itself has not been made.
Time: not measured. By the plan's roofline a training step takes at least 183 s for the update and 440 s for responses
of full length on v5e:4x4; the reader comes on top.
Expected: what is reported of the paper's run, whose reader is Qwen3-32B while here the starting weights read: an
average score of .663 with 79,100 tokens of memory (outcome reward only .627, chunk reward only .639, evidence credit
only .622). Before it, on Memalpha's validation sets, untrained Qwen3-4B had .389 and Mem-alpha-4B .642.

    --config=experiments/qwen3_4b.py:smoke    the smoke test's model and sizes: seconds

Values stand in the paper's order; where Fine-Mem's is not known to us it is Mem-alpha's, on whose protocol it builds.
"""

from finemem_jax import config as config_lib

# Other managers have all these values but the model's and, where they need another, the machine's; each has a file of
# its name: its preset and weights.
MANAGERS = {
    "qwen3_4b": ("qwen3_4b", "Qwen/Qwen3-4B"),
    "qwen3_1p7b": ("qwen3_1_7b", "Qwen/Qwen3-1.7B"),
    "llama32_3b": ("llama32_3b", "meta-llama/Llama-3.2-3B-Instruct"),
    "qwen7b": ("qwen25_7b", "Qwen/Qwen2.5-7B-Instruct"),
}


def get_config(arg: str = "", manager: str = "qwen3_4b"):
    if arg not in ("", "smoke"):
        raise ValueError(f"{manager} takes no argument, or ':smoke'; got {arg!r}.")
    config = config_lib.default()
    config.experiment = manager

    # Streams.
    config.data.name = "memalpha"
    config.data.num_train = 0
    config.data.num_test = 64

    # The manager.
    config.model.name, config.model.weights = MANAGERS[manager]
    config.manager.chunk_tokens = 2_048
    config.memory.view_tokens = 2_048

    # Retrieval and the reader.
    config.memory.retrieval = "lucene"
    config.memory.top_k = 2
    config.reader.temperature = 0.1

    # Reward: chunk-level step reward, evidence-anchored attribution.
    config.credit.rule = "full"
    config.credit.beta = 0.5
    config.credit.chunk_weight = 0.5
    config.credit.compression_weight = 0.05
    config.data.questions_per_chunk = 5

    # GRPO.
    config.rollout.streams_per_step = 32
    config.rollout.group_size = 8
    config.rollout.temperature = 1.0
    config.rollout.max_new_tokens = 2_048
    config.rollout.global_question_fraction = 0.2
    config.objective.clip_low = 0.2
    config.objective.clip_high = 0.2
    config.objective.aggregation = "row"

    # Optimization.
    config.optimizer.learning_rate = 1e-6
    config.optimizer.warmup_steps = 4
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.train.num_steps = 85

    # The machine.
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
    config.mesh.tensor = 4
    config.train.groups_per_microbatch = 16 if manager == "qwen7b" else 4
    config.sampler.dtype = "bfloat16"
    config.sampler.num_slots = 256 if manager == "qwen7b" else 64
    if arg == "smoke":
        config_lib.shrink(config)
        config.mesh.tensor = 1
        config.data.name = "synthetic"
        config.data.num_train = 16
        config.data.num_test = 8
    return config
