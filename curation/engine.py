"""Run one function over many tasks with Ray: the only file that imports it.

    with Engine(config.engine) as engine:
        for position, result in engine.map(scan_shard, tasks, label="scan"):
            ...

Tasks and results are small plain objects; what is large lies in files. Results come as they
complete, so whatever is made of them must not depend on their order.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import ray
import ray.exceptions

from configs.errors import DataError, UsageError
from configs.progress import progress
from curation.config import EngineConfig
from curation.task import Actor, Failed, run_task

# Nothing large passes through the object store; Ray would take a third of the memory for it.
_OBJECT_STORE_BYTES = 100 * 1024 * 1024
_MAX_RETRIES = 3
# Set by slurm/curate.sbatch: the nodes of a cluster that is being started beside this driver.
_NODES = "PAIRMILL_RAY_NODES"
_NODES_SECONDS = 180.0


class Counted(Protocol):
    """A result that says how many samples it stands for."""

    @property
    def num_samples(self) -> int: ...  # noqa: D102


Task = TypeVar("Task")
Argument = TypeVar("Argument")
State = TypeVar("State")
Result = TypeVar("Result", bound=Counted)


def _await_head(address: str) -> None:
    """Wait until a head listens at HOST:PORT; ConnectionError where none does in time."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _NODES_SECONDS
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConnectionError(f"no head in {_NODES_SECONDS:.0f} s: {error}") from None
            time.sleep(0.2)


def _await_nodes(expected: int) -> None:
    """Wait for all nodes; go on without those that do not come, and say so."""
    deadline = time.monotonic() + _NODES_SECONDS
    while True:
        alive = sum(node["Alive"] for node in ray.nodes())
        if alive >= expected or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    late = "" if alive >= expected else f"; the others did not join in {_NODES_SECONDS:.0f} s"
    print(f"Ray: {alive} of {expected} nodes{late}", file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What each of some actors holds of a cluster."""

    num_actors: int | None = None  # as many as there is room for
    num_cpus: int = 1
    num_gpus: float = 0.0


class Engine:
    """A Ray cluster to run tasks on: joined, or started on this machine and shut down after."""

    def __init__(self, config: EngineConfig | None = None) -> None:
        self._config = config or EngineConfig()
        self._is_mine = False
        self._is_local = False  # Ray was started here, with num_workers CPUs

    def __enter__(self) -> Self:
        if not ray.is_initialized():
            self._start()
        self._remote = ray.remote(run_task).options(num_cpus=1, max_retries=_MAX_RETRIES)
        return self

    def _start(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        address = self._config.address or os.environ.get("RAY_ADDRESS") or "local"
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address == "local":
            quiet |= {
                "include_dashboard": False,
                "num_cpus": self._config.num_workers,
                "object_store_memory": _OBJECT_STORE_BYTES,
            }
        expected = int(os.environ.get(_NODES, "0")) if address != "local" else 0
        try:
            if expected:
                _await_head(address)
            ray.init(address=address, **quiet)
            if expected:
                _await_nodes(expected)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise DataError(
                f"Ray cannot be started or joined at {address!r}: {error}. Set engine.address or "
                "RAY_ADDRESS to a running cluster, or unset both to start one here."
            ) from None
        self._is_mine = True
        self._is_local = address == "local"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._is_mine:
            ray.shutdown()

    def map(
        self,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        *,
        label: str,
        unit: str = "shards",
    ) -> Iterator[tuple[int, Result]]:
        """Yield (position of the task, its result) as the tasks complete, with a progress bar.

        At most num_workers tasks run at once. A task whose worker dies is run again, three times.

        Raises:
            PairmillError: what a task raised.  DataError: a task's workers keep dying, or its files
                cannot be read or written.
        """
        workers = self._config.num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        # One task in reserve for each worker, where Ray itself holds the number of workers.
        window = workers if self._config.num_workers and not self._is_local else 2 * workers
        free: list[Callable[[Any], Any]] = [partial(self._remote.remote, function)] * window
        yield from self._run(free, tasks, label, unit)

    def map_actors(
        self,
        make: Callable[[Argument], State],
        argument: Argument,
        function: Callable[[State, Task], Result],
        tasks: Sequence[Task],
        *,
        label: str,
        resources: Resources,
        unit: str = "shards",
    ) -> Iterator[tuple[int, Result]]:
        """Yield (position, function(make(argument), task)) as `map` does, run by actors.

        Each actor calls `make` once, for what takes long to load, and holds `resources` until the
        last task is done. One that dies is started again and its task run again, three times.

        Raises:
            UsageError: the cluster has no room for one actor.  PairmillError, DataError: as `map`.
        """
        actor = ray.remote(Actor).options(
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            max_restarts=-1,
            max_task_retries=_MAX_RETRIES,
        )
        number = min(self._room(resources), resources.num_actors or len(tasks), len(tasks))
        if resources.num_actors and number < min(resources.num_actors, len(tasks)):
            print(f"{label}: room for {number} of {resources.num_actors} actors", file=sys.stderr)
        actors = [actor.remote(make, argument) for _ in range(number)]
        try:
            free: list[Callable[[Any], Any]]
            free = [partial(one.run.remote, function) for one in actors]
            yield from self._run(free, tasks, label, unit)
        finally:
            for one in actors:
                ray.kill(one)

    def _room(self, resources: Resources) -> int:
        """Return how many actors the cluster holds; UsageError where it is none."""
        there = ray.cluster_resources()
        wanted = {"CPU": resources.num_cpus, "GPU": resources.num_gpus}
        room = min(there.get(name, 0) / size for name, size in wanted.items() if size)
        if room < 1:
            has = ", ".join(f"{there.get(name, 0):g} {name}s" for name in wanted)
            raise UsageError(
                f"an actor asks for {resources.num_cpus} CPUs and {resources.num_gpus:g} GPUs "
                f"(resources), and all nodes of the Ray cluster together have {has}. Ask for "
                "less, or join a larger cluster (RAY_ADDRESS, engine.address)."
            )
        return int(room + 1e-9)

    def _run(
        self, free: list[Callable[[Any], Any]], tasks: Sequence[Any], label: str, unit: str
    ) -> Iterator[tuple[int, Any]]:
        """Hand tasks to what is free to start one, as long as there are any."""
        waiting = iter(enumerate(tasks))
        running: dict[Any, tuple[int, Callable[[Any], Any]]] = {}
        with progress(label, total=len(tasks), unit=unit) as bar:
            try:
                while True:
                    while free and (following := next(waiting, None)):
                        position, task = following
                        start = free.pop()
                        running[start(task)] = position, start
                    if not running:
                        return
                    done, _ = ray.wait(list(running), num_returns=1)
                    position, start = running.pop(done[0])
                    result = self._result(done[0], tasks[position], label)
                    free.append(start)
                    bar.advance(1, samples=result.num_samples)
                    yield position, result
            finally:
                for left in running:
                    ray.cancel(left, force=False)

    def _result(self, reference: Any, task: Any, label: str) -> Any:
        try:
            result = ray.get(reference)
        except ray.exceptions.RayTaskError as error:  # a bug: keep its traceback
            error.add_note(f"in {label} of {task}")
            raise
        except ray.exceptions.RayError as error:
            raise DataError(
                f"{label} of {task}: its worker died {_MAX_RETRIES + 1} times "
                f"({type(error).__name__}). Too little memory, or a file that crashes a library: "
                "look at the node's memory, or leave that shard out. The same line goes on."
            ) from None
        if isinstance(result, Failed):
            raise result.error
        return result
