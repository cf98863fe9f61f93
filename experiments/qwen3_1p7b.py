"""Fine-Mem's main run with a smaller manager: Qwen3-1.7B.

    python -m finemem_jax.main --config=experiments/qwen3_1p7b.py --mode=plan --topology=v5e:4x4
    python -m finemem_jax.main --config=experiments/qwen3_1p7b.py --workdir=runs/qwen3_1p7b

Hardware: 16 chips of TPU v5e (4x4), planned by compiling ahead of time (table in docs/notes/plans.md); the run itself
has not been made.
Time: not measured.
Expected: the paper reports gains for this backbone too; its figures are not known to us.

    --config=experiments/qwen3_1p7b.py:smoke    the smoke test's model and sizes: seconds

All values but the model's are `qwen3_4b`'s.
"""

import pathlib
import runpy


def get_config(arg: str = ""):
    return runpy.run_path(str(pathlib.Path(__file__).with_name("qwen3_4b.py")))["get_config"](arg, "qwen3_1p7b")
