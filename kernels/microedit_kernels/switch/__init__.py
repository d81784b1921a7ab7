"""The switch per sequence (Eq. 13, 14) and the two ways to put ẑ into the residual stream."""

from microedit_kernels.switch.reference import (
    absolute_ard,
    apply_delta,
    apply_replace,
    decide,
    relative_ard,
    smallest_run,
)

__all__ = [
    "absolute_ard",
    "apply_delta",
    "apply_replace",
    "decide",
    "relative_ard",
    "smallest_run",
]
