"""What trainer and server share: the SAE folder and the edit set, on disk and in memory.

Knows neither vLLM nor the trainer.
"""

from microedit_vllm.artifact.edit_operator import EditOperator, with_golden
from microedit_vllm.artifact.edit_set import DecoderChange, EditSet, Golden
from microedit_vllm.artifact.fingerprint import fingerprint_model
from microedit_vllm.artifact.golden_prompts import GoldenPrompt, Misreading
from microedit_vllm.artifact.manifest import Decision, Manifest, Scope, TurnMarkers
from microedit_vllm.artifact.sae import SparseAutoencoder
from microedit_vllm.artifact.scope import scored_span

__all__ = [
    "Decision",
    "DecoderChange",
    "EditOperator",
    "EditSet",
    "Golden",
    "GoldenPrompt",
    "Manifest",
    "Misreading",
    "Scope",
    "SparseAutoencoder",
    "TurnMarkers",
    "fingerprint_model",
    "scored_span",
    "with_golden",
]
