"""Counts the floating-point operations of a decoder by formula; a multiplication with its addition counts two.

Compilers' own counts do not serve: they count the body of a loop over layers once. Norms, rotations and the softmax,
below a hundredth of it all, are left out.

Sizes: P, C, L tokens of a shared prefix, a group prefix and a suffix; see `batching.Batch`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from finemem_jax.models.presets import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Holds lengths in tokens: of what all prompts share, of a chunk, and of the memory view with the response."""

    shared_prefix: int
    group_prefix: int
    view: int
    response: int

    @property
    def suffix(self) -> int:
        return self.view + self.response


class Work(NamedTuple):
    """Tells what one pass over some tokens has to do.

    Attributes:
        tokens: Tokens that go through the layers.
        predicted: Tokens that meet the output head.
        visible: Σ over tokens of the keys that each attends to.
        computed: Σ over tokens of the keys whose logits are computed, masked ones included.
    """

    tokens: float
    predicted: float
    visible: float
    computed: float


def tree(lengths: Lengths, groups: int, rows: int, *, triangular: bool) -> Work:
    """Returns the work of one shard: a shared prefix, `groups` group prefixes, and `rows` suffixes for each.

    Args:
        triangular: Whether a kernel leaves out blocks that causality masks.
    """
    shared_prefix, group_prefix, suffix = lengths.shared_prefix, lengths.group_prefix, lengths.suffix
    tokens = shared_prefix + groups * (group_prefix + rows * suffix)
    above = groups * (group_prefix * shared_prefix + rows * suffix * (shared_prefix + group_prefix))
    own = shared_prefix**2 + groups * (group_prefix**2 + rows * suffix**2)
    visible = above + (own + tokens) / 2
    return Work(tokens, groups * rows * lengths.response, visible, visible if triangular else above + own)


def matrices(model: DecoderConfig) -> int:
    """Counts the elements of the matrices of all layers."""
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    return model.num_layers * model.embed_dim * (model.head_dim * heads + 3 * model.mlp_dim)


def adapters(model: DecoderConfig) -> int:
    """Counts the elements of the adapters of all layers."""
    if model.lora is None:
        return 0
    d, f, c = model.embed_dim, model.mlp_dim, model.head_dim
    heads, kv_heads = model.num_heads * c, model.num_kv_heads * c
    sides = {
        "query": d + heads, "key": d + kv_heads, "value": d + kv_heads, "out": heads + d,
        "gate": d + f, "up": d + f, "down": f + d,
    }  # fmt: skip
    return model.num_layers * model.lora.rank * sum(sides[name] for name in model.lora.targets)


def forward(model: DecoderConfig, work: Work, pairs: float) -> float:
    """Counts 2 N tokens + 4 · heads · head_dim · layers · pairs + 2 V D predicted, N the elements of the matrices.

    Args:
        pairs: `work.visible`, or `work.computed`.
    """
    head = 2 * model.vocab_size * model.embed_dim * work.predicted
    return 2 * (matrices(model) + adapters(model)) * work.tokens + _attention(model, pairs) + head


def useful(model: DecoderConfig, work: Work) -> float:
    """Counts what training on these tokens needs and no more: nothing recomputed or masked. The numerator of MFU.

    Three times the forward pass, 6 N tokens + …; beside a frozen model the gradients of its matrices are not needed.
    """
    total = 3 * forward(model, work, work.visible)
    if model.lora is not None:
        total -= 2 * matrices(model) * work.tokens + 2 * model.vocab_size * model.embed_dim * work.predicted
    return total


def executed(model: DecoderConfig, work: Work, *, remat: str, attention: str) -> float:
    """Counts what training runs, including what the backward pass recomputes and what is masked only afterwards.

    Kernels of attention compute the logits again for the gradients: 7 products instead of 4 with "splash", whose
    gradients of queries and of keys are two kernels, 5 with the others. The gradient of the head recomputes the logits
    (`log_probs`), and is computed even where the head is frozen.
    """
    kernel = _attention(model, work.computed)
    backward = {"splash": 7 / 2, "cudnn": 5 / 2, "blocked": 5 / 2}.get(attention, 2.0)
    head = 2 * model.vocab_size * model.embed_dim * work.predicted
    matrix = 2 * matrices(model) * work.tokens
    low_rank = 2 * adapters(model) * work.tokens
    # The results of "blocked" attention are kept by all but "full".
    again = {"none": 0.0, "full": matrix + low_rank + kernel}.get(remat, 0.0 if attention == "blocked" else kernel)
    passes = 3 if model.lora is None else 2
    return passes * matrix + 3 * low_rank + (1 + backward) * kernel + 4 * head + again


def _attention(model: DecoderConfig, pairs: float) -> float:
    return 4 * model.num_heads * model.head_dim * model.num_layers * pairs
