"""SmolLM2-135M-Instruct on streams of eight public data sets, against what it can be compared with.

    python -m finemem_jax.main --mode=evaluate --config=experiments/smollm2_benchmarks.py \\
        --config.evaluate.source_dir=DIR --workdir=runs/smollm2_benchmarks

DIR holds the original files (data/README.md says where they come from), in whatever folders below it. With a --workdir
that holds a trained run of SmolLM2, add ",checkpoint" to evaluate.methods, and --config.train.continue_workdir=True.

Hardware: 2 CPU cores, 8 GB of memory; no GPU.
Time: about three quarters of an hour there; it can be stopped, and goes on where it was.
Expected: at this size all scores are low; docs/notes/training_runs.md has the table, and what it says.

    --config=experiments/smollm2_benchmarks.py:books    whole stories (SQuALITY) in place of these
    --config=experiments/smollm2_benchmarks.py:smoke    the smoke test's model and sizes: seconds
"""

import pathlib
import runpy

from finemem_jax import config as config_lib


def get_config(arg: str = ""):
    if arg not in ("", "books", "smoke"):
        raise ValueError(f"smollm2_benchmarks takes no argument, ':books' or ':smoke'; got {arg!r}.")
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("smollm2_135m.py")))["get_config"]("long")
    config.experiment = "smollm2_benchmarks"

    config.evaluate.methods = "none,long_context,rag,verbatim,recurrent,untrained,mem_alpha"
    config.evaluate.sources = "squad,hotpotqa,nlu,trec,pubmed_rct,locomo,mquake,needle"
    config.evaluate.data = "num_test=6,chunks_per_stream=6,chunk_words=160,questions_per_stream=6"
    config.evaluate.batch = 48
    config.evaluate.context_tokens = 1_500
    config.evaluate.summary_tokens = 128

    config.manager.chunk_tokens = 320
    config.memory.view_tokens = 256
    config.rollout.max_new_tokens = 96
    config.reader.max_new_tokens = 16
    if arg == "books":
        config.experiment = "smollm2_benchmarks:books"
        config.evaluate.sources = "squality"
        config.evaluate.data = "num_test=4,chunks_per_stream=20,chunk_words=512,questions_per_stream=6"
        config.manager.chunk_tokens = 1_024
        config.reader.max_new_tokens = 64
    if arg == "smoke":
        config.experiment = "smollm2_benchmarks:smoke"
        config.evaluate.sources = ""
        config.evaluate.data = "num_test=1,chunks_per_stream=6,chunk_words=160,questions_per_stream=6"
        config_lib.shrink(config)
    return config
