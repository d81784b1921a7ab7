"""In which order programs of the edit change read and sum."""

import triton
import triton.language as tl


@triton.jit
def is_last(arrived, count):  # type: ignore[no-untyped-def]
    """Whether `count` programs have stored their shares by now; the counter is then 0 again."""
    tl.debug_barrier()  # the shares of all threads come before the count
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(arrived, 0)
    return last


@triton.jit
def step_place(step, turn, steps):  # type: ignore[no-untyped-def]
    """The place of the step-th of a loop's steps, where the loop begins `turn` of 2¹⁶ along.

    Programs that all read the same rows in the same order wait for the same slices of the L2
    cache: each begins elsewhere.
    """
    place = step + (turn * steps >> 16)
    return tl.where(place < steps, place, place - steps)
