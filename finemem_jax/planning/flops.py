"""Floating-point operations of a decoder's products, by formula. A multiplication with its addition counts two.

Compilers' own counts do not serve: they count the body of a loop over layers once. Norms, rotations and the softmax are
left out, which are below a hundredth.

Sizes: P, C, L tokens of a shared prefix, a group prefix and a suffix; see `batching.Batch`.
"""

from __future__ import annotations

from typing import NamedTuple

from finemem_jax.models.presets import DecoderConfig


class Work(NamedTuple):
    """What one pass over some tokens has to do.

    Attributes:
        tokens: Tokens that go through the layers.
        predicted: Tokens that meet the output head.
        visible: Σ over tokens of the keys that it may see.
        computed: Σ over tokens of the keys whose logits are computed: what is masked included.
    """

    tokens: float
    predicted: float
    visible: float
    computed: float

    def times(self, n: float) -> Work:
        return Work(*(n * x for x in self))


def tree(
    shared_prefix: int, group_prefix: int, suffix: int, groups: int, rows: int, predicted: int, triangular: bool
) -> Work:
    """The tokens of one share: a shared prefix, `groups` group prefixes, and `rows` suffixes for each.

    Args:
        predicted: Tokens of each suffix that are predicted.
        triangular: Whether a kernel leaves out blocks that causality masks.
    """
    tokens = shared_prefix + groups * (group_prefix + rows * suffix)
    above = groups * (group_prefix * shared_prefix + rows * suffix * (shared_prefix + group_prefix))
    own = shared_prefix**2 + groups * (group_prefix**2 + rows * suffix**2)
    visible = above + (own + tokens) / 2
    return Work(tokens, groups * rows * predicted, visible, visible if triangular else above + own)


def matrices(model: DecoderConfig) -> int:
    """Elements of the matrices of all layers."""
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    return model.num_layers * model.embed_dim * (model.head_dim * heads + 3 * model.mlp_dim)


def adapters(model: DecoderConfig) -> int:
    """Elements of the adapters of all layers."""
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
    """2 N tokens + 4 · heads · head_dim · layers · pairs + 2 V D predicted, N the elements of the matrices.

    Args:
        pairs: `work.visible`, or `work.computed`.
    """
    head = 2 * model.vocab_size * model.embed_dim * work.predicted
    return 2 * (matrices(model) + adapters(model)) * work.tokens + _attention(model, pairs) + head


def useful(model: DecoderConfig, work: Work) -> float:
    """What training on these tokens needs and no more: nothing recomputed, nothing masked. The numerator of MFU.

    Three times the forward pass, 6 N tokens + …; beside a frozen model the gradients of its matrices are not needed.
    """
    total = 3 * forward(model, work, work.visible)
    if model.lora is not None:
        total -= 2 * matrices(model) * work.tokens + 2 * model.vocab_size * model.embed_dim * work.predicted
    return total


def executed(model: DecoderConfig, work: Work, remat: str, attention: str) -> float:
    """What training runs: with what the backward pass recomputes, and with what is masked only afterwards.

    Kernels of attention compute the logits again for the gradients: 7 products instead of 4 with "splash", whose
    gradients of queries and of keys are two kernels, 5 with the others. The gradient of the head recomputes the logits
    (`log_probs`), and is computed even where the head is frozen.
    """
    kernel = _attention(model, work.computed)
    backward = {"splash": 7 / 2, "cudnn": 5 / 2, "blocked": 5 / 2}.get(attention, 2.0)
    head = 2 * model.vocab_size * model.embed_dim * work.predicted
    matrix = 2 * matrices(model) * work.tokens
    low_rank = 2 * adapters(model) * work.tokens
    # What "blocked" attention gives is kept by all but "full".
    again = {"none": 0.0, "full": matrix + low_rank + kernel}.get(remat, 0.0 if attention == "blocked" else kernel)
    passes = 3 if model.lora is None else 2
    return passes * matrix + 3 * low_rank + (1 + backward) * kernel + 4 * head + again


def _attention(model, pairs):
    return 4 * model.num_heads * model.head_dim * model.num_layers * pairs
