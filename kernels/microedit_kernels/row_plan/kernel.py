"""Row plan on the device: a compact list of the rows that need work, grouped by key.

Nothing is read back and no shape depends on a value, so a CUDA graph can hold it: the kernels
behind it are launched for every row there could be, and end at once beyond the count.
"""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


# Batches of every size share one kernel.
@triton.jit(do_not_specialize=["M"])
def _group_rows(keys, rows, offsets, M, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    key = tl.program_id(0)
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, M, BLOCK):
        at = start + tl.arange(0, BLOCK)
        found = tl.load(keys + at, mask=at < M, other=-1)
        before += ((found >= 0) & (found < key)).to(tl.int32)
    base = tl.sum(before)
    if key == 0:
        tl.store(offsets, 0)
    for start in range(0, M, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mine = (tl.load(keys + at, mask=at < M, other=-1) == key).to(tl.int32)
        tl.store(rows + base + tl.cumsum(mine, 0) - 1, at, mask=mine != 0)
        base += tl.sum(mine)
    tl.store(offsets + key + 1, base)


def group_rows(keys: Tensor, rows: Tensor, offsets: Tensor) -> None:
    """`reference.group_rows` into buffers that are there: one program per key.

    Args:
        keys: [M] int32; −1 for a row that needs no work.
        rows: [≥ M] int32, overwritten up to the number of active rows.
        offsets: [keys + 1] int32, overwritten.
    """
    _group_rows[(len(offsets) - 1,)](keys, rows, offsets, len(keys), BLOCK=_BLOCK, num_warps=4)
