"""An offline vLLM engine, plain or with edits, in a process of its own.

So that two can be alive in one benchmark, and the plain one has no plugin at all.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import psutil

from microedit_trainer.demo.server import ENVIRONMENT
from microedit_vllm.errors import MicroEditError

Kind = Literal["plain", "microedit"]
KINDS: tuple[Kind, Kind] = ("plain", "microedit")
PATIENCE = 20.0
LAST_LINES = 15


@dataclass(frozen=True)
class Output:
    """One answer.

    Attributes:
        tokens: what was generated.
        cached: tokens of the prompt that came from the prefix cache.
        decision: see `microedit_vllm.engine.decisions`; None on a plain engine.
    """

    tokens: tuple[int, ...]
    cached: int
    decision: dict[str, Any] | None


@dataclass(frozen=True)
class Batch:
    """Answers to prompts that were given at once, and the seconds from first to last."""

    outputs: list[Output]
    seconds: float


class OfflineEngine:
    """`vllm.LLM` as a context manager: loaded inside the block, gone behind it.

    Args:
        model: what to serve, a folder or a hub id.
        edits: `additional_config["microedit"]`; None for a plain engine without the plugin.
        log: file that takes the engine's output; overwritten.
        arguments: for `vllm.LLM`.
    """

    def __init__(
        self, model: str, edits: Mapping[str, Any] | None, log: Path, **arguments: Any
    ) -> None:
        if edits is not None:
            arguments["additional_config"] = {"microedit": dict(edits)}
        self._environment = {**ENVIRONMENT, **os.environ}
        if edits is None:
            self._environment["VLLM_PLUGINS"] = ""
        self._log = log
        context = multiprocessing.get_context("spawn")
        self._pipe, self._far_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(self._far_end, model, log, edits is not None, arguments)
        )

    def generate(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> Batch:
        """Greedy answers to prompts of token ids.

        Args:
            prompts: all of one batch.
            sampling: for `vllm.SamplingParams`, e.g. max_tokens.

        Raises:
            MicroEditError: the engine failed; carries the last lines of its log.
        """
        batch: Batch = self._ask(([list(prompt) for prompt in prompts], sampling))
        return batch

    def cpu_seconds(self) -> float:
        """CPU time that its processes have used so far."""
        root = psutil.Process(self._process.pid)
        times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
        return sum(time.user + time.system for time in times)

    def __enter__(self) -> "OfflineEngine":
        """Start the processes and load the model.

        Raises:
            MicroEditError: see `generate`.
        """
        self._log.touch()  # it may end before it writes
        with _environment(self._environment):
            self._process.start()
        self._far_end.close()
        try:
            self._ask(None)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(PATIENCE)
        if self._process.is_alive():
            family = psutil.Process(self._process.pid).children(recursive=True)
            for process in (self._process, *family):
                process.kill()
            self._process.join()

    def _ask(self, message: Any) -> Any:
        try:
            self._pipe.send(message)
            return self._pipe.recv()
        except (EOFError, OSError):
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
            end = "\n".join(lines[-LAST_LINES:])
            raise MicroEditError(f"an engine ended; the last lines of its log:\n{end}") from None


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """A child takes its parent's environment with it."""
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(
    pipe: Connection, model: str, log: Path, edited: bool, arguments: dict[str, Any]
) -> None:
    """The child: answer batches until the other end of the pipe is closed."""
    with log.open("wb") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    from vllm import LLM

    llm = LLM(model, **arguments)
    pipe.send(pipe.recv())  # tells that it is loaded
    while True:
        try:
            prompts, sampling = pipe.recv()
        except EOFError:
            break
        pipe.send(answer(llm, prompts, edited, **sampling))
    llm.llm_engine.engine_core.shutdown()


def answer(llm: Any, prompts: Sequence[list[int]], edited: bool, **sampling: Any) -> Batch:
    """One batch on a `vllm.LLM`; `edited` where it serves edits. See `OfflineEngine.generate`."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, **sampling)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    started = time.perf_counter()
    answers = llm.generate(inputs, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {}
    if edited:
        from microedit_vllm.engine import decisions

        found = decisions(llm, [a.request_id for a in answers])
    outputs = [
        Output(tuple(a.outputs[0].token_ids), a.num_cached_tokens, found.get(a.request_id))
        for a in answers
    ]
    return Batch(outputs, seconds)
