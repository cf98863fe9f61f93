"""Finds devices to compile for, which need not be here."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from finemem_jax.planning import hardware
from finemem_jax.planning.hardware import Chip


@dataclasses.dataclass(frozen=True)
class Target:
    """Names devices to compile for, and what they can do.

    Attributes:
        chip: One device, which may be a part of a chip; None where nothing is published (CPUs).
        hbm_bytes: Memory that programs on one device may use.
    """

    name: str
    devices: Sequence[jax.Device]
    chip: Chip | None
    hbm_bytes: float

    @property
    def platform(self) -> str:
        return self.devices[0].platform


def find(topology: str) -> Target:
    """Finds devices to compile for by name: "v5e:8x8" (a TPU of `hardware.TPUS`), "cpu:8", or "gpu" (this machine's).

    Raises:
        ValueError: an unknown name, or its compiler or devices are not here; the message says what to do.
    """
    kind, _, shape = topology.partition(":")
    if kind in hardware.TPUS and re.fullmatch(r"\d+(x\d+)+", shape):
        return _tpu(topology, hardware.TPUS[kind], math.prod(map(int, shape.split("x"))))
    if kind == "cpu" and shape.isdigit() and int(shape):
        return _cpu(topology, int(shape))
    if topology == "gpu":
        return _gpu()
    raise ValueError(
        f"--topology must be a TPU's name and shape ({', '.join(hardware.TPUS)}; e.g. v5e:8x8 or v5p:2x2x4), "
        f"cpu:N for N simulated devices, or gpu for this machine's; got {topology!r}."
    )


def _tpu(topology: str, chip: Chip, num_chips: int) -> Target:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology={topology} needs libtpu, the TPU compiler, which runs anywhere: "
            "uv pip install -e '.[tpu]' (the tpu extra) brings it."
        )
    # Compiling needs no TPU: libtpu must not query a cloud's metadata, and other processes may compile beside this one.
    # The host name and type are only there because libtpu complains without them.
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    _only_cpu()
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"--topology={topology}: the TPU compiler knows no such slice ({str(error).splitlines()[0]}); take a shape "
            "of whole hosts, e.g. v5e:4x4, v6e:8x8 or v5p:2x2x4."
        ) from error
    fraction = num_chips / len(devices)  # Devices of v4 are cores, half a chip each.
    return Target(topology, devices, _scaled(chip, fraction), chip.hbm_bytes * fraction)


def _cpu(topology: str, count: int) -> Target:
    # Works only before the first use of JAX. The other way to set their number, a flag of XLA, must not contradict it.
    os.environ["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\S*", "", os.environ.get("XLA_FLAGS", ""))
    _only_cpu(count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(f"--topology={topology}: this process was started with {len(devices)} CPU devices.")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Target(topology, devices[:count], None, memory / count)


def _gpu() -> Target:
    try:
        devices = jax.devices("gpu")
    except RuntimeError as error:
        raise ValueError(
            "--topology=gpu: JAX finds no GPU here (the gpu extra brings its plugin: uv pip install -e '.[gpu]'); "
            "give a TPU's topology, e.g. v5e:8x8, or cpu:N."
        ) from error
    chip = hardware.gpu(devices[0].device_kind)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit", chip.hbm_bytes if chip else 0)
    return Target(f"gpu:{len(devices)} ({devices[0].device_kind})", devices, chip, limit)


def _only_cpu(count: int | None = None) -> None:
    try:
        jax.config.update("jax_platforms", "cpu")
        if count:
            jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # JAX has been used already: its devices stay what they are.


def _scaled(chip: Chip, fraction: float) -> Chip:
    names = ("hbm_bytes", "flops", "hbm_bandwidth", "link_bandwidth")
    return dataclasses.replace(chip, **{name: fraction * getattr(chip, name) for name in names})
