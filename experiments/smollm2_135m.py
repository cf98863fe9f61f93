"""SmolLM2-135M-Instruct learns to manage memory on synthetic streams, with Fine-Mem's full method, on a laptop.

    python -m finemem_jax.main --config=experiments/smollm2_135m.py --workdir=runs/smollm2_135m

Hardware: 2 CPU cores, 8 GB of memory; no GPU. This is what `make run` runs.
Time: about 8 minutes after set-up, and less than 12 on slower machines: `train.stop_after_seconds` ends the training
early (on two such cores after five or six of the ten steps).
Expected: valid operations rise far beyond their standard error; in so few steps the scores move within theirs
(docs/notes/training_runs.md has the figures).

    --config=experiments/smollm2_135m.py:long     an hour or two on the same machine, with up to 10 GB of memory
    --config=experiments/smollm2_135m.py:smoke    the smoke test's model and sizes: seconds
"""

from finemem_jax import config as config_lib


def get_config(arg: str = ""):
    if arg not in ("", "long", "smoke"):
        raise ValueError(f"smollm2_135m takes no argument, ':long' or ':smoke'; got {arg!r}.")
    config = config_lib.default()
    config.experiment = "smollm2_135m"

    # "attention" is a quarter faster, and takes 1.1 GB more: too much for a machine of 8 GB.
    config.model.remat = "full"

    # Short streams: everything below is sized so that ten updates of a real model fit into a coffee break.
    config.data.num_test = 16
    config.data.chunks_per_stream = 2
    config.data.chunk_words = 50
    config.data.questions_per_chunk = 2
    config.data.questions_per_stream = 3

    config.manager.num_examples = 2
    config.manager.chunk_tokens = 112
    config.memory.view_tokens = 192

    config.rollout.streams_per_step = 2
    config.rollout.max_new_tokens = 64
    # At temperature 1 so small a model writes too little JSON to learn from; sampler and trainer both use this one.
    config.rollout.temperature = 0.8

    config.sampler.num_slots = 16
    config.sampler.steps_per_call = 8
    config.sampler.prefill_tokens = 64
    config.reader.max_new_tokens = 12
    config.reader.num_slots = 16

    config.optimizer.learning_rate = 3e-5
    config.optimizer.warmup_steps = 2
    config.optimizer.weight_decay = 0.0

    config.train.num_steps = 10
    config.train.minibatches = 2
    config.train.length_multiple = 32
    config.train.stop_after_seconds = 420
    if arg == "long":
        config.experiment = "smollm2_135m:long"
        config.train.num_steps = 120
        config.train.evaluate_every = 40
        config.train.stop_after_seconds = 6_000
        config.data.num_test = 32
    if arg == "smoke":
        config_lib.shrink(config)
    return config
