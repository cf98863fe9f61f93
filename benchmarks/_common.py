"""Times pairs of actions, makes claims of the timings, and reports them: shared by all benchmarks.

    arguments = common.parser(__doc__, repeats=7).parse_args()
    ratios = [common.ratio(ours, theirs) for _ in range(arguments.repeats)]
    common.report("attention", [common.claim("prefill vs peer", ratios, "x", target=1.0)], ["peer"])

A benchmark installs nothing. Its file must not be called like a package that it imports: Python would find it first.
It imports this module before the project, which then is found where the benchmark stands, installed or not.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finemem_jax.types import Completion

# The project is found in the checkout that the benchmark stands in, before any that is installed.
sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[1]))

# Other work on the machine before this began; by the end the benchmark itself has raised it.
_LOAD = os.getloadavg()[0]


def parser(doc: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """Makes a parser of the command line, whose help is the benchmark's docstring, and which knows --repeats.

    Args:
        doc: The docstring.
        repeats: How often everything is measured by default.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=repeats, help=f"of all measurements (default: {repeats})")
    return made


def peer(package: str, install: str) -> ModuleType:
    """Imports a package that is compared with; ends the program if it is not there, and says how to get it.

    Args:
        package: Name to import.
        install: The command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        sys.exit(f"This benchmark compares with {package}, which is not installed here. To get it: {install}")


def seconds(action: Callable[[], Any]) -> float:
    """Times one call (wall time). What JAX computes counts only if the call waits for it (`jax.block_until_ready`)."""
    # Collected before and not during: one side's garbage would be paid for by the other.
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        action()
        return time.perf_counter() - began
    finally:
        if was_enabled:
            gc.enable()


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any]) -> float:
    """Times both sides, one right after the other; returns how much longer theirs takes: above 1, ours is faster."""
    own = seconds(ours)
    return seconds(theirs) / own


def completions(results: Sequence[Any]) -> list[Completion]:
    """Returns what a sampler gave for some requests, none of which may have been refused."""
    from finemem_jax.types import Completion

    found = [result for result in results if isinstance(result, Completion)]
    assert len(found) == len(results), results
    return found


class Worker:
    """Runs one side of a comparison in a process of its own: sides share no threads, and no memory that one warms up.

    The process reads a line for each thing to do and answers with a line of JSON; nothing else may go to its stdout.
    """

    def __init__(self, *command: str):
        """Starts the process; `command` is a Python file and its arguments."""
        self._process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self) -> dict[str, Any]:
        """Waits for the next line that the process writes unasked."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            sys.exit(self._process.wait() or 1)  # It has said why.
        return json.loads(line)

    def do(self, what: str) -> dict[str, Any]:
        """Has it do one thing, and returns what it answers."""
        assert self._process.stdin
        print(what, file=self._process.stdin, flush=True)
        return self.read()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def claim(
    name: str, runs: Sequence[float], unit: str, *, target: float | None = None, lower_is_better: bool = False
) -> dict[str, Any]:
    """Makes a claim of what was measured several times; its value is the median.

    Args:
        name: What is measured, e.g. "update and 5 queries vs rebuilding, 100 items".
        runs: One value per repeat; ratios are taken pair by pair (`ratio`).
        unit: "x" for ratios, else a unit: "ms", "GB", "tokens/s".
        target: What the value must reach; None for what is only reported.
        lower_is_better: Whether the value must stay at or below the target, as times and sizes do.
    """
    value = statistics.median(runs)
    holds = None if target is None else value <= target if lower_is_better else value >= target
    return {
        "claim": name,
        "value": _rounded(value),
        "unit": unit,
        "target": target,
        "holds": holds,
        "runs": [_rounded(run) for run in runs],
    }


def peak_gigabytes() -> float:
    """Returns the most memory this process has held (GB)."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            # Not getrusage's figure: a process inherits that one from whatever started it.
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    except OSError:
        unit = 2**30 if sys.platform == "darwin" else 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def report(benchmark: str, claims: Sequence[dict[str, Any]], packages: Sequence[str] = ()) -> None:
    """Prints the claims for people, and as the last line all of it as one JSON object.

    Args:
        benchmark: The file's name without ending.
        packages: Distributions whose versions matter, besides Python, jax, jaxlib and numpy.
    """
    width = max(len(one["claim"]) for one in claims)
    for one in claims:
        verdict = {None: "", True: "holds", False: "DOES NOT HOLD"}[one["holds"]]
        target = "" if one["target"] is None else f"target {one['target']:g} {one['unit']}"
        print(f"{one['claim']:{width}}  {one['value']:>10g} {one['unit']:9} {target:18} {verdict}".rstrip())
    line = {"benchmark": benchmark, "claims": list(claims), "machine": machine(), "versions": versions(packages)}
    print(json.dumps(line, ensure_ascii=False), flush=True)


def machine() -> dict[str, Any]:
    """Describes what the figures depend on: processor, cores this process may use, memory, accelerators, other work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"platform": platform.platform(), "processor": _processor(), "cores": cores}
    found["memory_gigabytes"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    found["load_before"] = round(_LOAD, 2)
    if "jax" in sys.modules:
        import jax

        found["devices"] = [device.device_kind for device in jax.devices()]
    return found


def versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Returns the versions of Python and of what is installed among jax, jaxlib, numpy and `packages`."""
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "numpy", *packages):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
