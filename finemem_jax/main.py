"""The command line: flags and dispatch.

python -m finemem_jax.main --config=experiments/NAME.py[:arg] --workdir=DIR [--mode=MODE] [--config.a.b=value …]
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from absl import app, flags, logging
from ml_collections import config_flags

from finemem_jax import config as config_lib
from finemem_jax.config import renamed
from finemem_jax.config.sections import Config

if TYPE_CHECKING:  # Loading it takes seconds.
    from finemem_jax.build import Components

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, e.g. experiments/smollm2_135m.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything the run writes; --mode=plan can do without.")
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate", "report", "sweep", "plan", "questions", "follow", "export"], "What to do."
)
_TOPOLOGY = flags.DEFINE_string("topology", "", 'What --mode=plan compiles for, e.g. "v5e:8x8", "cpu:8" or "gpu".')
_SWEEP = flags.DEFINE_string(
    "sweep",
    "",
    'Settings to train all combinations of, e.g. "credit.beta=0,0.5;seed=0,1"; without it, --mode=sweep trains what '
    "the experiment's sweep() lists.",
)
_SWEEP_JOBS = flags.DEFINE_integer("sweep_jobs", 1, "How many members of a sweep train at once.", lower_bound=1)

_VERIFY = flags.DEFINE_bool(
    "verify",
    False,
    "With --mode=export: load the export with transformers and compare; of one that is there, only that.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, 'Training by several processes: "host:port" of the first one, the same for all of them.'
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", lower_bound=0)
_CLUSTER = flags.DEFINE_bool("cluster", False, "Ask TPU pod, SLURM, GKE or Open MPI for these three.")

# What the program ends with: where it would go on if it were started again (EX_TEMPFAIL of sysexits.h); where files
# cannot be written (EX_IOERR); after SIGTERM, to it or to another process of the run, with all saved; after Ctrl-C.
_TRY_AGAIN, _NO_WRITING, _TERMINATED, _INTERRUPTED = 75, 74, 85, 130
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)

# The rest of a mode's work, once all is prepared that a wrong setting or file can break; gives the lines to end with.
Work = Callable[[], Iterable[str]]


def main(_) -> None:
    config = _CONFIG.value
    if _TOPOLOGY.value and _MODE.value != "plan":
        sys.exit("finemem_jax: --topology needs --mode=plan.")
    if _MODE.value == "plan":
        from finemem_jax.planning import tables

        folder = pathlib.Path(_WORKDIR.value) if _WORKDIR.value else None
        sys.exit(_stop_on_bad_input(lambda: tables.run(config_lib.parse(config), _TOPOLOGY.value, folder)))
    if not _WORKDIR.value:
        sys.exit("finemem_jax: --workdir is missing: the folder for everything the run writes.")
    workdir = pathlib.Path(_WORKDIR.value)
    if _MODE.value == "report":
        from finemem_jax.evaluation import report

        _stop_on_bad_input(lambda: print(f"report         {report.write(workdir)}"))
        return
    if _SWEEP.value and _MODE.value != "sweep":
        sys.exit("finemem_jax: --sweep needs --mode=sweep.")
    if _MODE.value == "sweep":
        sys.exit(_stop_on_bad_input(lambda: _sweep(workdir)))
    if _MODE.value != "train" and (_COORDINATOR.value or _CLUSTER.value):
        sys.exit("finemem_jax: only --mode=train is done by processes together; --mode=evaluate has evaluate.shard.")
    if _VERIFY.value and _MODE.value != "export":
        sys.exit("finemem_jax: --verify needs --mode=export.")
    # Imported late: whoever only misspelt a flag should not wait for JAX.
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/finemem_jax/compiled"))
    logging.set_verbosity(logging.WARNING)
    modes = {"train": _train, "evaluate": _evaluate, "questions": _questions, "follow": _follow, "export": _export}
    sys.exit(_run(modes[_MODE.value], config, workdir))


def _run(
    mode: Callable[[Config, pathlib.Path, contextlib.ExitStack], Work],
    values: config_lib.ConfigDict,
    workdir: pathlib.Path,
) -> int:
    """Prepares a mode and does its work; returns what the program ends with."""
    from finemem_jax.clients.endpoint import EndpointError
    from finemem_jax.questions.costs import BudgetError
    from finemem_jax.runtime.distributed import PeerError, PeerStops
    from finemem_jax.runtime.preemption import Terminated
    from finemem_jax.runtime.watchdog import StopError

    def prepare():
        return mode(config_lib.parse(values), workdir, stack)

    with contextlib.ExitStack() as stack:
        work = _stop_on_bad_input(prepare)
        try:
            for line in work():
                print(line)
        except (Terminated, PeerStops):
            return _TERMINATED
        except KeyboardInterrupt:
            return _INTERRUPTED
        except (BudgetError, EndpointError, StopError) as error:
            print(f"finemem_jax: {error}", file=sys.stderr)
            return _TRY_AGAIN
        except PeerError as error:
            print(f"finemem_jax: {error}", file=sys.stderr, flush=True)
            # Whoever leaves by the door waits there for the others.
            os._exit(_TRY_AGAIN)
        except OSError as error:
            # Ours have no number, and say what to do.
            if error.errno not in (None, *_DISK_ERRORS):
                raise
            more = ". See to space and rights; then the same command goes on." if error.errno else ""
            print(f"finemem_jax: {error}{more}", file=sys.stderr)
            return _NO_WRITING
    return 0


def _train(config: Config, workdir: pathlib.Path, stack: contextlib.ExitStack) -> Work:
    from finemem_jax.runtime import distributed
    from finemem_jax.training import train

    processes = stack.enter_context(
        distributed.connect(
            coordinator=_COORDINATOR.value,
            count=_NUM_PROCESSES.value,
            index=_PROCESS_ID.value,
            detect=_CLUSTER.value,
            timeout_seconds=config.train.barrier_seconds,
        )
    )
    return train.prepare(config, workdir, processes, stack)


def _evaluate(config: Config, workdir: pathlib.Path, stack: contextlib.ExitStack) -> Work:
    from finemem_jax.evaluation import benchmark
    from finemem_jax.runtime import checkpoint

    checkpoint.check(workdir, config)
    benchmark.check(config, workdir)
    benchmarks = benchmark.load(config)
    components = _build(config, workdir, stack)
    checkpoint.claim(workdir, config)
    return lambda: _stop_on_bad_input(lambda: benchmark.run(config, workdir, components, benchmarks=benchmarks))


def _follow(config: Config, workdir: pathlib.Path, stack: contextlib.ExitStack) -> Work:
    from finemem_jax import build
    from finemem_jax.runtime import checkpoint
    from finemem_jax.serving import follow

    checkpoint.check(workdir, config)
    follow.check(config)
    components = _build(config, workdir, stack)
    step = build.use_checkpoint(components, workdir) if checkpoint.newest(workdir) is not None else 0
    checkpoint.claim(workdir, config)
    return lambda: _stop_on_bad_input(lambda: follow.run(config, workdir, components, step=step))


def _questions(config: Config, workdir: pathlib.Path, stack: contextlib.ExitStack) -> Work:
    from finemem_jax.questions import run

    del stack  # It opens nothing before its work begins.
    return lambda: _stop_on_bad_input(lambda: run.run(config, workdir))


def _export(config: Config, workdir: pathlib.Path, stack: contextlib.ExitStack) -> Work:
    from finemem_jax.runtime import checkpoint
    from finemem_jax.serving import export, parity

    del stack  # It opens nothing before its work begins.
    checkpoint.check(workdir, config)
    folder = export.folder_of(config, workdir)
    if _VERIFY.value:
        parity.check(config)
    is_there = _VERIFY.value and folder.is_dir()
    if not is_there:
        export.check(config, workdir)

    def work():
        if not is_there:
            yield from export.run(config, workdir)
        if _VERIFY.value:
            yield from parity.verify(folder, config, workdir)

    return lambda: _stop_on_bad_input(lambda: list(work()))


def _build(config: Config, workdir: pathlib.Path, stack: contextlib.ExitStack) -> Components:
    """The components of a run, whose readers are closed when it ends."""
    from finemem_jax import build

    components = build.build(config, workdir)
    stack.callback(components.answering.close)
    return components


def _sweep(workdir):
    from finemem_jax.training import sweep, sweep_members

    flag = flags.FLAGS["config"]
    experiment, overrides = config_flags.get_config_filename(flag), config_flags.get_override_values(flag)
    return sweep.run(sweep_members.find(experiment, overrides, _SWEEP.value), workdir, _SWEEP_JOBS.value)


def _stop_on_bad_input(action):
    """Runs what can fail on a wrong setting or file only, and says what to mend instead of a traceback."""
    try:
        return action()
    except ValueError as error:
        sys.exit(f"finemem_jax: {error}")


def _parse(argv):
    """Flags as absl reads them; a setting that does not exist is named, with those that it may have been meant for."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        known = config_lib.flatten(config_lib.default())
        given = [re.match(r"--(?:no)?config\.([\w.]+)", argument) for argument in argv]
        unknown = [match[1] for match in given if match and match[1] not in known]
        # Or the experiment's file sets a field of a section that is no more.
        section = re.match(r"\W*(\w+)", str(error))
        earlier = [name for name in (section[1], f"reader.{section[1]}") if renamed.successor(name)] if section else []
        if not (unknown or earlier):
            raise
        sys.exit(f"finemem_jax: {config_lib.no_setting((unknown or earlier)[0])}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=_parse)
