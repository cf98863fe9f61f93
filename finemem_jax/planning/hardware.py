"""Lists what accelerators can do, from their makers' public specifications."""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Describes an accelerator chip. Rates are peaks, which no program reaches.

    Attributes:
        name: As in a topology ("v5e:8x8"), or a short name.
        kind: What JAX calls it (`device_kind`), or the beginning of that.
        hbm_bytes: Memory that programs can use. Of TPUs, what their compiler allows, which is a little less than what
            is published; of GPUs what is published.
        flops: Dense bfloat16 products, per second.
        hbm_bandwidth: Bytes per second.
        link_bandwidth: Bytes per second that leave a chip over all its links to others together (ICI, NVLink): half of
            what is published for both directions.
        source: Where the figures stand.
    """

    name: str
    kind: str
    hbm_bytes: float
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    source: str


# Usable memory of TPUs: the limit in the compiler's own message when a program is too large (libtpu 0.0.42.1).
TPUS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 30.5 * GIB, 275e12, 1.2e12, 300e9, "https://cloud.google.com/tpu/docs/v4"),
        Chip("v5e", "TPU v5 lite", 15.75 * GIB, 197e12, 819e9, 200e9, "https://cloud.google.com/tpu/docs/v5e"),
        Chip("v5p", "TPU v5", 95.74 * GIB, 459e12, 2.765e12, 600e9, "https://cloud.google.com/tpu/docs/v5p"),
        Chip("v6e", "TPU v6 lite", 31.25 * GIB, 918e12, 1.638e12, 400e9, "https://cloud.google.com/tpu/docs/v6e"),
    )
}
GPUS = (
    Chip("A100-80GB", "NVIDIA A100", 80e9, 312e12, 2.039e12, 300e9, "https://www.nvidia.com/en-us/data-center/a100/"),
    Chip("H100-SXM", "NVIDIA H100", 80e9, 989e12, 3.35e12, 450e9, "https://www.nvidia.com/en-us/data-center/h100/"),
    Chip("H200", "NVIDIA H200", 141e9, 989e12, 4.8e12, 450e9, "https://www.nvidia.com/en-us/data-center/h200/"),
)


def gpu(kind: str) -> Chip | None:
    """Returns the GPU that JAX calls `kind`, or None if the table does not have it."""
    return next((chip for chip in GPUS if kind.startswith(chip.kind)), None)
