"""Lists scores that papers report, to compare one's own with.

They are taken from Mem-α (arXiv 2509.25911, tables 1, 2 and 9) and notes by readers of Fine-Mem (arXiv 2601.08435). The
means are computed here from the rows: the paper prints other ones for some (0.642 for Mem-α's 0.619). They were made
with other readers (Qwen3-32B) and judges than yours, unless you use these.
"""

from __future__ import annotations

from collections.abc import Mapping

_VALIDATION = (
    "squad", "hotpotqa", "perltqa", "icl_trec_coarse_6600shot_balance", "icl_nlu_8296shot_balance", "pubmed-rct",
    "booksum",
)  # fmt: skip
_MEMORYAGENTBENCH = (
    "ruler_qa1_197K", "ruler_qa2_421K", "longmemeval_s*", "icl_trec_coarse_6600shot_balance",
    "icl_nlu_8296shot_balance", "icl_trec_fine_6400shot_balance", "icl_clinic150_7050shot_balance",
    "icl_banking77_5900shot_balance", "infbench_sum_eng_shots2",
)  # fmt: skip

# {builder: {method: {data source: score}}}; memory in tokens under "memory_tokens".
RESULTS: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "memalpha": {
        name: dict(zip((*_VALIDATION, "memory_tokens"), scores, strict=True))
        for name, scores in {
            "Long-Context Qwen3-32B": (0.742, 0.852, 0.605, 0.623, 0.708, 0.533, 0.052, 10_800),
            "RAG-Top2": (0.762, 0.849, 0.623, 0.612, 0.508, 0.570, 0.042, 11_300),
            "MemAgent-14B": (0.091, 0.140, 0.052, 0.562, 0.290, 0.343, 0.103, 840),
            "MEM1-7B": (0.039, 0.083, 0.068, 0.269, 0.056, 0.175, 0.085, 170),
            "Qwen3-4B untrained, Mem-α's memory": (0.338, 0.637, 0.557, 0.416, 0.381, 0.281, 0.130, 3_900),
            "gpt-4.1-mini, Mem-α's memory": (0.426, 0.749, 0.492, 0.637, 0.519, 0.544, 0.246, 4_800),
            "Mem-α-4B": (0.786, 0.832, 0.659, 0.666, 0.658, 0.545, 0.187, 7_900),
        }.items()
    },
    "memalpha_mab": {
        name: dict(zip((*_MEMORYAGENTBENCH, "memory_tokens"), scores, strict=True))
        for name, scores in {
            "Long-Context Qwen3-32B": (0.280, 0.270, 0.292, 0.640, 0.740, 0.340, 0.860, 0.770, 0.125, 33_000),
            "RAG-Top2": (0.690, 0.450, 0.581, 0.690, 0.650, 0.210, 0.700, 0.750, 0.065, 207_000),
            "MemAgent-14B": (0.070, 0.160, 0.050, 0.370, 0.260, 0.210, 0.250, 0.370, 0.043, 920),
            "MEM1-7B": (0.070, 0.180, 0.090, 0.180, 0.000, 0.000, 0.090, 0.000, 0.029, 210),
            "Mem-α-4B": (0.740, 0.680, 0.520, 0.710, 0.710, 0.410, 0.730, 0.700, 0.129, 129_000),
        }.items()
    },
}  # fmt: skip

NOTES: Mapping[str, str] = {
    "memalpha": (
        "Published rows: Mem-α (arXiv 2509.25911), table 1; their means are recomputed from the rows. Fine-Mem "
        "(arXiv 2601.08435) reports +4.4 points on average over the best baseline; if that is Mem-α's 0.619, its mean "
        "is about 0.663. Its scores by source are not known here."
    ),
    "memalpha_mab": (
        "Published rows: Mem-α (arXiv 2509.25911), tables 2 and 9; their means are recomputed from the rows. Fine-Mem "
        "(arXiv 2601.08435) reports +7.2 points on average; over Mem-α's 0.592 that is about 0.664. One question more "
        "or less is 0.01 of a source with one stream; differences of 0.03 mean little."
    ),
}
