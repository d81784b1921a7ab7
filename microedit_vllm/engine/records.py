"""Decisions outside the worker: with each step's output, and for those who ask."""

import re
from collections.abc import Iterable
from typing import Any

_DECISIONS = "microedit_decisions"
_INTERNAL = re.compile(r"(?:\d+_)?(?P<external>.+)-[0-9a-f]{8}")


def external_id(internal: str) -> str:
    """The id that the caller knows, from vLLM's own.

    vLLM appends a random tail (`InputProcessor.assign_request_id`) and puts a number before each
    of n samples (`ParentRequest.get_child_info`), whose decision is the same.
    """
    match = _INTERNAL.fullmatch(internal)
    return match["external"] if match else internal


def attach_decisions(output: Any, known: list[tuple[str, bool]]) -> None:
    """Let a step's output carry (vLLM's id, on) pairs from the worker to the scheduler.

    Args:
        output: a `ModelRunnerOutput`, or the asynchronous one that will yield it
            (`vllm/v1/worker/gpu_model_runner.py`, `vllm/v1/worker/gpu/async_utils.py`).
    """
    for name in ("_model_runner_output", "model_runner_output"):
        output = getattr(output, name, output)
    setattr(output, _DECISIONS, known)


def decisions_of(output: Any) -> list[tuple[str, bool]]:
    """What `attach_decisions` attached."""
    return getattr(output, _DECISIONS, [])


def first_known(answers: Iterable[dict[str, Any] | None]) -> dict[str, Any]:
    """One worker's answer to `microedit_decisions`: that of a rank that holds the layer."""
    return next((answer for answer in answers if answer), {})


def decisions(llm: Any, request_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What the switch decided for finished or running requests of a `vllm.LLM`.

    Args:
        llm: started with an edit set.
        request_ids: `RequestOutput.request_id`.

    Returns:
        By request id {"edit_set": its name, "ard": float, or None where nothing was scored,
        "tau": float, "on": bool}; the last few thousand requests are known, others are left out.
    """
    answers = llm.collective_rpc("microedit_decisions", args=(list(request_ids),))
    return first_known(answers)
