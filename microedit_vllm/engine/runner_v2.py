"""The adapter for Model Runner V2 (`vllm/v1/worker/gpu/model_runner.py`), which GPUs run.

`execute_model` drops finished and preempted requests, adds new and resumed ones, writes the block
tables, reads the batch's order on the host (`gather_batch_req_state`), chooses a CUDA graph, and
only then prepares the inputs. The adapter speaks up behind `gather_batch_req_state`: all that a
step needs is final there, the graph is not chosen yet, and nothing waits for the device.

Positions come from `RequestState.num_computed_tokens_np`, the scheduler's count. vLLM calls it an
upper bound of the device's, because under asynchronous scheduling the count runs ahead of rejected
draft tokens. Drafts follow the first sampled token, so up to the end of the prompt the two are
equal; and rejections never take back a token of the prompt, so later both are beyond e. A request
that was preempted comes back as a new one, with a new count, and its prompt without what was
generated.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from microedit_vllm.artifact import Manifest
from microedit_vllm.engine.kv_group import followed_group
from microedit_vllm.engine.request_plan import plan_request
from microedit_vllm.engine.step_metadata import RequestState, Step, StepRequest
from microedit_vllm.errors import MicroEditError

# Requests that vLLM makes up to warm kernels (`vllm/v1/worker/gpu/warmup.py`) take the way of real
# ones. Real ids end in a dash and a random tail (`InputProcessor.assign_request_id`).
_WARM_UP_ID = re.compile(r"_(\w+_)?warmup_\w*")


class V2RunnerAdapter:
    """`GPUModelRunner` of Model Runner V2 and its CPU form (`vllm/v1/worker/cpu/model_runner.py`).

    With pipeline parallelism every rank must attach, also one without the edited layer: ranks
    that pad a step differently cannot hand it on, so all must give up the graph together.
    """

    def __init__(self, runner: Any, manifest: Manifest) -> None:
        self._runner = runner
        self._manifest = manifest
        self._group = 0
        self._states: dict[str, RequestState] = {}
        self._no_graph = False

    def num_slots(self) -> int:
        """See `RunnerAdapter.num_slots`."""
        self._group, num_slots = followed_group(self._runner.kv_cache_config)
        return num_slots

    def attach(
        self,
        on_step: Callable[[Step], bool],
        on_new_request: Callable[[RequestState], None],
    ) -> None:
        """See `RunnerAdapter.attach`; once per runner, behind `num_slots`.

        Raises:
            MicroEditError: a feature of vLLM is on that lays a step's rows out in another way.
        """
        runner = self._runner
        self._refuse_unsupported()
        finish, add = runner.finish_requests, runner.add_requests
        gather = runner.gather_batch_req_state

        def finish_requests(scheduler_output: Any) -> None:
            finish(scheduler_output)
            # Not the preempted ones: vLLM drops its record of them, but they come back.
            for request_id in scheduler_output.finished_req_ids:
                self._states.pop(request_id, None)

        def add_requests(scheduler_output: Any) -> None:
            add(scheduler_output)
            for data in scheduler_output.scheduled_new_reqs:
                self._add(data, on_new_request)

        def gather_batch_req_state(scheduler_output: Any, dummy_run: bool) -> Any:
            batch, uniform_tokens = gather(scheduler_output, dummy_run)
            self._no_graph = batch is not None and on_step(self._step(batch))
            return batch, uniform_tokens

        runner.finish_requests = finish_requests
        runner.add_requests = add_requests
        runner.gather_batch_req_state = gather_batch_req_state
        self._guard_dispatch(runner.cudagraph_manager)

    def _refuse_unsupported(self) -> None:
        runner = self._runner
        reasons = {
            # The device deals out the drafts, so the host does not know a request's rows.
            "adaptive verification of drafts": runner.adaptive_verification is not None,
            "prefill context parallelism": runner.pcp_manager is not None,
            "decode context parallelism": runner.dcp_size > 1,
            "microbatches (--enable-dbo)": runner.ubatch_runner is not None,
            "--kv-sharing-fast-prefill": runner.fast_prefill is not None,
            "diffusion models": runner.model_state.num_new_sampled_tokens_per_step != 1,
        }
        for reason, is_on in reasons.items():
            if is_on:
                raise MicroEditError(f"edits do not work together with {reason} yet")

    def _add(self, data: Any, on_new_request: Callable[[RequestState], None]) -> None:
        """Keep our record of a `NewRequestData`: a new request, or one that was preempted."""
        if _WARM_UP_ID.fullmatch(data.req_id):
            return
        plan = None
        if data.sampling_params is not None:
            # prefill_token_ids would hold what was generated before a preemption.
            plan = plan_request(
                data.prompt_token_ids, data.sampling_params.extra_args, self._manifest
            )
        known = self._states.get(data.req_id)
        # A request that streams its input comes again with a longer prompt, and is decided anew.
        if known is None or known.plan != plan:
            state = RequestState(data.req_id, plan)
            self._states[data.req_id] = state
            on_new_request(state)

    def _step(self, batch: Any) -> Step:
        """A step from `BatchReqState`: numbers in the order of the batch's rows."""
        states, tables = self._runner.req_states, self._runner.block_tables
        num_rows = batch.num_scheduled_tokens
        first_rows = np.cumsum(num_rows) - num_rows
        first_positions = states.num_computed_tokens_np[batch.idx_mapping_np]
        requests = []
        for place, request_id in enumerate(batch.req_ids):
            state = self._states.get(request_id)
            if state is None or state.plan is None:
                continue
            requests.append(
                StepRequest(
                    state=state,
                    index=int(batch.idx_mapping_np[place]),
                    first_row=int(first_rows[place]),
                    num_rows=int(num_rows[place]),
                    first_position=int(first_positions[place]),
                )
            )
        # The tables of all requests, a row per `RequestState` index: this step's part of them is
        # gathered only after the graph is chosen.
        return Step(requests, tables.block_tables[self._group].gpu, tables.block_sizes[self._group])

    def _guard_dispatch(self, manager: Any) -> None:
        """Hide CUDA graphs from `CudaGraphManager.dispatch` in steps that must not run in one.

        With data parallelism no other rank uses one then (`sync_cudagraph_and_dp_padding`).
        """
        dispatch, every = manager.dispatch, manager._candidates

        def guarded_dispatch(*args: Any, **kwargs: Any) -> Any:
            if not self._no_graph:
                return dispatch(*args, **kwargs)
            manager._candidates = {}
            try:
                return dispatch(*args, **kwargs)
            finally:
                manager._candidates = every

        manager.dispatch = guarded_dispatch
