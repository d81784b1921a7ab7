"""Engines in the test's own process: a second to start, and open to be looked into."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_started = False


@contextmanager
def engine_here(model: Path, **arguments: Any) -> Iterator[Any]:
    """A `vllm.LLM` whose scheduler, worker and model live in this process."""
    global _started
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM
        from vllm.platforms import current_platform

        if _started:
            # The overrides are in place, and vLLM's scan for them fails on modules that were
            # imported since (llvmlite's).
            name = "register_triton_kernel_overrides"
            patch.setattr(type(current_platform), name, classmethod(lambda cls: None))
        llm = LLM(str(model), **{"enforce_eager": True, "dtype": "float32", **arguments})
        _started = True
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
