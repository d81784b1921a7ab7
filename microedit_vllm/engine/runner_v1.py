"""The V1 model runner (`vllm/v1/worker/gpu_model_runner.py`, `cpu_model_runner.py`)."""

from collections.abc import Callable
from typing import Any

from vllm.config import CUDAGraphMode

from microedit_vllm.artifact import Manifest
from microedit_vllm.engine.request_plan import plan_request
from microedit_vllm.engine.step_metadata import RequestState, Step, StepRequest, followed_group

_ATTRIBUTE = "microedit_state"


class V1RunnerAdapter:
    """Reads `input_batch` and `query_start_loc`, host numbers that vLLM has made anyhow."""

    def __init__(self, runner: Any, manifest: Manifest) -> None:
        self._runner = runner
        self._manifest = manifest
        self._group = 0
        self._avoid_full_graph = False

    def num_slots(self) -> int:
        """See `RunnerAdapter`."""
        self._group, slots = followed_group(self._runner.kv_cache_config)
        return slots

    def attach(
        self,
        on_step: Callable[[Step], bool],
        after_step: Callable[[], None],
        on_new_request: Callable[[RequestState], None],
    ) -> None:
        """Wrap `_prepare_inputs` and `_model_forward`, which real steps alone go through, and
        `CudagraphDispatcher.dispatch`, which lies between the two."""
        runner = self._runner
        prepare_inputs, forward = runner._prepare_inputs, runner._model_forward
        dispatch = runner.cudagraph_dispatcher.dispatch
        self._on_new_request = on_new_request

        def prepare(*args: Any, **kwargs: Any) -> Any:
            inputs = prepare_inputs(*args, **kwargs)
            self._avoid_full_graph = on_step(self._step())
            return inputs

        def choose_graph(*args: Any, **kwargs: Any) -> Any:
            if self._avoid_full_graph:
                excluded = kwargs.get("invalid_modes") or set()
                kwargs["invalid_modes"] = excluded | {CUDAGraphMode.FULL}
            return dispatch(*args, **kwargs)

        def model_forward(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            finally:
                self._avoid_full_graph = False
                after_step()

        runner._prepare_inputs = prepare
        runner.cudagraph_dispatcher.dispatch = choose_graph
        runner._model_forward = model_forward

    def _step(self) -> Step:
        batch = self._runner.input_batch
        first_rows = self._runner.query_start_loc.np[: batch.num_reqs + 1].tolist()
        computed = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
        requests = []
        for index, request_id in enumerate(batch.req_ids):
            state = self._state(request_id)
            plan = state.plan
            # A request that is known to be off needs nothing more.
            if plan is None or (state.on is False and computed[index] > plan.edit_from):
                continue
            rows = first_rows[index + 1] - first_rows[index]
            requests.append(StepRequest(state, index, first_rows[index], rows, computed[index]))
        table = batch.block_table[self._group]
        return Step(requests, table.block_table.gpu, table.block_size)

    def _state(self, request_id: str) -> RequestState:
        """Our state of a request, kept on vLLM's own record so that both end together."""
        cached = self._runner.requests[request_id]
        state = getattr(cached, _ATTRIBUTE, None)
        if state is None:
            state = RequestState(request_id, None)
            params = cached.sampling_params
            if params is not None:
                state.plan = plan_request(
                    cached.prompt_token_ids, params.extra_args, self._manifest
                )
            setattr(cached, _ATTRIBUTE, state)
            self._on_new_request(state)
        return state
