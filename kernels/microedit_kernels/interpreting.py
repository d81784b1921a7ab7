"""Whether kernels run in Triton's interpreter, and what it computes otherwise than a GPU.

vLLM's CPU build hides Triton (`vllm.triton_utils`), so kernels import the real `triton`.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def operand(x):  # type: ignore[no-untyped-def]
    """An operand of `tl.dot`: the interpreter multiplies the raw bits of 16-bit floats (3.6, 3.9).

    Widened to fp32 there, which is exact, so that the same function is checked.
    """
    if INTERPRETED:
        return x.to(tl.float32)
    return x


@triton.jit
def rounded(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 `x` in `dtype`, to the nearest, ties to even: the interpreter cuts bits off for bf16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest, bits | 0x400000).to(tl.float32, bitcast=True)
    return x.to(dtype)
