"""Engines in the test's own process: a second to start, and open to be looked into."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

_started = False


@contextmanager
def in_this_process() -> Iterator[None]:
    """An engine that starts inside the block has its scheduler here, and a single worker too."""
    global _started
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # A tiny model gains nothing from a second thread, and engines that spin for one starve
        # what else runs on the machine.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
        # vLLM's CPU worker puts a function in its place that does nothing.
        patch.setattr(torch, "set_num_threads", set_num_threads)
        set_num_threads(1)
        # Seven full collections a start are most of its time in a large test process.
        patch.setattr(gc, "collect", lambda *args: 0)
        from vllm.platforms import current_platform

        if _started:
            # The overrides are in place, and vLLM's scan for them fails on modules that were
            # imported since (llvmlite's).
            name = "register_triton_kernel_overrides"
            patch.setattr(type(current_platform), name, classmethod(lambda cls: None))
        _started = True
        try:
            yield
        finally:
            set_num_threads(threads)


@contextmanager
def engine_here(model: Path, **arguments: Any) -> Iterator[Any]:
    """A `vllm.LLM` in this process."""
    with in_this_process():
        from vllm import LLM

        llm = LLM(str(model), **{"enforce_eager": True, "dtype": "float32", **arguments})
        try:
            if arguments.get("pipeline_parallel_size", 1) > 1:
                # The CPU engine makes a later stage's input buffers in a warm-up that it leaves
                # out in eager mode, and fails in its first step without them.
                llm.collective_rpc("execute_dummy_batch")
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
