"""Which rows of a batch need the SAE."""

from microedit_kernels.row_plan.reference import OFF, SCORED, SUBSTITUTED, compact_rows, row_states

__all__ = ["OFF", "SCORED", "SUBSTITUTED", "compact_rows", "row_states"]
