"""SAE training: texts to sequences, activations, optimisation, and a report on held-out text."""

from microedit_trainer.sae.settings import SaeSettings
from microedit_trainer.sae.train import Progress, train_sae

__all__ = ["Progress", "SaeSettings", "train_sae"]
