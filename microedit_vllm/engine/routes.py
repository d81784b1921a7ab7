"""`GET /v1/microedit` and `GET /v1/microedit/requests/{id}` on vLLM's API server.

Under `/v1`, because that is what vLLM's API key guards.
"""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from microedit_vllm.engine.records import first_known

router = APIRouter(prefix="/v1/microedit")


@router.get("")
async def show_edit_set(request: Request) -> JSONResponse:
    """The loaded set: name, facts, layer, k, decision, tau, scope."""
    return JSONResponse(await _summary(request))


@router.get("/requests/{request_id:path}")
async def show_decision(request: Request, request_id: str) -> JSONResponse:
    """What the switch decided for a completion, by the id that the client got.

    A completion of several prompts has one decision each, under the ids `{id}-0`, `{id}-1`, …;
    the bare id means the first.
    """
    ids = [request_id, f"{request_id}-0"]
    found = first_known(await _call(request, "microedit_decisions", (ids,)))
    if not found:
        return _not_found(f"no decision is known for request {request_id!r}")
    return JSONResponse({"id": request_id, **next(iter(found.values()))})


async def _summary(request: Request) -> dict[str, Any]:
    state = request.app.state
    if not hasattr(state, "microedit_summary"):
        state.microedit_summary = (await _call(request, "microedit_summary", ()))[0]
    return state.microedit_summary


async def _call(request: Request, method: str, args: tuple[Any, ...]) -> list[Any]:
    """The answers of all workers of all data-parallel engines.

    `AsyncLLM.collective_rpc` returns the first engine's alone (`vllm/v1/engine/core_client.py`).
    """
    core = request.app.state.engine_client.engine_core
    engines = await core.call_utility_all_async("collective_rpc", method, None, args, None)
    return [answer for workers in engines for answer in workers]


def _not_found(message: str) -> JSONResponse:
    """An error in the shape of vLLM's own."""
    error = {"message": message, "type": "NotFoundError", "param": None, "code": 404}
    return JSONResponse({"error": error}, status_code=404)
