"""Mem-alpha's whole method on SmolLM2: typed memory, its calls, its reward with the content judge, its objective.

    python -m finemem_jax.main --config=experiments/mem_alpha.py --workdir=runs/mem_alpha

Hardware: 2 CPU cores, 8 GB of memory. Time: minutes a training step (5.7 for the first, on such a machine that was busy
with other work).
Expected: a baseline to put beside Fine-Mem on the same model, streams and reader (`experiments/smollm2_135m.py`); no
result has been measured yet. The published run trained Qwen3-4B with a Qwen3-32B reader and judge; here the frozen
starting weights do both, and a 135M judge's verdicts are little better than noise.

Values are Mem-alpha's (arXiv 2509.25911 and its released scripts) but for the sizes, which are `smollm2_135m`'s.
"""

import pathlib
import runpy


def get_config(arg: str = ""):
    if arg not in ("", "smoke"):
        raise ValueError(f"mem_alpha takes no argument, or ':smoke'; got {arg!r}.")
    base = "smoke" if arg else "smollm2_135m"
    config = runpy.run_path(str(pathlib.Path(__file__).with_name(f"{base}.py")))["get_config"]()
    config.experiment = "mem_alpha"

    config.memory.layout = "typed"
    config.memory.view_items = 5
    config.memory.core_tokens = 512
    config.memory.retrieval = "okapi"
    config.memory.top_k = 20
    config.manager.tool_call_format = "qwen_agent"
    config.manager.repair_json = True

    # r1 + r2 + 0.05 r3 + 0.1 r4 (content_weight of credit.rule_args), all steps of a stream's rollouts in one group.
    config.credit.rule = "mem_alpha"
    config.credit.format_weight = 1.0
    config.credit.compression_weight = 0.05

    config.objective.clip_low = 0.2
    config.objective.clip_high = 0.2
    config.objective.dual_clip = 3.0
    config.objective.kl_weight = 0.001
    config.objective.kl_estimator = "k3"
    config.objective.aggregation = "row"
    config.reader.temperature = 0.7
    if arg == "smoke":
        # Five items of each type do not fit into the smoke test's prompt.
        config.memory.core_tokens = 64
    return config
