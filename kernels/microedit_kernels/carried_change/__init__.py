"""What the scored tokens of a prompt carry to the decision position."""

from microedit_kernels.carried_change.reference import carried_change, carried_weights

__all__ = ["carried_change", "carried_weights"]
