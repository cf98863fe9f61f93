"""Reads schedules: settings whose value changes with the training step, written as "step:value,step:value"."""

from __future__ import annotations

import re

from finemem_jax.config.sections import Data, Train

_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?"


def curriculum(train: Train, data: Data) -> list[tuple[int, int]]:
    """The stages of training, [(first training step, chunks per stream)], from `train.curriculum`.

    Without one there is a single stage of `data.chunks_per_stream` chunks.

    Raises:
        ValueError: not pairs of numbers, steps that do not ascend from 0, or a number of chunks out of range.
    """
    text, longest = train.curriculum, data.chunks_per_stream
    if not text:
        return [(0, longest)]
    wanted = 'train.curriculum must be "step:chunks" pairs with steps that ascend from 0, e.g. "0:2,20:4,60:8"'
    stages = [(step, int(chunks)) for step, chunks in _pairs(text, r"\d+", wanted)]
    for _, chunks in stages:
        if not 1 <= chunks <= longest:
            raise ValueError(
                f"train.curriculum must ask for 1 to data.chunks_per_stream={longest} chunks (evaluation has so many), "
                f"got {chunks} in {text!r}; lower it, or raise data.chunks_per_stream."
            )
    return stages


def chunk_share(text: str) -> list[tuple[int, float]]:
    """The points of `likelihood.chunk_share`, [(training step, share)]; a single number is one point at step 0.

    Raises:
        ValueError: not pairs of numbers, steps that do not ascend from 0, or a share out of range.
    """
    wanted = (
        'likelihood.chunk_share must be a number in [0, 1], or "step:share" pairs with steps that ascend from 0, e.g. '
        '"0:1,200:0"'
    )
    is_number = re.fullmatch(_NUMBER, text.strip())
    points = [(step, float(share)) for step, share in _pairs(f"0:{text}" if is_number else text, _NUMBER, wanted)]
    if not all(0 <= share <= 1 for _, share in points):
        raise ValueError(f"{wanted}; got {text!r}.")
    return points


def at(points: list[tuple[int, float]], step: int) -> float:
    """The value of a schedule at a training step: on straight lines between its points, constant after the last."""
    begun = max(i for i, (start, _) in enumerate(points) if start <= step)
    start, first = points[begun]
    if begun + 1 == len(points):
        return first
    end, last = points[begun + 1]
    return first + (last - first) * ((step - start) / (end - start))


def _pairs(text: str, value: str, wanted: str) -> list[tuple[int, str]]:
    """[(step, value)] of "step:value,step:value"; `value` is the pattern of a value."""
    if not re.fullmatch(rf"\s*\d+\s*:\s*{value}\s*(,\s*\d+\s*:\s*{value}\s*)*", text):
        raise ValueError(f"{wanted}; got {text!r}.")
    pairs = [(int(step), of) for step, of in (pair.split(":") for pair in text.split(","))]
    steps = [step for step, _ in pairs]
    if steps[0] != 0 or steps != sorted(set(steps)):
        raise ValueError(f"{wanted}; got {text!r}.")
    return pairs
