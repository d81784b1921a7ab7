"""Golden prompts against a running engine: does it read z where the set was trained on it?

Knows no vLLM: a server is asked over HTTP; `microedit_vllm.engine.golden_prompts` asks a
`vllm.LLM`.
"""

from microedit_vllm.verification.comparison import Finding, Observation, Report, compare
from microedit_vllm.verification.server import verify_server

__all__ = ["Finding", "Observation", "Report", "compare", "verify_server"]
