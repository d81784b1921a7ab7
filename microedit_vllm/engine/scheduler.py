"""The scheduler: vLLM's own, which keeps edited requests and the prefix cache apart.

Cached KV can only come before the tokens whose residuals decide, so that these are computed; and
blocks from token e on, which may hold substituted tokens, are never stored. Requests with edits
off use the cache as ever. `setup` names one of these classes in `SchedulerConfig.scheduler_cls`.
"""

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from microedit_vllm.artifact import Decision
from microedit_vllm.config import ServingConfig
from microedit_vllm.engine.request_plan import RequestPlan, plan_request

_ATTRIBUTE = "microedit_plan"


class _ShorterRequest:
    """A request as a prefix lookup sees it, cut so that no hit reaches beyond `limit` tokens."""

    def __init__(self, request: Any, limit: int) -> None:
        self._request = request
        # The lookup leaves the last token to be computed (`KVCacheManager.get_computed_blocks`).
        self.num_tokens = min(request.num_tokens, limit + 1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def keep_apart(manager: KVCacheManager, decision: Decision) -> None:
    """Make a KV cache manager obey the two rules above."""
    lookup = manager.get_computed_blocks
    lookup_for_connector = manager.get_computed_blocks_for_connector
    store = manager.coordinator.cache_blocks

    def get_computed_blocks(request: Any) -> Any:
        return lookup(_shorten(request, decision))

    def get_computed_blocks_for_connector(request: Any) -> Any:
        return lookup_for_connector(_shorten(request, decision))

    def cache_blocks(request: Any, num_computed_tokens: int) -> None:
        plan = _plan(request, decision)
        if plan is not None:
            num_computed_tokens = min(num_computed_tokens, plan.edit_from)
        store(request, num_computed_tokens)

    manager.get_computed_blocks = get_computed_blocks
    manager.get_computed_blocks_for_connector = get_computed_blocks_for_connector
    manager.coordinator.cache_blocks = cache_blocks


def _shorten(request: Any, decision: Decision) -> Any:
    plan = _plan(request, decision)
    if plan is None or isinstance(request, _ShorterRequest):
        return request
    return _ShorterRequest(request, plan.must_compute_from)


def _plan(request: Any, decision: Decision) -> RequestPlan | None:
    if not hasattr(request, _ATTRIBUTE):
        params = request.sampling_params
        plan = None
        if params is not None:
            plan = plan_request(request.prompt_token_ids, params.extra_args, decision)
        setattr(request, _ATTRIBUTE, plan)
    return getattr(request, _ATTRIBUTE)


class _EditMixin:
    kv_cache_manager: KVCacheManager
    vllm_config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        setting = ServingConfig.from_additional_config(self.vllm_config.additional_config)
        assert setting is not None, "setup names this scheduler only with a setting"
        keep_apart(self.kv_cache_manager, setting.load_manifest().decision)


class EditScheduler(_EditMixin, Scheduler):
    """`Scheduler`, where asynchronous scheduling is off."""


class EditAsyncScheduler(_EditMixin, AsyncScheduler):
    """`AsyncScheduler`, vLLM's default."""
