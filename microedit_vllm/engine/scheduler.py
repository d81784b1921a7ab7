"""The scheduler: vLLM's own, which keeps substituted tokens and the prefix cache apart.

`setup` names one of these classes in `SchedulerConfig.scheduler_cls`.
"""

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from microedit_vllm.config import ServingConfig
from microedit_vllm.engine.prefix_cache import EditPrefixCache
from microedit_vllm.engine.records import decisions_of

_PREEMPTIONS = "microedit_preemptions"


class _EditMixin:
    kv_cache_manager: KVCacheManager
    requests: dict[str, Any]
    vllm_config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        setting = ServingConfig.from_additional_config(self.vllm_config.additional_config)
        assert setting is not None, "setup names this scheduler only with a setting"
        self._edits = EditPrefixCache(self.kv_cache_manager, setting.load_manifest())

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """A step's output also tells how often its requests had been preempted by then."""
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        counts = {
            id_: self.requests[id_].num_preemptions
            for id_ in output.num_scheduled_tokens
            if self.requests[id_].num_preemptions
        }
        setattr(output, _PREEMPTIONS, counts)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take the decisions that came back with the step's output, then as ever."""
        before = getattr(scheduler_output, _PREEMPTIONS, {})
        for request_id, on in decisions_of(model_runner_output):
            request = self.requests.get(request_id)
            # A request that was preempted since then is computed, and decided, anew.
            if request is not None and request.num_preemptions == before.get(request_id, 0):
                self._edits.decided(request, on)
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]
        self._edits.decided(request, None)

    def _free_request_blocks(self, request: Any) -> None:
        self._edits.finished(request)
        super()._free_request_blocks(request)  # type: ignore[misc]


class EditScheduler(_EditMixin, Scheduler):
    """`Scheduler`, where asynchronous scheduling is off."""


class EditAsyncScheduler(_EditMixin, AsyncScheduler):
    """`AsyncScheduler`, vLLM's default."""
