"""The switch per sequence (Eq. 13, 14) and the two ways to put ẑ into the residual stream."""

from microedit_kernels.switch.reference import (
    apply_delta,
    apply_replace,
    decide,
    smallest_runs,
)

__all__ = ["apply_delta", "apply_replace", "decide", "smallest_runs"]
