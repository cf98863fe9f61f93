"""SmolLM2-135M-Instruct learns to manage memory on synthetic streams, on a laptop.

    python -m finemem_jax.main --config=experiments/smollm2_135m.py --workdir=runs/smollm2

is what `make run` runs.
"""

from finemem_jax import config as config_lib


def get_config(arg: str = ""):
    config = config_lib.default()
    config.experiment = "smollm2_135m"

    config.data.num_train = 2_000
    config.data.num_test = 16
    config.data.chunks_per_stream = 2
    config.data.chunk_words = 50
    config.data.questions_per_chunk = 2
    config.data.questions_per_stream = 3

    config.manager.num_examples = 2
    config.manager.chunk_tokens = 192
    config.memory.view_tokens = 192

    config.rollout.streams_per_step = 2
    config.rollout.group_size = 8
    config.rollout.max_new_tokens = 80

    config.sampler.num_slots = 16
    config.sampler.steps_per_call = 8
    config.sampler.length_multiple = 64
    config.reader.max_new_tokens = 12
    config.reader.num_slots = 16

    config.optimizer.learning_rate = 3e-5
    config.optimizer.warmup_steps = 2
    config.optimizer.weight_decay = 0.0

    config.train.num_steps = 12
    config.train.length_multiple = 64
    return config
