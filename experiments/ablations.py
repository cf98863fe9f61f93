"""Fine-Mem's ablations and the credit rules of rival methods, each trained on the same streams from the same weights.

    python -m finemem_jax.main --config=experiments/ablations.py --workdir=runs/ablations --mode=sweep

Hardware: 2 CPU cores, 8 GB of memory. Time: on such a machine about a minute per training step, and a few minutes
of evaluation and start-up, for each of the fourteen members; rules that ask the reader again ("ablation", "shapley",
"step_gain", "cited", "mem_alpha") take longer. Ctrl-C saves, and the same command goes on.
Expected: members agree exactly before training, for they start from the same weights, but for type_weight and mem_alpha
(another memory layout) and cited (its reader is asked to cite). What they differ by after ten steps has not been
measured yet; the table's standard errors say what it is worth. docs/notes/rules.md has the smoke table.

    --config=experiments/ablations.py:smoke                     the smoke test's model and sizes: minutes for all
    --config=experiments/ablations.py:steps=100                 all members, longer
    --config=experiments/ablations.py --sweep="credit.rule=outcome,full"         only these
    --config=experiments/ablations.py:credit=chunk,beta=0       one run (without --mode=sweep)

The argument is "key=value,key=value"; the name of a base may stand alone. Keys:

    base          smollm2_135m (default) or smoke
    credit        the credit rule; type_weight and mem_alpha also turn the memory typed, which they are made for
    beta          β, share of the global score that follows the evidence
    chunk_weight  w1, weight of the chunk reward
    seed          seed of everything; also of the held-out streams, which are then others
    top_k         items retrieved for a question
    retrieval     how they are found
    steps         training steps
"""

import pathlib
import runpy

PAPER = ("outcome", "chunk", "evidence", "full")
RIVALS = (
    "cited", "persession", "cumulative", "hindsight", "hindsight_top", "type_weight", "step_gain", "ablation",
    "shapley", "mem_alpha",
)  # fmt: skip
TYPED = ("type_weight", "mem_alpha")
BASES = ("smollm2_135m", "smoke")

# Key of the argument: field of the config, and how its value is read. `base` is no field.
KEYS = {
    "credit": ("credit.rule", str),
    "beta": ("credit.beta", float),
    "chunk_weight": ("credit.chunk_weight", float),
    "seed": ("seed", int),
    "top_k": ("memory.top_k", int),
    "retrieval": ("memory.retrieval", str),
    "steps": ("train.num_steps", int),
}


def get_config(arg: str = ""):
    chosen = _parse(arg)
    base = chosen.pop("base", BASES[0])
    config = runpy.run_path(str(pathlib.Path(__file__).with_name(f"{base}.py")))["get_config"]()
    config.experiment = f"ablations:{arg}" if arg else "ablations"
    # Runs are compared after equally many steps, however long they take.
    config.train.stop_after_seconds = 0
    if base == "smoke":
        # Random weights answer nothing; the evidence itself does, so that rules have something to differ by.
        config.reader.kind = "evidence"
        config.data.num_test = 8
    else:
        config.data.num_test = 32
    for key, text in chosen.items():
        field, read = KEYS[key]
        try:
            config.update_from_flattened_dict({field: read(text)})
        except ValueError as error:
            raise ValueError(
                f"{key} of experiments/ablations.py takes a number ({read.__name__}), got {text!r}."
            ) from error
    if chosen.get("credit") in TYPED:
        config.memory.layout = "typed"
    return config


def sweep(arg: str = "") -> list[str]:
    """The paper's ablation table, then the rivals, on the base and with the other settings of `arg`."""
    if "credit" in _parse(arg):
        raise ValueError("the sweep of experiments/ablations.py chooses credit itself; leave it out of the argument.")
    return [f"{arg},credit={rule}".lstrip(",") for rule in PAPER + RIVALS]


def _parse(arg: str) -> dict[str, str]:
    chosen: dict[str, str] = {}
    for part in filter(None, arg.split(",")):
        key, equals, value = part.partition("=")
        if not equals and key in BASES:
            key, value = "base", key
        if key != "base" and key not in KEYS:
            known = ", ".join(["base", *KEYS])
            raise ValueError(f"experiments/ablations.py takes key=value, with the keys {known}; got {part!r}.")
        if key in chosen:
            raise ValueError(f"experiments/ablations.py got {key} twice: {arg!r}.")
        chosen[key] = value
    for key, allowed in {"base": BASES, "credit": PAPER + RIVALS}.items():
        if key in chosen and chosen[key] not in allowed:
            raise ValueError(f"{key} of experiments/ablations.py is one of {', '.join(allowed)}; got {chosen[key]!r}.")
    return chosen
