"""The k largest of a vector that one program holds, exactly: ties to the lower place, NaN highest.

Values are compared as integers that order as they do, so that NaN, infinities and zeros of both
signs need no case of their own.
"""

import triton
import triton.language as tl

# Below the key of every value, −∞ and NaN included.
NOTHING = tl.constexpr(-(2**31))


@triton.jit
def order_key(x):  # type: ignore[no-untyped-def]
    """fp32 → int32 that orders as torch.topk does: −0.0 is 0.0, every NaN is above +∞."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def kth_key(keys, k):  # type: ignore[no-untyped-def]
    """A threshold t and how many of the keys equal to it belong to the k largest.

    Keys above t are fewer than k, or exactly k with none of t. Four-way search over the key's
    range, ended as soon as k keys stand out. At least k keys must be above NOTHING; keys are at
    most 2²⁰.
    """
    low = tl.min(tl.where(keys == NOTHING, 0x7FFFFFFF, keys)).to(tl.int64)
    high = tl.max(keys).to(tl.int64) + 1
    # At least k keys are ≥ low, fewer than k are ≥ high.
    above_high = tl.full((), 0, tl.int64)
    at_low = tl.full((), -1, tl.int64)
    while (high - low > 1) & (at_low != k):
        quarter = (high - low) // 4
        first = low + tl.maximum(quarter, 1)
        second = tl.minimum(low + tl.maximum(2 * quarter, 1), high - 1)
        third = tl.minimum(low + tl.maximum(3 * quarter, 1), high - 1)
        wide = keys.to(tl.int64)
        packed = (
            (wide >= first).to(tl.int64)
            + ((wide >= second).to(tl.int64) << 21)
            + ((wide >= third).to(tl.int64) << 42)
        )
        counts = tl.sum(packed)
        at_first = counts & 0x1FFFFF
        at_second = (counts >> 21) & 0x1FFFFF
        at_third = counts >> 42
        if at_third >= k:
            low = third
            at_low = at_third
        elif at_second >= k:
            low = second
            at_low = at_second
            high = third
            above_high = at_third
        elif at_first >= k:
            low = first
            at_low = at_first
            high = second
            above_high = at_second
        else:
            high = first
            above_high = at_first
    # Everything from low on is a threshold just below it, with none of its own.
    exact = at_low == k
    return tl.where(exact, low - 1, low), tl.where(exact, 0, k - above_high)


@triton.jit
def chosen_places(keys, k):  # type: ignore[no-untyped-def]
    """Which of the keys are the k largest, and the place of each among them in order.

    Returns:
        chosen [N] bool, place [N] int32 (of use where chosen).
    """
    threshold, of_equal = kth_key(keys, k)
    wide = keys.to(tl.int64)
    greater = (wide > threshold) & (keys != NOTHING)
    equal = (wide == threshold) & (keys != NOTHING)
    # Two counts in one scan: of the equal ones, the first `of_equal` are taken.
    packed = greater.to(tl.int64) + (equal.to(tl.int64) << 32)
    before = tl.cumsum(packed, 0) - packed
    equal_before = before >> 32
    chosen = greater | (equal & (equal_before < of_equal))
    place = (before & 0xFFFFFFFF) + tl.minimum(equal_before, of_equal)
    return chosen, place.to(tl.int32)
