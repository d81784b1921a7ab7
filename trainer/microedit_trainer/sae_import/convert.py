"""Import: find the folder, read its format, fold, save."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from microedit_trainer.sae.train import check_out
from microedit_trainer.sae_import import gemma_scope, llama_scope, sae_lens, sparsify
from microedit_trainer.sae_import.fold import fold
from microedit_trainer.sae_import.published import PublishedSae
from microedit_trainer.sae_import.source import MARKERS, find_folder
from microedit_vllm.artifact.sae import SparseAutoencoder
from microedit_vllm.errors import MicroEditError


@dataclass(frozen=True)
class ImportOptions:
    """What the user decides.

    Attributes:
        k: latents kept per token; None takes the SAE's own.
        layer: decoder layer, where the folder does not say it.
        norm_scale: what z is multiplied by before the encoder, where the folder does not say it
            or says that each token has its own.
        ignore_thresholds: put a Top-k in the place of a JumpReLU's thresholds.
    """

    k: int | None = None
    layer: int | None = None
    norm_scale: float | None = None
    ignore_thresholds: bool = False

    def __post_init__(self) -> None:
        """Raises MicroEditError: numbers that no SAE can have."""
        if self.k is not None and self.k < 1:
            raise MicroEditError(f"k is {self.k}; at least one latent must stay active")
        if self.layer is not None and self.layer < 0:
            raise MicroEditError(f"layer {self.layer} does not exist; layers count from 0")
        if self.norm_scale is not None and not 0 < self.norm_scale < math.inf:
            raise MicroEditError(f"a norm scale of {self.norm_scale} is not a positive number")


def import_sae(source: str, out: Path, options: ImportOptions) -> SparseAutoencoder:
    """Convert the SAE at `source` and save it in `out`.

    Returns:
        The saved SAE. Its report holds `layer` (None where nobody named it), `model` where the
        folder does, and `import`: format, source, and notes on what is not as published.

    Raises:
        MicroEditError: not readable, not representable, or contradicting the options.
    """
    check_out(out)
    folder = find_folder(source, options.layer)
    published = _read(folder, options.norm_scale)
    layer = _settle_layer(published.layer, options.layer)
    sae, notes = fold(published, options.k, options.ignore_thresholds)
    name = source if not Path(source).is_dir() else folder.absolute().name
    about = {"format": published.format, "source": name, "notes": notes}
    report = {"layer": layer, "model": published.model, "import": about}
    report = {key: value for key, value in report.items() if value is not None}
    return replace(sae, report=report).save(out)


def _read(folder: Path, norm_scale: float | None) -> PublishedSae:
    readers: dict[str, Callable[[], PublishedSae]] = {
        llama_scope.CONFIG: lambda: llama_scope.read(folder, norm_scale),
        sparsify.WEIGHTS: lambda: sparsify.read(folder),
        sae_lens.WEIGHTS: lambda: sae_lens.read(folder, norm_scale),
        gemma_scope.WEIGHTS: lambda: gemma_scope.read(folder),
    }
    marker = next((marker for marker in MARKERS if (folder / marker).is_file()), None)
    if marker is None:
        raise MicroEditError(f"{folder} holds no SAE; a folder has {', '.join(MARKERS)}")
    published = readers[marker]()
    if norm_scale is not None and published.scale_in != norm_scale:
        raise MicroEditError(
            f"{folder} says itself that its input is multiplied by {published.scale_in:.6g}; "
            "leave --norm-scale out"
        )
    return published


def _settle_layer(published: int | None, asked: int | None) -> int | None:
    if published is not None and asked is not None and published != asked:
        raise MicroEditError(
            f"the SAE was trained on the output of layer {published}, not {asked} (layers count "
            "from 0, and a layer's input is the output of the one below); leave --layer out"
        )
    return published if asked is None else asked
