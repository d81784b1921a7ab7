"""The KV cache group that the state per slot follows."""

from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec

from microedit_vllm.errors import MicroEditError


def followed_group(kv_cache_config: Any) -> tuple[int, int]:
    """Index and number of KV slots of the first group with full attention.

    Args:
        kv_cache_config: `KVCacheConfig` (`vllm/v1/kv_cache_interface.py`).

    Raises:
        MicroEditError: there is none: the state of old tokens would be freed with their KV.
    """
    for group, candidate in enumerate(kv_cache_config.kv_cache_groups):
        spec = candidate.kv_cache_spec
        specs = getattr(spec, "kv_cache_specs", {"": spec}).values()
        if all(isinstance(each, FullAttentionSpec) for each in specs):
            return group, kv_cache_config.num_blocks * spec.block_size
    raise MicroEditError(
        "the model has no layer with full attention, so the KV cache forgets the decision; "
        "such models are not supported"
    )
