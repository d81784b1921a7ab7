"""Which KV blocks a request with edits may take from the prefix cache, and which it may leave.

Three rules, on vLLM's own `KVCacheManager`:

1. Token e is always computed, and so are the scored tokens before it, but for those whose
   distances already lie beside the cached block, from another request that scored them.
2. Tokens that may be substituted are stored only once the switch is known to be off.
3. Requests with edits off see the cache as ever.
"""

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager

from microedit_vllm.artifact import Manifest
from microedit_vllm.engine.kv_group import followed_group
from microedit_vllm.engine.request_plan import RequestPlan, plan_request

_PLAN, _OFF, _NOTED = "microedit_plan", "microedit_off", "microedit_noted_blocks"


class EditPrefixCache:
    """The rules, put around a KV cache manager's lookup and store."""

    def __init__(self, manager: KVCacheManager, manifest: Manifest) -> None:
        self._manifest = manifest
        self._manager = manager
        self._group, _ = followed_group(manager.kv_cache_config)
        self._blocks_of = manager.coordinator.single_type_managers[self._group]
        # Positions [from, to) of the tokens in a block whose distances lie beside it.
        self._scored: dict[int, tuple[int, int]] = {}
        self._lookup = manager.get_computed_blocks
        self._store = manager.coordinator.cache_blocks
        self._allocate = manager.block_pool.get_new_blocks
        manager.get_computed_blocks = self.get_computed_blocks
        manager.coordinator.cache_blocks = self.cache_blocks
        manager.block_pool.get_new_blocks = self.get_new_blocks

    def plan(self, request: Any) -> RequestPlan | None:
        """The request's plan, made once per prompt (that of a streamed input grows)."""
        length = len(request.prompt_token_ids or ())
        known, plan = getattr(request, _PLAN, (None, None))
        if known != length:
            params, plan = request.sampling_params, None
            if params is not None:
                plan = plan_request(request.prompt_token_ids, params.extra_args, self._manifest)
            setattr(request, _PLAN, (length, plan))
            self.decided(request, None)
        return plan

    def decided(self, request: Any, on: bool | None) -> None:
        """Note a decision; None when the request is going to be computed again."""
        setattr(request, _OFF, on is False)

    def finished(self, request: Any) -> None:
        """Store what was computed of a request that is known to be off, before it is freed."""
        if self.plan(request) is not None and getattr(request, _OFF, False):
            # The KV of the token sampled last was never computed.
            computed = min(request.num_computed_tokens, request.num_tokens - 1)
            self.cache_blocks(request, computed)

    def get_computed_blocks(self, request: Any) -> Any:
        """In place of `KVCacheManager.get_computed_blocks`."""
        plan = self.plan(request)
        if plan is None or isinstance(request, _ShorterRequest):
            return self._lookup(request)
        setattr(request, _NOTED, 0)
        found = self._lookup(_ShorterRequest(request, plan.edit_from))
        usable = self._usable(found[0].blocks[self._group], found[1], plan)
        return found if usable >= found[1] else self._lookup(_ShorterRequest(request, usable))

    def _usable(self, blocks: Any, num_computed: int, plan: RequestPlan) -> int:
        """How many of the tokens found need not be computed."""
        size = self._blocks_of.block_size
        for index in range(plan.scored_from // size, len(blocks)):
            begin = max(plan.scored_from, index * size)
            end = min(plan.scored_to, num_computed, (index + 1) * size)
            scored = self._scored.get(blocks[index].block_id, (0, 0))
            if begin < end and not scored[0] <= begin < end <= scored[1]:
                return begin
        return num_computed

    def cache_blocks(self, request: Any, num_computed_tokens: int) -> None:
        """In place of `KVCacheCoordinator.cache_blocks`."""
        plan = self.plan(request)
        if plan is None:
            self._store(request, num_computed_tokens)
            return
        if not getattr(request, _OFF, False):
            num_computed_tokens = min(num_computed_tokens, plan.substitute_from)
        self._store(request, num_computed_tokens)
        self._note_scored(request, plan, num_computed_tokens)

    def _note_scored(self, request: Any, plan: RequestPlan, num_computed_tokens: int) -> None:
        size = self._blocks_of.block_size
        first = max(getattr(request, _NOTED, 0), plan.scored_from // size)
        stop = min(num_computed_tokens // size, -(-plan.scored_to // size))
        if first >= stop:
            return
        setattr(request, _NOTED, stop)
        blocks = self._blocks_of.req_to_blocks[request.request_id]
        for index in range(first, stop):
            begin = max(plan.scored_from, index * size)
            end = min(plan.scored_to, (index + 1) * size)
            # A block that was found in the cache has all that this request needs of it, or more.
            self._scored.setdefault(blocks[index].block_id, (begin, end))

    def get_new_blocks(self, num_blocks: int) -> Any:
        """In place of `BlockPool.get_new_blocks`: a block that gets other tokens is forgotten."""
        blocks = self._allocate(num_blocks)
        for block in blocks:
            self._scored.pop(block.block_id, None)
        return blocks


class _ShorterRequest:
    """A request as a prefix lookup sees it, cut so that no hit reaches beyond `limit` tokens."""

    def __init__(self, request: Any, limit: int) -> None:
        self._request = request
        # The lookup leaves the last token to be computed (`KVCacheManager.get_computed_blocks`).
        self.num_tokens = min(request.num_tokens, limit + 1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)
