"""The edit change: what is added to z from the decision position on."""

from microedit_kernels.edit_change.grouped_sets import EditRows, GroupedSets
from microedit_kernels.edit_change.reference import (
    edit_change,
    grouped_edit_change,
    threshold_acts,
)

__all__ = ["EditRows", "GroupedSets", "edit_change", "grouped_edit_change", "threshold_acts"]
