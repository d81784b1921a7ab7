"""Edits inside vLLM: the only folder that knows vLLM's private names.

Offline, `decisions(llm, request_ids)` tells what the switch decided.
"""

from microedit_vllm.engine.records import decisions

__all__ = ["decisions"]
