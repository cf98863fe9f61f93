"""Runs the command line in a process of its own, forked from one that has imported everything: imports take seconds."""

import dataclasses
import multiprocessing
import os
import pathlib
import runpy
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
_PRELOADED = (
    "finemem_jax.evaluation.report",
    "finemem_jax.training.sweep",
    "finemem_jax.training.train",
    "finemem_jax.questions.run",
)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(_PRELOADED))


@dataclasses.dataclass(frozen=True)
class Result:
    returncode: int | None
    stdout: str
    stderr: str


def main(*arguments: str, config: str = "experiments/smoke.py", timeout: float = 300) -> Result:
    """Does what `python -m finemem_jax.main --config=… arguments` does in the repository."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = pathlib.Path(folder, "out"), pathlib.Path(folder, "err")
        process = _context.Process(target=_run, args=([f"--config={config}", *arguments], out, err))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        return Result(process.exitcode, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))


def _run(arguments, out, err):
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = ["finemem_jax.main", *arguments]
    runpy.run_module("finemem_jax.main", run_name="__main__", alter_sys=True)
