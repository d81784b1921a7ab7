"""The k largest by an integer key: exact on ties, on any device, without a look at a value."""

import torch
from torch import Tensor

# 16-bit floats convert to fp32 without loss or new ties, so that one key serves them all.
KEYED = (torch.float32, torch.bfloat16, torch.float16)


def topk_by_key(rows: Tensor, k: int) -> Tensor:
    """Indices of `select_topk` without reading a value back to the host.

    Value and index become one integer that orders as (value, lower index first), so that no two
    are equal and `torch.topk` has no choice.

    Args:
        rows: [R, n] of a dtype in `KEYED`, k ≤ n < 2³¹.

    Returns:
        [R, k] int64.
    """
    last = rows.shape[-1] - 1
    # −0.0 and 0.0 are equal: adding 0.0 makes them the same bits. It also copies, so that what
    # follows may work in place.
    values = rows.float() + 0.0
    is_nan = values.isnan()
    bits = values.view(torch.int32)
    bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF)).masked_fill_(is_nan, 0x7FFFFFFF)
    ranks = torch.arange(last, -1, -1, device=rows.device)
    keys = bits.long().bitwise_left_shift_(32).bitwise_or_(ranks)
    return last - keys.topk(k, dim=-1).values.bitwise_and_(0xFFFFFFFF)
