"""What a step is made of, read from a model runner. One adapter per runner.

The rest of the engine sees `StepRequest`s only. An adapter wraps the runner's forward call, hands
each step's requests to `on_step` and runs the model; another runner (Model Runner V2,
`vllm/v1/worker/gpu/model_runner.py`) needs another class with the same two methods.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from vllm.v1.kv_cache_interface import FullAttentionSpec

from microedit_vllm.artifact import Decision
from microedit_vllm.engine.request_plan import plan_request
from microedit_vllm.engine.step_plan import Positions, RequestState, StepRequest
from microedit_vllm.errors import MicroEditError

_ATTRIBUTE = "microedit_state"


class RunnerAdapter(Protocol):
    """How the engine sees a model runner."""

    def num_slots(self) -> int:
        """KV slots of the group that state follows, once the KV cache is sized."""

    def attach(
        self,
        on_step: Callable[[list[StepRequest]], None],
        on_new_request: Callable[[RequestState], None],
    ) -> None:
        """Call `on_new_request` once per request and `on_step` before every real forward."""


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
        config = self._runner.kv_cache_config
        for group, candidate in enumerate(config.kv_cache_groups):
            spec = candidate.kv_cache_spec
            specs = getattr(spec, "kv_cache_specs", {"": spec}).values()
            if all(isinstance(each, FullAttentionSpec) for each in specs):
                self._group = group
                return config.num_blocks * spec.block_size
        raise MicroEditError(
            "the model has no layer with full attention, so the KV cache forgets the decision; "
            "such models are not supported"
        )

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
