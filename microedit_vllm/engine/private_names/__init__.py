"""Every name of vLLM's insides that this package relies on, in one list; imports no vLLM.

`compatibility` compares the list with the vLLM that is installed. `docs/private_names.md` is made
of it: `python -m microedit_vllm.engine.private_names > docs/private_names.md`.
"""

from microedit_vllm.engine.private_names.entry import PrivateName
from microedit_vllm.engine.private_names.server import SCHEDULER, SERVER
from microedit_vllm.engine.private_names.worker import V1_RUNNER, V2_RUNNER, WORKER

__all__ = ["PRIVATE_NAMES", "SUPPORTED", "PrivateName"]

SUPPORTED = "0.32"
PRIVATE_NAMES = (*SERVER, *SCHEDULER, *WORKER, *V1_RUNNER, *V2_RUNNER)
