"""Fine-Mem's method with Qwen2.5-7B-Instruct as manager, which the paper does not have.

    python -m finemem_jax.main --config=experiments/qwen7b.py --mode=plan --topology=v5e:8x8
    python -m finemem_jax.main --config=experiments/qwen7b.py --workdir=runs/qwen7b

Hardware: 64 chips of TPU v5e (8x8), planned by compiling ahead of time (table in docs/notes/plans.md); the run itself
has not been made.
Time: not measured.
Expected: nothing published to compare with.

    --config=experiments/qwen7b.py:smoke    the smoke test's model and sizes: seconds

All values but the model's and the machine's are `qwen3_4b`'s.
"""

import pathlib
import runpy


def get_config(arg: str = ""):
    return runpy.run_path(str(pathlib.Path(__file__).with_name("qwen3_4b.py")))["get_config"](arg, "qwen7b")
