"""The switch in Triton: one program per sequence reads its window's distances and decides."""

import torch
import triton
import triton.language as tl
from torch import Tensor


# Windows of a length share one kernel with those of up to twice it.
@triton.jit(do_not_specialize=["width"])
def _decide(  # type: ignore[no-untyped-def]
    dist,
    dist0,
    counts,
    window_slots,
    in_window,
    decide_slots,
    compacted,
    ards,
    on,
    alpha,
    tau,
    min_tokens,
    width,
    run,
    RELATIVE: tl.constexpr,
    W: tl.constexpr,
):
    sequence = tl.program_id(0)
    at = tl.arange(0, W)
    here = at < width
    token = sequence.to(tl.int64) * width + at
    slot = tl.load(window_slots + token, mask=here, other=0)
    counted = here & (tl.load(in_window + token, mask=here, other=0) != 0)
    counted = counted & (tl.load(counts + slot, mask=counted, other=0) != 0)
    value = tl.load(dist + slot, mask=counted, other=0.0)
    if RELATIVE:
        weight = tl.load(dist0 + slot, mask=counted, other=0.0)
    else:
        weight = tl.where(counted, alpha, 0.0)
    size = tl.sum(counted.to(tl.int32))
    tiny = 1.1754943508222875e-38
    smallest = tl.sum(value) / tl.maximum(tl.sum(weight), tiny)
    if (run > 0) & (size > run):
        # Counted tokens side by side, so that a run is a run of them.
        place = tl.cumsum(counted.to(tl.int32), 0) - 1
        values = compacted + sequence.to(tl.int64) * 2 * width
        weights = values + width
        tl.store(values + place, value, mask=counted)
        tl.store(weights + place, weight, mask=counted)
        tl.debug_barrier()
        starts = at <= size - run
        top = tl.zeros((W,), tl.float32)
        bottom = tl.zeros((W,), tl.float32)
        for step in range(0, run):
            top += tl.load(values + at + step, mask=starts, other=0.0)
            bottom += tl.load(weights + at + step, mask=starts, other=0.0)
        ratio = top / tl.maximum(bottom, tiny)
        # A NaN is no smallest run in torch's sense: it is the result.
        spoiled = tl.max((starts & (ratio != ratio)).to(tl.int32))
        smallest = tl.min(tl.where(starts & (ratio == ratio), ratio, float("inf")))
        smallest = tl.where(spoiled > 0, float("nan"), smallest)
    ard = tl.where((size > 0) & (size >= min_tokens), smallest, float("inf"))
    tl.store(ards + sequence, ard)
    # NaN is not ≤ anything: off.
    tl.store(on + tl.load(decide_slots + sequence), (ard <= tau).to(tl.int8))


def decide(
    dist: Tensor,
    dist0: Tensor,
    counts: Tensor,
    window_slots: Tensor,
    in_window: Tensor,
    decide_slots: Tensor,
    ards: Tensor,
    on: Tensor,
    compacted: Tensor,
    tau: float,
    run: int,
    min_tokens: int,
    alpha: float | None,
) -> None:
    """Eq. 13 and 14 of each sequence (`reference.smallest_runs` and `reference.decide`).

    The distances of a window may come from several steps: they lie beside the KV cache.

    Args:
        dist, dist0, counts: by KV slot, fp32, fp32 and bool.
        window_slots, in_window: slots of each sequence's scored tokens in order of position, and
            which of them are tokens, [D, W] int64 and bool.
        decide_slots: where the decisions go, [D] int64.
        ards: [D] fp32, written; +∞ where fewer than `min_tokens` count.
        on: by KV slot, bool, written at `decide_slots`.
        compacted: scratch, [≥ D·2·W] fp32.
        run: length of the runs, 0 for the whole window.
        alpha: of the absolute ARD; None for the relative one.
    """
    sequences, width = window_slots.shape
    if sequences == 0:
        return
    _decide[(sequences,)](
        *(
            dist,
            dist0,
            counts.view(torch.int8),
            window_slots,
            in_window.view(torch.int8),
            decide_slots,
        ),
        *(compacted, ards, on.view(torch.int8), alpha or 0.0, tau, min_tokens, width, run),
        RELATIVE=alpha is None,
        W=triton.next_power_of_2(max(width, 1)),
        num_warps=4,
    )
