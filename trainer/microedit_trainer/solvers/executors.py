"""Who runs the batches of targets: this process, several, or a Ray cluster.

A batch depends on nothing but its own stored prompts, so the targets are the same wherever it runs:
bit for bit with as many threads, which decide on the order of sums, else up to rounding. The
prompts travel with their residuals: a worker loads the model, and computes only the targets.
"""

import functools
import multiprocessing
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
from torch import Tensor

from microedit_trainer.language_model import LanguageModel
from microedit_trainer.solvers.targets import TargetSettings, solve_targets
from microedit_trainer.stored_residuals import StoredPrompt
from microedit_vllm.errors import MicroEditError

Batches = Sequence[Sequence[StoredPrompt]]
Targets = Generator[tuple[int, list[Tensor]], None, None]

_DIED = (
    "a worker died, as one does that runs out of memory; "
    "give the command again with fewer --workers: what was done is kept"
)


class Executor(Protocol):
    """One way to run the batches."""

    def targets(
        self, lm: LanguageModel, layer: int, settings: TargetSettings, batches: Batches
    ) -> Targets:
        """Place in `batches`, and targets as `solve_targets` gives them, of each batch once done.

        Closing the iterator ends whatever still runs.

        Raises:
            MicroEditError: workers cannot be had, cannot load the model, or died.
        """


class InProcess:
    """One batch after another, with the model that is loaded."""

    def targets(
        self, lm: LanguageModel, layer: int, settings: TargetSettings, batches: Batches
    ) -> Targets:
        for number, batch in enumerate(batches):
            yield number, solve_targets(lm, layer, batch, settings)


@dataclass(frozen=True)
class Processes:
    """Processes on this machine, each with the model and its share of the threads.

    Attributes:
        workers: how many.
    """

    workers: int

    def targets(
        self, lm: LanguageModel, layer: int, settings: TargetSettings, batches: Batches
    ) -> Targets:
        threads = max(1, torch.get_num_threads() // self.workers)
        task = _Task.of(lm, layer, settings, threads, str(lm.device))
        context = multiprocessing.get_context("spawn")
        theirs, ours = context.Pipe(duplex=False)
        pool = ProcessPoolExecutor(
            self.workers, mp_context=context, initializer=_end_with_parent, initargs=(theirs,)
        )

        def submit(packed: bytes) -> Future[bytes]:
            # A worker inherits the mask: Ctrl-C is for the parent, which then ends the workers.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                return pool.submit(_solve, task, packed)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

        try:
            yield from _in_flight(submit, batches, self.workers)
        except BrokenProcessPool as error:
            raise MicroEditError(_DIED) from error
        finally:
            ours.close()
            pool.shutdown(cancel_futures=True)
            theirs.close()


@dataclass(frozen=True)
class RayCluster:
    """Tasks of a Ray cluster, that of RAY_ADDRESS or else one on this machine.

    Every node needs this package, and the model under the same path or as a hub id. A task takes
    one CPU, and one GPU where the model here is on one.

    Attributes:
        workers: most batches at a time; None: as many as the cluster has room for.
    """

    workers: int | None = None

    def targets(
        self, lm: LanguageModel, layer: int, settings: TargetSettings, batches: Batches
    ) -> Targets:
        ray = _import_ray()
        begun = not ray.is_initialized()
        if begun:
            self._connect(ray)
        on_gpu = lm.device.type == "cuda"
        remote = ray.remote(num_cpus=1, num_gpus=int(on_gpu))(_solve)
        task = _Task.of(lm, layer, settings, threads=1, device=None)

        def submit(packed: bytes) -> Future[bytes]:
            return remote.remote(task, packed).future()

        try:
            room = _room(ray, "GPU" if on_gpu else "CPU")
            yield from _in_flight(submit, batches, self.workers or room)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise MicroEditError(_DIED) from error
        finally:
            if begun:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        quiet = {"log_to_driver": False, "logging_level": "error"}
        try:
            if address := os.environ.get("RAY_ADDRESS"):
                _check_reachable(address)
                ray.init(**quiet)
            else:
                cpus = self.workers or os.cpu_count()
                ray.init("local", num_cpus=cpus, include_dashboard=False, **quiet)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise MicroEditError(
                f"Ray does not start ({reason[0]}); check RAY_ADDRESS, or leave --ray out"
            ) from error


def _check_reachable(address: str) -> None:
    """Raises OSError where nobody answers: Ray itself would go on trying for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=10).close()


def _room(ray: Any, kind: str) -> int:
    """How many tasks the cluster can run at a time."""
    room = int(ray.cluster_resources().get(kind, 0))
    if room < 1:
        raise MicroEditError(f"the Ray cluster has no {kind}; leave --ray out, or add a node")
    return room


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MicroEditError(
            "--ray needs Ray, which is not installed: pip install 'microedit-vllm[ray]'"
        ) from error
    return ray


@dataclass(frozen=True)
class _Task:
    """What all batches of a run have in common, as a worker gets it."""

    model: str
    folder: str
    dtype: str
    device: str | None
    layer: int
    settings: TargetSettings
    threads: int

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        layer: int,
        settings: TargetSettings,
        threads: int,
        device: str | None,
    ) -> "_Task":
        dtype = str(lm.dtype).removeprefix("torch.")
        folder = str(lm.folder.absolute())
        return cls(lm.name, folder, dtype, device, layer, settings, threads)


def _solve(task: _Task, packed: bytes) -> bytes:
    """In a worker: the targets of one batch."""
    torch.set_num_threads(task.threads)
    lm = _load(task.model, task.folder, task.dtype, task.device)
    batch = [replace(p, z=p.z.to(lm.device)) for p in pickle.loads(packed)]
    found = solve_targets(lm, task.layer, batch, task.settings)
    return pickle.dumps([delta.cpu() for delta in found])


@functools.cache
def _load(model: str, folder: str, dtype: str, device: str | None) -> LanguageModel:
    """The model, once per worker; by its own name on a node that has no such folder."""
    return LanguageModel.load(folder if os.path.isdir(folder) else model, dtype, device)


def _in_flight(submit: Callable[[bytes], "Future[bytes]"], batches: Batches, limit: int) -> Targets:
    """Submit batches, no more than `limit` at a time, and give each one's targets once done."""
    left = iter(enumerate(batches))
    running: dict[Future[bytes], int] = {}
    while True:
        for number, batch in islice(left, limit - len(running)):
            running[submit(_pack(batch))] = number
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), pickle.loads(future.result())


def _pack(batch: Sequence[StoredPrompt]) -> bytes:
    """Bytes and not tensors: those torch hands to a process as open files, which are few."""
    return pickle.dumps([replace(p, z=p.z.cpu(), is_sink=p.is_sink.cpu()) for p in batch])


def _end_with_parent(parent: Connection) -> None:
    """In a worker: end at once, even within a batch, when the parent closes its end or dies."""

    def watch() -> None:
        try:
            parent.recv_bytes()
        except EOFError:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
