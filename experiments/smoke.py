"""Two layers with random weights over bytes and whole operations: every part of a training run, in seconds. For tests.

    python -m finemem_jax.main --config=experiments/smoke.py --workdir=/tmp/smoke

Hardware: any. Time: about 20 seconds, most of it compiling.
Expected: about a quarter of what random weights write are valid operations, and now and then one of them answers a
question: each reward is small, and none is always 0. With --config.train.num_steps=30 (half a minute more) the valid
share rises from about .25 to .45: the quickest check that learning works at all. Two held-out streams show nothing.
"""

from finemem_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.experiment = "smoke"
    config.data.num_train = 4
    config.data.num_test = 2
    config.data.chunks_per_stream = 2
    config.data.chunk_words = 40
    config.data.questions_per_chunk = 2
    config.data.questions_per_stream = 2
    config.optimizer.learning_rate = 1e-2
    return config_lib.shrink(config)
