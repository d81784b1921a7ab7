"""The adapter for the V1 model runner, which CPUs run, and GPUs on request.

`vllm/v1/worker/gpu_model_runner.py`, `vllm/v1/worker/cpu_model_runner.py`. `_prepare_inputs` is
called for real steps only; behind it the order of the requests, their rows and the block tables are
final, and the CUDA graph is chosen next, by `_determine_batch_execution_and_padding`.
"""

from collections.abc import Callable
from typing import Any

from vllm.config.compilation import CUDAGraphMode

from microedit_vllm.artifact import Manifest
from microedit_vllm.engine.kv_group import followed_group
from microedit_vllm.engine.request_plan import plan_request
from microedit_vllm.engine.step_metadata import RequestState, Step, StepRequest

_ATTRIBUTE = "microedit_state"


class V1RunnerAdapter:
    """Reads `input_batch` and `query_start_loc`, host numbers that vLLM has made anyhow."""

    def __init__(self, runner: Any, manifest: Manifest) -> None:
        self._runner = runner
        self._manifest = manifest
        self._group = 0
        self._no_graph = False

    def num_slots(self) -> int:
        """See `RunnerAdapter.num_slots`."""
        self._group, slots = followed_group(self._runner.kv_cache_config)
        return slots

    def attach(
        self,
        on_step: Callable[[Step], bool],
        on_new_request: Callable[[RequestState], None],
    ) -> None:
        """See `RunnerAdapter.attach`; once per runner, behind `num_slots`."""
        runner = self._runner
        prepare_inputs = runner._prepare_inputs
        choose_graph = runner._determine_batch_execution_and_padding
        self._on_new_request = on_new_request

        def prepare(*args: Any, **kwargs: Any) -> Any:
            inputs = prepare_inputs(*args, **kwargs)
            self._no_graph = on_step(self._step())
            return inputs

        def choose(*args: Any, **kwargs: Any) -> Any:
            mode, *rest = choose_graph(*args, **kwargs)
            if self._no_graph:
                # The padding stays, so that rows which are off are computed as ever.
                mode, self._no_graph = CUDAGraphMode.NONE, False
            return mode, *rest

        runner._prepare_inputs = prepare
        runner._determine_batch_execution_and_padding = choose

    def _step(self) -> Step:
        batch = self._runner.input_batch
        first_rows = self._runner.query_start_loc.np[: batch.num_reqs + 1].tolist()
        computed = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
        requests = []
        for index, request_id in enumerate(batch.req_ids):
            state = self._state(request_id)
            # A request that is known to be off needs nothing more.
            if state.plan is None or (state.on is False and computed[index] > state.plan.edit_from):
                continue
            rows = first_rows[index + 1] - first_rows[index]
            requests.append(StepRequest(state, index, first_rows[index], rows, computed[index]))
        table = batch.block_table[self._group]
        return Step(requests, table.block_table.gpu, table.block_size)

    def _state(self, request_id: str) -> RequestState:
        """Our state of a request, kept on vLLM's own record so that both end together."""
        cached = self._runner.requests[request_id]
        length = len(cached.prompt_token_ids or ())
        known, state = getattr(cached, _ATTRIBUTE, (None, None))
        # A request that streams its input keeps its record and gets a longer prompt.
        if state is None or known != length:
            state = RequestState(request_id, None)
            params = cached.sampling_params
            if params is not None:
                state.plan = plan_request(
                    cached.prompt_token_ids, params.extra_args, self._manifest
                )
            setattr(cached, _ATTRIBUTE, (length, state))
            self._on_new_request(state)
        return state
