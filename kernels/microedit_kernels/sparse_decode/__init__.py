"""Sparse decoder (Eq. 8), its edited rows, and the squared distances that ARD sums (Eq. 13)."""

from microedit_kernels.sparse_decode.reference import (
    decode,
    decode_change,
    row_map,
    squared_distance,
)

__all__ = ["decode", "decode_change", "row_map", "squared_distance"]
