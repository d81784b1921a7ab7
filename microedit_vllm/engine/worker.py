"""The worker: vLLM's own, which also loads the edit set and patches the layer.

`setup` names one of these classes in `ParallelConfig.worker_cls`, vLLM's way to choose a worker,
so that the worker processes need no patching.
"""

from typing import Any

from vllm.utils.import_utils import resolve_obj_by_qualname

from microedit_vllm.artifact import EditOperator
from microedit_vllm.config import ServingConfig, summary
from microedit_vllm.engine.edit_state import EditState
from microedit_vllm.engine.layer_patch import patch_layer, set_current_step
from microedit_vllm.engine.records import external_id
from microedit_vllm.engine.runner_v1 import V1RunnerAdapter
from microedit_vllm.engine.step_plan import RequestState, StepRequest, plan_step
from microedit_vllm.errors import MicroEditError

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
    _edit_operator: EditOperator
    _edit_adapter: V1RunnerAdapter
    _edit_state: EditState | None = None

    def load_model(self, **kwargs: Any) -> None:
        """Load the model, then the edit set and its SAE, and patch the layer.

        Raises:
            MicroEditError: see `ServingConfig.load` and `patch_layer`.
        """
        super().load_model(**kwargs)  # type: ignore[misc]
        setting = ServingConfig.from_additional_config(self.vllm_config.additional_config)
        assert setting is not None, "setup names this worker only with a setting"
        self._edit_setting = setting
        self._edit_operator = setting.load(self.model_runner.device)
        manifest = self._edit_operator.edit_set.manifest
        self._edit_adapter = V1RunnerAdapter(self.model_runner, manifest.decision)
        self._edit_here = patch_layer(
            self.model_runner.get_model(), manifest.layer, manifest.model.num_layers
        )

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Size the KV cache, then the state beside it."""
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]
        if self._edit_here:
            self._edit_state = EditState(self._edit_operator, self._edit_adapter.num_slots())
            self._edit_adapter.attach(self._edit_step, self._edit_new_request)

    def _edit_step(self, requests: list[StepRequest]) -> None:
        state = self._edit_state
        assert state is not None
        plan = plan_step(requests, self.model_runner.device)
        if plan is not None:
            set_current_step(state, plan)

    def _edit_new_request(self, request: RequestState) -> None:
        assert self._edit_state is not None
        # The id that the client knows; vLLM's own has a random tail.
        request.request_id = external_id(request.request_id)
        if request.plan is None:
            self._edit_state.records.write_off(request.request_id)

    def microedit_decisions(self, request_ids: list[str]) -> dict[str, Any] | None:
        """For `collective_rpc`: {id: {"ard", "tau", "on"}} of the known ones among the ids.

        None on a rank that does not hold the edited layer.
        """
        if self._edit_state is None:
            return None
        tau = self._edit_operator.edit_set.manifest.decision.tau
        found = {id_: self._edit_state.records.read(id_) for id_ in request_ids}
        return {id_: {**record, "tau": tau} for id_, record in found.items() if record}

    def microedit_summary(self) -> dict[str, Any]:
        """For `collective_rpc`: the loaded set, see `microedit_vllm.config.summary`."""
        return summary(self._edit_operator.edit_set.manifest, self._edit_setting.edit_set)


def __getattr__(name: str) -> type:
    """Make a class of `BASES` on first use: each base imports on its own platform only."""
    if name not in BASES:
        raise AttributeError(name)
    worker = type(name, (EditWorker, resolve_obj_by_qualname(BASES[name])), {})
    worker.__module__ = __name__
    globals()[name] = worker
    return worker
