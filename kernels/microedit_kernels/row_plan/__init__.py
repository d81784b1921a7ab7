"""Which rows of a batch need the SAE."""

from microedit_kernels.row_plan.reference import OFF, SCORED, SUBSTITUTED, group_rows, row_states

__all__ = ["OFF", "SCORED", "SUBSTITUTED", "group_rows", "row_states"]
