"""The edit change: what is added to z from the decision position on."""

from microedit_kernels.edit_change.reference import edit_change, threshold_acts

__all__ = ["edit_change", "threshold_acts"]
