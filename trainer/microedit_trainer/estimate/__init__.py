"""What a run will take, before it starts: memory by stage, and time."""

from microedit_trainer.estimate.edit import EditPlan, edit_seconds, edit_stages
from microedit_trainer.estimate.machine import Machine
from microedit_trainer.estimate.model_size import ModelSize
from microedit_trainer.estimate.sae import sae_seconds, sae_stages
from microedit_trainer.estimate.stages import Stage, check_fit, gib, largest

__all__ = [
    "EditPlan",
    "Machine",
    "ModelSize",
    "Stage",
    "check_fit",
    "edit_seconds",
    "edit_stages",
    "gib",
    "largest",
    "sae_seconds",
    "sae_stages",
]
