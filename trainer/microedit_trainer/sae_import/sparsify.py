"""sparsify's folder, `cfg.json` and `sae.safetensors`: our own format, often named by its layer.

Source: EleutherAI/sparsify, `SparseCoder.encode` and `decode`.
"""

import re
from pathlib import Path

from microedit_trainer.sae_import.hook_points import layer_of
from microedit_trainer.sae_import.published import PublishedSae
from microedit_vllm.artifact.sae import SparseAutoencoder
from microedit_vllm.errors import MicroEditError

WEIGHTS = "sae.safetensors"
_HOOK_POINT = re.compile(r"(?:[a-z_]+\.)*(?:layers|h)\.\d+(?:\.\w+)*")


def read(folder: Path) -> PublishedSae:
    """Read a folder.

    Raises:
        MicroEditError: damaged, or not an SAE of a decoder layer's output.
    """
    sae = SparseAutoencoder.load(folder)
    layer = sae.report.get("layer")
    if layer is None and folder.name == "embed_tokens":
        raise MicroEditError(f"{folder} is of the embedding; edits need a decoder layer's output")
    if layer is None and _HOOK_POINT.fullmatch(folder.name):
        layer = layer_of(folder.name)
    return PublishedSae(
        W_enc=sae.W_enc,
        b_enc=sae.b_enc,
        W_dec=sae.W_dec,
        b_dec=sae.b_dec,
        activation="topk",
        format="sparsify",
        k=sae.k,
        layer=layer,
        model=sae.report.get("model"),
    )
