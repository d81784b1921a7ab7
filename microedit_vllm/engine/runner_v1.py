"""The adapter for vLLM's V1 model runner, which CPUs run."""

from collections.abc import Callable
from typing import Any

import numpy as np
from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.config.compilation import CUDAGraphMode

from microedit_vllm.artifact import Decision
from microedit_vllm.engine.kv_group import followed_group
from microedit_vllm.engine.request_plan import plan_request
from microedit_vllm.engine.step_plan import Positions, RequestState, StepRequest

_ATTRIBUTE = "microedit_state"


class V1RunnerAdapter:
    """`GPUModelRunner` and `CPUModelRunner` (`vllm/v1/worker/gpu_model_runner.py`).

    Reads `input_batch` (order of the requests, computed tokens, block tables), `query_start_loc`
    and `requests` just before the forward, when the step's inputs are final. All of them are host
    numbers that vLLM has made anyhow.
    """

    def __init__(self, runner: Any, decision: Decision) -> None:
        self._runner = runner
        self._decision = decision
        self._group = 0

    def num_slots(self) -> int:
        """KV slots of the first group with full attention.

        Raises:
            MicroEditError: there is none: the state of old tokens would be freed with their KV.
        """
        self._group, num_slots = followed_group(self._runner.kv_cache_config)
        return num_slots

    def attach(
        self,
        on_step: Callable[[list[StepRequest]], None],
        on_new_request: Callable[[RequestState], None],
    ) -> None:
        """Wrap `_model_forward`, which runs real steps only, not profiling or warm-up ones."""
        forward = self._runner._model_forward
        self._on_new_request = on_new_request

        def model_forward(*args: Any, **kwargs: Any) -> Any:
            on_step(self._requests())
            return forward(*args, **kwargs)

        self._runner._model_forward = model_forward

    def _requests(self) -> list[StepRequest]:
        batch = self._runner.input_batch
        first_rows = self._runner.query_start_loc.np
        table = batch.block_table[self._group]
        size = table.block_size
        requests = []
        for index, request_id in enumerate(batch.req_ids):
            state = self._state(request_id)
            if state.plan is None:
                continue
            row = table.block_table.np[index]

            def slots(positions: Positions, row: Any = row) -> Positions:
                return row[positions // size].astype(np.int64) * size + positions % size

            requests.append(
                StepRequest(
                    state=state,
                    first_row=int(first_rows[index]),
                    num_rows=int(first_rows[index + 1] - first_rows[index]),
                    first_position=int(batch.num_computed_tokens_cpu[index]),
                    slots=slots,
                )
            )
        return requests

    def _state(self, request_id: str) -> RequestState:
        """Our state of a request, kept on vLLM's own record so that both end together."""
        cached = self._runner.requests[request_id]
        state = getattr(cached, _ATTRIBUTE, None)
        if state is None:
            params = cached.sampling_params
            state = RequestState(request_id, None)
            if params is not None:
                state.plan = plan_request(
                    cached.prompt_token_ids, params.extra_args, self._decision
                )
            setattr(cached, _ATTRIBUTE, state)
            self._on_new_request(state)
        return state


def guard_dispatch(dispatcher: Any, no_full_graph: Callable[[], bool]) -> None:
    """Keep steps out of FULL CUDA graphs while `no_full_graph()`.

    `GPUModelRunner._determine_batch_execution_and_padding` asks the dispatcher, behind
    `_prepare_inputs` (real steps only), where the step's order, rows and block tables are final.
    With data parallelism it asks again with the mode that the ranks agreed on, the least of
    theirs, so that a refusal here holds for all.

    Args:
        dispatcher: `CudagraphDispatcher` (`vllm/v1/cudagraph_dispatcher.py`) of the runner.
    """
    dispatch = dispatcher.dispatch
    refused = {CUDAGraphMode.FULL}
    if is_breakable_cudagraph_enabled():
        # Those graphs are cut at vLLM's own operators, not at ours.
        refused.add(CUDAGraphMode.PIECEWISE)

    def guarded_dispatch(*args: Any, **kwargs: Any) -> Any:
        if no_full_graph():
            kwargs["invalid_modes"] = {*(kwargs.get("invalid_modes") or ()), *refused}
        return dispatch(*args, **kwargs)

    dispatcher.dispatch = guarded_dispatch
