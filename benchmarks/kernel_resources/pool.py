"""Processes that hold one Triton each: kernels are listed and compiled there, in parallel.

A process can import one Triton only, so this module and what the command line imports leave it
alone; the functions that run in the pool import it.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from benchmarks.kernel_resources.results import Launch, Outcome
from microedit_vllm.errors import MicroEditError


@dataclass(frozen=True)
class Toolchain:
    """A Triton: its version, and the folder to import it from (None: where Python finds it)."""

    version: str
    folder: Path | None = None


def installed_triton() -> Toolchain:
    """The one that this Python has.

    Raises:
        MicroEditError: it has none.
    """
    return Toolchain(_version(None))


def triton_in(folder: Path) -> Toolchain:
    """One that `pip install --target` put into a folder.

    Raises:
        MicroEditError: none is there.
    """
    return Toolchain(_version(folder), folder.absolute())


def _version(folder: Path | None) -> str:
    path = sys.path if folder is None else [str(folder)]
    found = next(iter(distributions(name="triton", path=path)), None)
    if found is None:
        place = "installed" if folder is None else f"in {folder}: run make kernels-aot"
        raise MicroEditError(f"no Triton is {place}")
    return found.version


def _prepare(folder: Path | None, cache: str) -> None:
    # With it, kernels would be imported for the interpreter.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache
    if folder:
        sys.path.insert(0, str(folder))


@contextmanager
def _pool(toolchain: Toolchain) -> Iterator[ProcessPoolExecutor]:
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(
            len(os.sched_getaffinity(0)),
            multiprocessing.get_context("spawn"),
            _prepare,
            (toolchain.folder, cache),
        ) as pool,
    ):
        try:
            yield pool
        except BrokenProcessPool:
            pool.shutdown(cancel_futures=True)
            raise MicroEditError(
                f"Triton {toolchain.version} took its process down, or memory ran out"
            ) from None


def _list(targets: Sequence[str]) -> tuple[list[tuple[str, Launch]], list[str]]:
    from benchmarks.kernel_resources.cases import cases
    from benchmarks.kernel_resources.recording import launches_for, without_case

    listed = [
        (target, launch) for target in targets for launch in launches_for(target, cases(target))
    ]
    return listed, without_case(launch for _, launch in listed)


def _compile(launch: Launch, target: str) -> Outcome:
    from benchmarks.kernel_resources.compiling import compile_launch

    return compile_launch(launch, target)


def compile_all(
    toolchain: Toolchain, targets: Sequence[str], progress: Callable[[int, int], object]
) -> tuple[list[Outcome], list[str]]:
    """Every case for every target by one Triton.

    Args:
        progress: is called with how many are compiled and how many there are.

    Returns:
        what came of them, in order of target and kernel, and the kernels that have no case.

    Raises:
        MicroEditError: the compiler crashed.
    """
    with _pool(toolchain) as pool:
        listed, missing = pool.submit(_list, targets).result()
        # The encodes take longest and come last in the list.
        futures = [pool.submit(_compile, launch, target) for target, launch in reversed(listed)]
        for done, _ in enumerate(as_completed(futures), 1):
            progress(done, len(futures))
        return [future.result() for future in reversed(futures)], missing
