"""Several processes that train together: how they find each other, exchange values, and stop together.

Values go through the key-value store of JAX's coordinator, not over the devices: so nothing is compiled for them, and
who waits knows for whom. A process alone has nobody to wait for; what follows then costs nothing.
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
from typing import Any, Protocol

import jax

# How long one look for a value takes, before a process asks whether the others still live (s).
_LOOK = 2.0
# Values are sent in pieces of so many bytes: servers of gRPC refuse long messages.
_PIECE = 1 << 20
# At most so often a process looks whether another asks to stop (s).
_POLL = 1.0
# After an error of the devices, how long the others have to say that they are there (s).
_ROLL_CALL = 20.0
_STOPPED = b"stopped: "


class PeerError(Exception):
    """Another process is missing or has failed, so that this one cannot go on; started again, all would."""


class PeerStops(KeyboardInterrupt):
    """Another process was told to stop; all stop together."""


class AskedByPeer(PeerStops):
    """It was heard of between two gatherings; `Processes.stop` is now to be called."""


class StoppedByPeer(PeerStops):
    """It was heard of in a gathering: all know."""


class Client(Protocol):
    """What is needed of JAX's client of its coordinator."""

    def key_value_set_bytes(self, key: str, value: bytes, allow_overwrite: bool = False) -> None: ...
    def blocking_key_value_get_bytes(self, key: str, timeout_in_ms: int) -> bytes: ...
    def key_value_try_get_bytes(self, key: str) -> bytes: ...
    def key_value_delete(self, key: str) -> None: ...


class Processes:
    """The processes of a run. A context manager: who leaves it by an error tells the others.

    Attributes:
        index: Which of them this one is, from 0.
        count: How many there are.
    """

    def __init__(self, index: int = 0, count: int = 1, client: Client | None = None, seconds: float = 1_800.0):
        """Args:
        client: Of the coordinator; None for a process alone.
        seconds: How long to wait for the others.
        """
        assert (count == 1) == (client is None), "several processes need a coordinator, one alone has none"
        self.index, self.count, self._seconds = index, count, seconds
        self._client: Any = client
        self._round = 0
        self._polled = 0.0
        self._old: list[str] = []  # Keys of the last round, which still stand in the store.
        if count > 1:
            self._set(f"who/{index}", f"{platform.node()}, pid {os.getpid()}".encode())

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.count > 1 and error is not None and not isinstance(error, (KeyboardInterrupt, PeerError)):
            self._set(f"failed/{self.index}", f"{type(error).__name__}: {error}".encode())

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes what all have to say."""
        return self.index == 0

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all processes, by index. All must call this in the same order.

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
        """The first process's value, in all of them."""
        return self.all_gather(value if self.is_first else None)[0]

    def barrier(self) -> None:
        """Waits until all processes are here."""
        self.all_gather(None)

    def stop(self, reason: str) -> None:
        """Takes part in the others' next `gather` by telling them to stop; returns when all know.

        Whoever is told to stop between two gathers calls this in place of the second. So all stop at the same point.
        """
        if self.count > 1:
            self._client.key_value_set_bytes("finemem/stop", reason.encode(), allow_overwrite=True)
            self._exchange(_STOPPED + reason.encode())

    def check(self) -> None:
        """Raises AskedByPeer if another process asks to stop; looks at most once a second."""
        if self.count == 1 or time.monotonic() < self._polled + _POLL:
            return
        self._polled = time.monotonic()
        reason = self._get("stop")
        if reason is not None:
            raise AskedByPeer(reason.decode())

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Says of an error of the devices that processes share which of these is missing.

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

    def _roll_call(self):
        """Who does not answer, of all who should have met the same error."""
        self._client.key_value_set_bytes(f"finemem/here/{self.index}", b"", allow_overwrite=True)
        deadline, missing = time.monotonic() + _ROLL_CALL, []
        for index in range(self.count):
            try:
                left = 1 + int(1000 * max(deadline - time.monotonic(), 0))
                self._client.blocking_key_value_get_bytes(f"finemem/here/{index}", left)
            except jax.errors.JaxRuntimeError:
                missing.append(f"process {index} of {self.count} ({self._who(index)}) does not answer")
        return missing

    def _who(self, index):
        return (self._get(f"who/{index}") or b"never seen").decode()

    def _exchange(self, data):
        """One round: gives `data`, returns what each process gave."""
        self._round += 1
        pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)] or [b""]
        mine = [f"{self._round}/{self.index}/{number}" for number in range(len(pieces))]
        for number, (key, piece) in enumerate(zip(mine, pieces, strict=True), 1):
            # The last piece is marked, so that nobody has to ask how many there are.
            self._set(key, (b"\1" if number == len(pieces) else b"\0") + piece)
        deadline = time.monotonic() + self._seconds
        found = []
        for index in range(self.count):
            parts, number = [], 0
            while not parts or parts[-1][:1] == b"\0":
                parts.append(self._wait(f"{self._round}/{index}/{number}", index, deadline))
                number += 1
            found.append(b"".join(part[1:] for part in parts))
        # Who has given something in this round has read all that was given in the last.
        for key in self._old:
            self._client.key_value_delete(f"finemem/{key}")
        self._old = mine
        return found

    def _wait(self, key, index, deadline):
        while True:
            left = deadline - time.monotonic()
            try:
                wait = 1 + int(1000 * max(min(left, _LOOK), 0))
                return self._client.blocking_key_value_get_bytes(f"finemem/{key}", wait)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise PeerError(f"the coordinator of the processes does not answer ({error}).") from error
            who = self._who(index)
            failed = self._get(f"failed/{index}")
            if failed is not None:
                raise PeerError(f"process {index} ({who}) has failed: {failed.decode()}")
            if left <= 0:
                raise PeerError(
                    f"process {index} of {self.count} ({who}) has not come within {self._seconds:.0f} s. See whether "
                    "it still runs; where it is only slow, raise train.barrier_seconds."
                )

    def _set(self, key, value):
        self._client.key_value_set_bytes(f"finemem/{key}", value)

    def _get(self, key):
        try:
            return self._client.key_value_try_get_bytes(f"finemem/{key}")
        except jax.errors.JaxRuntimeError:  # There is no such key.
            return None


def connect(
    coordinator: str | None, count: int | None, index: int | None, detect: bool, seconds: float = 1_800.0
) -> Processes:
    """Finds the other processes of a run, before JAX is used for anything.

    Args:
        coordinator: "host:port" of the first process; None: of the environment (JAX_COORDINATOR_ADDRESS), if any.
        count, index: How many processes there are, and which one this is; None: of the environment.
        detect: Ask the surroundings (TPU pods, SLURM, GKE, Open MPI) what is not given.
        seconds: How long to wait for the others, here and later.

    Raises:
        ValueError: the processes do not find each other.
    """
    if not (coordinator or detect or os.environ.get("JAX_COORDINATOR_ADDRESS")):
        return Processes(seconds=seconds)
    try:
        jax.distributed.initialize(coordinator, count, index, initialization_timeout=max(int(min(seconds, 300)), 1))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"the processes of this run did not find each other ({str(error).partition(chr(10))[0]}). Give each "
            "--coordinator=HOST:PORT of the first process, --num_processes and its own --process_id; or, on TPU pods, "
            "SLURM, GKE and Open MPI, --cluster alone."
        ) from error
    if jax.process_count() == 1:
        return Processes(seconds=seconds)
    # JAX has no public name for it; Orbax takes it from here as well.
    from jax._src import distributed

    return Processes(jax.process_index(), jax.process_count(), distributed.global_state.client, seconds)
