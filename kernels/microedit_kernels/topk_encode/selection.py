"""Top-k encode in torch as trainer and server call it, by the way that suits the device."""

import torch
from torch import Tensor
from torch.nn.functional import relu

from microedit_kernels.topk_encode.by_key import topk_by_key
from microedit_kernels.topk_encode.cpu import topk_on_cpu
from microedit_kernels.topk_encode.reference import pre_acts


def select_topk(acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, ties to the lower index, NaN ranked highest as torch does.

    Differentiable in `acts`. The result is that of a stable descending sort: values in
    descending order, equal values in ascending order of index.

    Args:
        acts: [..., n], k ≤ n.

    Returns:
        top_acts [..., k] in the dtype of `acts`, top_indices [..., k] int64.
    """
    with torch.no_grad():
        rows = acts.detach().reshape(-1, acts.shape[-1])
        choose = topk_on_cpu if rows.device.type == "cpu" else topk_by_key
        indices = choose(rows, k).view(*acts.shape[:-1], k)
    return acts.gather(-1, indices), indices


def topk_encode(
    z: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 7 with ReLU before the selection (sparsify's order); arguments as in `pre_acts`.

    Returns:
        top_acts [..., k] fp32 and ≥ 0, top_indices [..., k] int64 (see `select_topk`).
    """
    return select_topk(relu(pre_acts(z, W_enc, b_enc, b_dec)), k)
