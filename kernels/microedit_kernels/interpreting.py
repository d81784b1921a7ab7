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
