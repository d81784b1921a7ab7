"""Top-k encoder of a sparse autoencoder (Eq. 7)."""

from microedit_kernels.topk_encode.by_key import topk_by_key
from microedit_kernels.topk_encode.reference import folded_bias, input_norm, pre_acts
from microedit_kernels.topk_encode.selection import select_topk, topk_encode

__all__ = ["folded_bias", "input_norm", "pre_acts", "select_topk", "topk_by_key", "topk_encode"]
