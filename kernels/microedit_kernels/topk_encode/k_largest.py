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
def key_range(keys):  # type: ignore[no-untyped-def]
    """The smallest key above NOTHING, and the largest."""
    return tl.min(tl.where(keys == NOTHING, 0x7FFFFFFF, keys)), tl.max(keys)


@triton.jit
def kth_key(keys, k, least, most):  # type: ignore[no-untyped-def]
    """A threshold and how many of the keys equal to it belong to the k largest.

    Every key above the threshold does. Three-way search from `least` to `most`, which ends as soon
    as k keys stand out. At most 2¹⁴ keys; where fewer than k are above NOTHING, all are taken.

    Args:
        least: at least k keys, or all above NOTHING, are as large.
        most: no key is larger.
    """
    low = least.to(tl.int64)
    high = most.to(tl.int64) + 1
    # At least k keys are ≥ low (unless there are fewer), fewer than k are ≥ high.
    from_low = tl.full((), -1, tl.int32)
    from_high = tl.full((), 0, tl.int32)
    while (high - low > 1) & (from_low != k):
        third = tl.maximum((high - low) // 3, 1)
        first = low + third
        second = tl.minimum(first + third, high - 1)
        # Two counts in one reduction, 16 bits each.
        counts = tl.sum(
            (keys >= first.to(tl.int32)).to(tl.int32)
            + tl.where(keys >= second.to(tl.int32), 1 << 16, 0)
        )
        from_first = counts & 0xFFFF
        from_second = counts >> 16
        if from_second >= k:
            low = second
            from_low = from_second
        elif from_first >= k:
            low = first
            from_low = from_first
            high = second
            from_high = from_second
        else:
            high = first
            from_high = from_first
    return low.to(tl.int32), tl.where(from_low == k, k, k - from_high)


@triton.jit
def chosen_places(keys, k, least, most):  # type: ignore[no-untyped-def]
    """Which of the keys are the k largest, and the place of each among them in order.

    Args:
        least, most: see `kth_key`.

    Returns:
        chosen [N] bool, place [N] int32 (of use where chosen), and a key that none of them is
        below.
    """
    threshold, of_equal = kth_key(keys, k, least, most)
    greater = keys > threshold
    equal = (keys == threshold) & (keys != NOTHING)
    # Two counts in one scan: of the equal ones, the first `of_equal` are taken.
    packed = greater.to(tl.int32) + tl.where(equal, 1 << 16, 0)
    before = tl.cumsum(packed, 0) - packed
    equal_before = before >> 16
    chosen = greater | (equal & (equal_before < of_equal))
    place = (before & 0xFFFF) + tl.minimum(equal_before, of_equal)
    return chosen, place, threshold
