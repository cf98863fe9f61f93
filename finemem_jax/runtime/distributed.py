"""Connects the processes that train together: they find each other, exchange values, and stop together.

Values go through the key-value store of JAX's coordinator, not over the devices: so nothing is compiled for them, and
a process that waits can say for which other one. A process alone has nobody to wait for, and all of this costs nothing.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import platform
import time
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import jax

# How long one wait for a value takes, before a process checks whether its sender has failed.
_WAIT_SECONDS = 2.0
# Longer values are sent in pieces: gRPC servers refuse long messages.
_PIECE_BYTES = 1 << 20
# At most so often a process looks whether another asks to stop.
_POLL_SECONDS = 1.0
# After an error of the devices, how long the others have to say that they are there.
_ROLL_CALL_SECONDS = 20.0
# Begins what a process gives that stops, in place of a value; zlib's output never begins so.
_STOPPED = b"stopped: "
# Begins each piece of a value, so that nobody has to ask how many there are.
_MORE, _LAST = b"\0", b"\1"


class PeerError(Exception):
    """Another process is missing or has failed, so that this one cannot go on; started again, all would."""


class PeerStops(KeyboardInterrupt):
    """Another process was told to stop; all stop together."""


class AskedByPeer(PeerStops):
    """It was noticed between two exchanges, and others may not know: `Processes.stop` must be called."""


class StoppedByPeer(PeerStops):
    """It was noticed in an exchange, so that all processes know."""


class Processes:
    """The processes of a run. A context manager: one that leaves it by an error tells the others.

    Attributes:
        index: Which of them this one is, from 0.
        count: How many there are.
    """

    def __init__(self, *, index: int = 0, count: int = 1, client: Any = None, timeout_seconds: float = 1_800.0):
        """Introduces this process to the others.

        Args:
            client: JAX's client of its coordinator (`DistributedRuntimeClient`); None for a process alone.
            timeout_seconds: How long to wait for the others.
        """
        assert (count == 1) == (client is None), "several processes need a coordinator, one alone has none"
        self.index, self.count, self._timeout_seconds = index, count, timeout_seconds
        self._client = client
        self._round = 0  # Exchanges so far; all processes count alike, so the number names an exchange.
        self._polled = 0.0
        self._old: list[str] = []  # Keys of the last exchange, which are still in the store.
        if count > 1:
            self._set(f"who/{index}", f"{platform.node()}, pid {os.getpid()}".encode())

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.count > 1 and error is not None and not isinstance(error, (KeyboardInterrupt, PeerError)):
            self._set(f"failed/{self.index}", f"{type(error).__name__}: {error}".encode())

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints for all."""
        return self.index == 0

    def all_gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, by index. All must call this in the same order.

        Args:
            value: Anything that can be pickled.

        Raises:
            StoppedByPeer: in all processes, if one of them called `stop` instead.
            PeerError: a process does not come within the time, or has failed.
        """
        if self.count == 1:
            return [value]
        found = self._exchange(zlib.compress(pickle.dumps(value), 1))
        for index, data in enumerate(found):
            if data.startswith(_STOPPED):
                raise StoppedByPeer(f"process {index} stops: {data.removeprefix(_STOPPED).decode()}")
        return [pickle.loads(zlib.decompress(data)) for data in found]

    def broadcast(self, value: Any) -> Any:
        """Returns the first process's value, in all of them."""
        return self.all_gather(value if self.is_first else None)[0]

    def barrier(self) -> None:
        """Waits until all processes are here."""
        self.all_gather(None)

    def stop(self, reason: str) -> None:
        """Takes part in the others' next `all_gather` by telling them to stop; returns when all know.

        A process that is told to stop between two `all_gather` calls this in place of the second. So all stop at the
        same point.
        """
        if self.count > 1:
            self._set("stop", reason.encode(), overwrite=True)
            self._exchange(_STOPPED + reason.encode())

    def check(self) -> None:
        """Raises AskedByPeer if another process asks to stop; looks at most once a second."""
        if self.count == 1 or time.monotonic() < self._polled + _POLL_SECONDS:
            return
        self._polled = time.monotonic()
        reason = self._get("stop")
        if reason is not None:
            raise AskedByPeer(reason.decode())

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Replaces an error of the devices that processes share by one that names the missing process.

        Raises:
            PeerError: in place of that error.
        """
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if self.count == 1:
                raise
            missing = self._roll_call() or ["none of them is missing"]
            raise PeerError(
                f"the processes cannot compute together any more ({str(error).partition(chr(10))[0][:200]}): "
                f"{'; '.join(missing)}. See to it, and start all of them again: the run goes on."
            ) from error

    def _roll_call(self) -> list[str]:
        """Returns who does not answer, of all who should have met the same error."""
        self._set(f"here/{self.index}", b"", overwrite=True)
        deadline, missing = time.monotonic() + _ROLL_CALL_SECONDS, []
        for index in range(self.count):
            try:
                self._blocking_get(f"here/{index}", deadline - time.monotonic())
            except jax.errors.JaxRuntimeError:
                missing.append(f"process {index} of {self.count} ({self._who(index)}) does not answer")
        return missing

    def _who(self, index: int) -> str:
        return (self._get(f"who/{index}") or b"never seen").decode()

    def _exchange(self, data: bytes) -> list[bytes]:
        """Gives `data` to all processes, and returns what each of them gave, by index."""
        self._round += 1
        pieces = [data[start : start + _PIECE_BYTES] for start in range(0, len(data), _PIECE_BYTES)] or [b""]
        mine = [f"{self._round}/{self.index}/{number}" for number in range(len(pieces))]
        for key, piece in zip(mine, pieces, strict=True):
            self._set(key, (_LAST if key == mine[-1] else _MORE) + piece)
        deadline = time.monotonic() + self._timeout_seconds
        found = []
        for index in range(self.count):
            parts: list[bytes] = []
            while not parts or parts[-1].startswith(_MORE):
                parts.append(self._wait(f"{self._round}/{index}/{len(parts)}", index, deadline))
            found.append(b"".join(part[1:] for part in parts))
        # A process that has given something in this exchange has read all that was given in the last.
        for key in self._old:
            self._client.key_value_delete(f"finemem/{key}")
        self._old = mine
        return found

    def _wait(self, key: str, index: int, deadline: float) -> bytes:
        """Waits for a value from process `index`; raises PeerError if that has failed or does not come in time."""
        while True:
            left = deadline - time.monotonic()
            try:
                return self._blocking_get(key, min(left, _WAIT_SECONDS))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise PeerError(f"the coordinator of the processes does not answer ({error}).") from error
            who = self._who(index)
            failed = self._get(f"failed/{index}")
            if failed is not None:
                raise PeerError(f"process {index} ({who}) has failed: {failed.decode()}")
            if left <= 0:
                raise PeerError(
                    f"process {index} of {self.count} ({who}) has not come within {self._timeout_seconds:.0f} s. See "
                    "whether it still runs; where it is only slow, raise train.barrier_seconds."
                )

    def _set(self, key: str, value: bytes, *, overwrite: bool = False) -> None:
        self._client.key_value_set_bytes(f"finemem/{key}", value, allow_overwrite=overwrite)

    def _get(self, key: str) -> bytes | None:
        try:
            return self._client.key_value_try_get_bytes(f"finemem/{key}")
        except jax.errors.JaxRuntimeError:  # There is no such key.
            return None

    def _blocking_get(self, key: str, seconds: float) -> bytes:
        return self._client.blocking_key_value_get_bytes(f"finemem/{key}", 1 + int(1000 * max(seconds, 0)))


def connect(
    *, coordinator: str | None, count: int | None, index: int | None, detect: bool, timeout_seconds: float
) -> Processes:
    """Finds the other processes of a run, before JAX is used for anything.

    Args:
        coordinator: "host:port" of the first process; None: of the environment (JAX_COORDINATOR_ADDRESS), if any.
        count: How many processes there are; None: of the environment.
        index: Which one this is; None: of the environment.
        detect: Ask the surroundings (TPU pods, SLURM, GKE, Open MPI) what is not given.
        timeout_seconds: How long to wait for the others, here and later.

    Raises:
        ValueError: the processes do not find each other.
    """
    if not (coordinator or detect or os.environ.get("JAX_COORDINATOR_ADDRESS")):
        return Processes(timeout_seconds=timeout_seconds)
    start_seconds = max(int(min(timeout_seconds, 300)), 1)
    try:
        jax.distributed.initialize(coordinator, count, index, initialization_timeout=start_seconds)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"the processes of this run did not find each other ({str(error).partition(chr(10))[0]}). Give each "
            "--coordinator=HOST:PORT of the first process, --num_processes and its own --process_id; or, on TPU pods, "
            "SLURM, GKE and Open MPI, --cluster alone."
        ) from error
    if jax.process_count() == 1:
        return Processes(timeout_seconds=timeout_seconds)
    # JAX has no public name for the coordinator's client; Orbax takes it from here as well.
    from jax._src import distributed

    return Processes(
        index=jax.process_index(),
        count=jax.process_count(),
        client=distributed.global_state.client,
        timeout_seconds=timeout_seconds,
    )
