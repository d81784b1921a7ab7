"""The worker: vLLM's own, which also loads the edit set and patches the layer.

`setup` names one of these classes in `ParallelConfig.worker_cls`, vLLM's way to choose a worker,
so that the worker processes need no patching.
"""

from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import get_pp_group
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    AsyncModelRunnerOutput,
    ModelRunnerOutput,
)

from microedit_kernels.dispatch import uses_triton
from microedit_vllm.artifact import EditOperator
from microedit_vllm.config import ServingConfig, summary
from microedit_vllm.engine.edit_state import EditState
from microedit_vllm.engine.layer_patch import patch_layer, register_state
from microedit_vllm.engine.parallel import load_operator
from microedit_vllm.engine.records import attach_decisions, external_id
from microedit_vllm.engine.runner_v1 import V1RunnerAdapter
from microedit_vllm.engine.runner_v2 import V2RunnerAdapter
from microedit_vllm.engine.step_metadata import RequestState, RunnerAdapter, Step
from microedit_vllm.engine.step_plan import plan_step, scores_or_decides
from microedit_vllm.engine.triton_edit import TritonEdit
from microedit_vllm.errors import MicroEditError

_RESULTS = ModelRunnerOutput | AsyncModelRunnerOutput
BASES = {
    "EditCPUWorker": "vllm.v1.worker.cpu_worker.CPUWorker",
    "EditGPUWorker": "vllm.v1.worker.gpu_worker.Worker",
}


def edit_worker_name(worker_cls: str) -> str:
    """The qualified name of the class below that stands for vLLM's `worker_cls`.

    Raises:
        MicroEditError: a worker that edits are not made for.
    """
    for name, base in BASES.items():
        if worker_cls == base:
            return f"{__name__}.{name}"
    raise MicroEditError(f"edits cannot be served by the worker {worker_cls}")


class EditWorker:
    """Mixin before a vLLM worker (`vllm/v1/worker/gpu_worker.py`)."""

    vllm_config: Any
    model_runner: Any
    _edit_how: EditOperator | TritonEdit
    _edit_state: EditState | None = None

    def load_model(self, **kwargs: Any) -> None:
        """Load the model, then patch the layer, and where that is held, load the edit set and SAE.

        Raises:
            MicroEditError: see `load_operator` and `patch_layer`.
        """
        super().load_model(**kwargs)  # type: ignore[misc]
        setting = ServingConfig.from_additional_config(self.vllm_config.additional_config)
        assert setting is not None, "setup names this worker only with a setting"
        self._edit_setting, self._edit_manifest = setting, setting.load_manifest()
        manifest = self._edit_manifest
        self._edit_here = patch_layer(
            self.model_runner.get_model(), manifest.layer, manifest.model.num_layers
        )
        if self._edit_here:
            operator = load_operator(setting, self.model_runner.device)
            # A share of the latents is summed over the ranks between two kernels of torch.
            kernels = uses_triton(operator.device) and type(operator) is EditOperator
            self._edit_how = (
                TritonEdit(operator, *self._edit_largest_step()) if kernels else operator
            )

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Size the KV cache, then the state beside it, before any graph is captured.

        Every rank follows the steps, also one without the layer: what they do without a graph they
        do together.
        """
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]
        adapter = self._edit_runner_adapter()
        slots = adapter.num_slots()
        if self._edit_here:
            self._edit_state = self._edit_make_state(slots)
            register_state(self.vllm_config, self._edit_state)
        adapter.attach(self._edit_step, self._edit_new_request)

    def _edit_runner_adapter(self) -> RunnerAdapter:
        if self.vllm_config.use_v2_model_runner:
            return V2RunnerAdapter(self.model_runner, self._edit_manifest)
        return V1RunnerAdapter(self.model_runner, self._edit_manifest)

    def _edit_largest_step(self) -> tuple[int, torch.dtype]:
        """Its rows, and the dtype of the residual stream."""
        config = self.vllm_config
        return config.scheduler_config.max_num_batched_tokens, config.model_config.dtype

    def _edit_make_state(self, slots: int) -> EditState:
        config = self.vllm_config
        in_step = config.parallel_config.tensor_parallel_size > 1
        state = EditState(self._edit_how, slots, in_step)
        compilation = config.compilation_config
        if compilation.cudagraph_mode != CUDAGraphMode.NONE:
            state.prepare_capture(
                compilation.max_cudagraph_capture_size, *self._edit_largest_step()
            )
        return state

    def _edit_step(self, step: Step) -> bool:
        state = self._edit_state
        if state is not None:
            state.feedback.poll()
            state.begin_step(plan_step(step, state.device))
        return scores_or_decides(step)

    def _edit_new_request(self, request: RequestState) -> None:
        if request.plan is None and self._edit_state is not None:
            self._edit_state.records.write_off(external_id(request.request_id))

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """As ever; the output carries the decisions that have become known."""
        try:
            output = super().execute_model(*args, **kwargs)  # type: ignore[misc]
        finally:
            # What runs between two steps (dummy batches, drafts) has no plan.
            if self._edit_state is not None:
                self._edit_state.end_step()
        return self._edit_report(output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """See `execute_model`: one of the two returns the step's output."""
        return self._edit_report(super().sample_tokens(*args, **kwargs))  # type: ignore[misc]

    def _edit_report(self, output: Any) -> Any:
        if self._edit_state is None:
            return output
        feedback = self._edit_state.feedback
        if not get_pp_group().is_last_rank:
            # The scheduler hears one rank of the last stage: it does not hear these decisions, and
            # stores no answers.
            feedback.drain()
        elif isinstance(output, _RESULTS) and output is not EMPTY_MODEL_RUNNER_OUTPUT:
            known = feedback.drain()
            if known:
                attach_decisions(output, known)
        return output

    def microedit_decisions(self, request_ids: list[str]) -> dict[str, Any] | None:
        """For `collective_rpc`: {id: {"edit_set", "ard", "tau", "on"}} of the ids that are known.

        None on a rank that does not hold the edited layer.
        """
        if self._edit_state is None:
            return None
        of_set = {
            "edit_set": self._edit_setting.edit_set.name,
            "tau": self._edit_manifest.decision.tau,
        }
        found = {id_: self._edit_state.records.read(id_) for id_ in request_ids}
        return {id_: {**of_set, **record} for id_, record in found.items() if record}

    def microedit_summary(self) -> dict[str, Any]:
        """For `collective_rpc`: the loaded set, see `microedit_vllm.config.summary`."""
        return summary(self._edit_manifest, self._edit_setting.edit_set)


def __getattr__(name: str) -> type:
    """Make a class of `BASES` on first use: each base imports on its own platform only."""
    if name not in BASES:
        raise AttributeError(name)
    worker = type(name, (EditWorker, resolve_obj_by_qualname(BASES[name])), {})
    worker.__module__ = __name__
    globals()[name] = worker
    return worker
