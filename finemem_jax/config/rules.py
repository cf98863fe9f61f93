"""Names the credit rules and their arguments, so that a config can be checked without loading JAX."""

from __future__ import annotations

import dataclasses

from finemem_jax.config.fields import field, infos

# Keys of `rl.credit_rules.RULES`, which says what each means.
RULE_NAMES = (
    "outcome", "chunk", "evidence", "full", "cited", "ablation", "shapley", "persession", "cumulative", "hindsight",
    "hindsight_top", "type_weight", "step_gain", "mem_alpha",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RuleArgs:
    """Numbers and choices of single rules, which `credit.rule_args` sets; a rule without them ignores the defaults."""

    bloat_weight: float = field(
        0.3, "λ: what memory beyond 0.7 of the text costs.",
        rules=("persession", "cumulative"), at_least=0, paper="Memory-R2: 0.3",
    )  # fmt: skip
    used_weight: float = field(
        0.1, "λ: weight of retrieved evidence beside gold evidence.",
        rules=("hindsight", "hindsight_top"), paper="Mem-T: 0.1",
    )  # fmt: skip
    type_factor: float = field(
        4.0, "α: factor of the memory type retrieved most.", rules=("type_weight",), at_least=0, paper="MemBuilder: 4"
    )
    type_factor_on: str = field(
        "advantage", 'What α multiplies: the "advantage", or its "unclipped" term only.',
        rules=("type_weight",), choices=("advantage", "unclipped"),
    )  # fmt: skip
    gain_transform: str = field(
        "prob", 'What differences are taken of: the value ("prob") or its "log".',
        rules=("step_gain",), choices=("prob", "log"),
    )  # fmt: skip
    gain_floor: float = field(-5.0, "Lowest logarithm, for gain_transform=log.", rules=("step_gain",))
    ablation_conserves: bool = field(
        False, "Scale a question's shares so that they add up to its score.", rules=("ablation",)
    )
    cited_by: str = field(
        "reader", 'Who says which items were used: the "reader", or word "overlap".',
        rules=("cited",), choices=("reader", "overlap"),
    )  # fmt: skip
    content_weight: float = field(
        0.1, "Weight of the content judge's verdicts.", rules=("mem_alpha",), paper="Mem-alpha: 0.1"
    )


def fields_of(rule: str) -> dict[str, dataclasses.Field]:
    """The arguments that a rule takes, by name."""
    return {one.name: one for one, about in infos(RuleArgs) if rule in about.rules}
