"""Work on several devices or machines: Ray actors that take jobs from one queue.

Ray restarts a worker that dies and repeats its job, so no work is lost.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from whittle_nas.errors import ConfigError

_RETRIES = 3  # deaths of a worker that one job may cause before it is given up


@dataclass(frozen=True)
class Lost:
    """What comes back of a job that killed its worker again and again.

    Attributes:
        reason: what Ray says about it.
    """

    reason: str


class Workers:
    """Actors on one device each, or on as many as the model is placed on.

    Contract: every submitted job comes back from `next` exactly once, in any order; idle workers
    take the job that was submitted first.
    """

    def __init__(
        self,
        kind: type,
        method: str,
        *,
        count: int,
        gpus: int,
        address: str | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Start the workers and wait until each is ready.

        Args:
            kind: their class, without arguments, see `bound`; its method `ready` answers when the
                constructor has ended.
            method: takes a job, and returns its result.
            count: how many workers.
            gpus: of each; with 0 each takes a CPU.
            address: a running Ray cluster, `auto` for the one of this machine; None: start one that
                ends with this process.
            warn: takes sentences for the user.

        Raises:
            ConfigError: if Ray is not installed, the cluster is not there or has too few devices,
                or if a worker can't start.
        """
        self._ray = _import_ray()
        self._method, self._warn = method, warn
        self._actors: list[Any] = []
        self._started = _connect(self._ray, address, count, on_gpu=gpus > 0)
        try:
            check_room(self._ray.nodes(), count, gpus)
            actor = self._ray.remote(
                num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=_RETRIES
            )(kind)
            self._actors = [actor.remote() for _ in range(count)]
            self._ray.get([worker.ready.remote() for worker in self._actors])
        except self._ray.exceptions.RayError as error:
            self.close()
            raise ConfigError(
                f"--devices {count}: a worker could not start: {_reason(error)}"
            ) from None
        except ConfigError:
            self.close()
            raise
        self._idle = deque(self._actors)
        self._queue: deque[Any] = deque()
        self._running: dict[Any, tuple[Any, Any]] = {}

    def submit(self, job: Any) -> None:
        """Start a job on an idle worker, or queue it."""
        self._queue.append(job)
        self._start()

    def next(self) -> tuple[Any, Any]:
        """Wait for one job: itself, and its result, or `Lost`.

        Raises:
            ConfigError: if the job raised one or failed otherwise, or if no worker is left.
        """
        while True:
            ready, _ = self._ray.wait(list(self._running), num_returns=1)
            worker, job = self._running.pop(ready[0])
            try:
                result = self._ray.get(ready[0])
            except self._ray.exceptions.ActorDiedError as error:
                self._lose(worker, job, error)
                continue
            except self._ray.exceptions.RayTaskError as error:
                cause = error.cause
                if isinstance(cause, ConfigError):
                    raise cause from None
                raise ConfigError(f"--devices: a worker failed: {_reason(error)}") from None
            except self._ray.exceptions.RayError as error:
                result = Lost(_reason(error))  # the worker itself comes back
            self._idle.append(worker)
            self._start()
            return job, result

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        for worker in self._actors:
            self._ray.kill(worker)
        if self._started:
            self._ray.shutdown()

    def _lose(self, worker: Any, job: Any, error: Exception) -> None:
        """A worker that can't be restarted: the others take over."""
        self._actors.remove(worker)
        if not self._actors:
            raise ConfigError(
                f"--devices: the last worker died and can't restart: {_reason(error)}"
            )
        self._warn(f"a worker died and can't restart, {len(self._actors)} go on: {_reason(error)}")
        self._queue.appendleft(job)
        self._start()

    def _start(self) -> None:
        while self._idle and self._queue:
            worker, job = self._idle.popleft(), self._queue.popleft()
            self._running[getattr(worker, self._method).remote(job)] = worker, job


def bound(kind: type, *arguments: Any) -> type:
    """A class that needs no arguments.

    What is handed to an actor's constructor lies in Ray's object store, whose loss would keep a
    worker from starting again; what the class holds travels with it.
    """

    def init(self: Any) -> None:
        kind.__init__(self, *arguments)

    return type(f"Bound{kind.__name__}", (kind,), {"__init__": init})


def threads_each(workers: int, placed_on: Sequence[torch.device]) -> int | None:
    """CPU threads of each worker; None where no part of the model is on the CPU."""
    if all(device.type != "cpu" for device in placed_on):
        return None
    return min(max(1, (os.cpu_count() or 1) // workers), torch.get_num_threads())


def as_seen_by_a_worker(
    placed_on: Sequence[torch.device],
) -> tuple[tuple[torch.device, ...], int]:
    """The devices of a model by the numbers that they have in a worker, and how many are GPUs.

    An actor sees the GPUs that Ray gave it, numbered from 0, whatever they are in the machine.
    """
    gpus = list(dict.fromkeys(device for device in placed_on if device.type == "cuda"))
    seen = {gpu: torch.device("cuda", number) for number, gpu in enumerate(gpus)}
    return tuple(seen.get(device, device) for device in placed_on), len(gpus)


def check_room(nodes: Sequence[Mapping[str, Any]], workers: int, gpus: int) -> None:
    """Refuse actors that can't be placed, which would wait for ever: none spans two machines.

    Args:
        nodes: machines, as `ray.nodes()` lists them.
        workers: actors.
        gpus: of each; with 0 each needs a CPU.

    Raises:
        ConfigError: if there is room for fewer.
    """
    kind, each = ("GPU", gpus) if gpus else ("CPU", 1)
    there = [int(node["Resources"].get(kind, 0)) for node in nodes if node["Alive"]]
    room = sum(count // each for count in there)
    if room < workers and each > 1:
        raise ConfigError(
            f"--devices {workers} with {each} GPUs each: the machines that Ray has have room for "
            f"{room}"
        )
    if room < workers:
        raise ConfigError(f"--devices {workers} exceeds the {room} {kind}s that Ray has")


def _import_ray() -> Any:
    # Read when Ray is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            "--devices needs Ray: pip install 'whittle-nas[ray]', or leave the option out"
        ) from None
    return ray


def _connect(ray: Any, address: str | None, workers: int, *, on_gpu: bool) -> bool:
    """Start Ray, or join a cluster; False if the process was connected before."""
    if ray.is_initialized():
        return False
    _check_address(address)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        options |= {"include_dashboard": False, "num_cpus": max(workers, os.cpu_count() or 1)}
        if not on_gpu:
            options["num_gpus"] = 0
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--ray_address {address}: no Ray cluster there ({error})") from None
    return True


def _check_address(address: str | None) -> None:
    """Ray itself tries for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(f"--ray_address {address}: no Ray cluster there ({error})") from None


def _reason(error: Exception) -> str:
    """The exception itself, out of Ray's report of where it happened."""
    cause = getattr(error, "cause", None) or error
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(cause)).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    line = lines[-1] if 'File "' in text else f"{type(cause).__name__}: {lines[0]}"
    return line.removeprefix("whittle_nas.errors.ConfigError: ")[:300]
