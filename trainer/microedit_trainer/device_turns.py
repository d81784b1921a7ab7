"""Who is on the device: model and SAE together, or in turn where it cannot hold both."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from microedit_trainer.language_model import LanguageModel
from microedit_vllm.artifact import SparseAutoencoder


@dataclass(frozen=True)
class DeviceTurns:
    """A model cut behind `layer` and an SAE, which share a device.

    Attributes:
        sae: on the device for good; with `offload` in the CPU's memory, whence `solving` takes it.
        offload: whether the layers up to the cut and the SAE take turns on the device.
    """

    lm: LanguageModel
    sae: SparseAutoencoder
    layer: int
    offload: bool

    @classmethod
    def build(
        cls, lm: LanguageModel, sae: SparseAutoencoder, layer: int, offload: bool
    ) -> "DeviceTurns":
        return cls(lm, sae if offload else sae.to(lm.device), layer, offload)

    @contextmanager
    def solving(self) -> Iterator[SparseAutoencoder]:
        """The SAE on the device; with `offload`, `LanguageModel.lower` cannot run meanwhile."""
        if not self.offload:
            yield self.sae
            return
        with self.lm.lower_offloaded(self.layer):
            yield self.sae.to(self.lm.device)
