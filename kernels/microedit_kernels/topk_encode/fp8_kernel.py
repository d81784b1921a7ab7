"""Eight-bit filter of the Top-k encode in Triton (`fp8_reference` for what it proves).

Four steps for each chunk of rows. The product of 8-bit weights bounds every pre-activation. The k
best by it are scored with the exact weights; the smallest of those is a lower bound L of the k-th.
Latents whose upper bound reaches L are listed, segment by segment, and scored exactly as well. The
k best of the list are then the k best of all. A row with a longer list than there is space for, or
without a bound, falls back: it is marked, never cut short.
"""

import triton
import triton.language as tl

from microedit_kernels.interpreting import INTERPRETED, operand
from microedit_kernels.topk_encode.k_largest import NOTHING, chosen_places, key_range, order_key

# Four e4m3 codes are two pairs of bf16: exponent and mantissa move to their place, and 2^120
# corrects the exponent's bias, subnormal codes included. The compiler's own conversion takes an
# instruction of a quarter of the rate for each code, and has none for sm_80.
_E4M3_TO_BF16 = tl.constexpr("""{
    .reg .b32 t, s, h, up, zero;
    mov.b32 up, 0x7b807b80;
    mov.b32 zero, 0x80008000;
    prmt.b32 t, $2, 0, 0x1404;
    and.b32 s, t, 0x80008000;
    shr.b32 h, t, 4;
    lop3.b32 t, h, 0x07f007f0, s, 0xea;
    fma.rn.bf16x2 $0, t, up, zero;
    prmt.b32 t, $2, 0, 0x3424;
    and.b32 s, t, 0x80008000;
    shr.b32 h, t, 4;
    lop3.b32 t, h, 0x07f007f0, s, 0xea;
    fma.rn.bf16x2 $1, t, up, zero;
}""")


@triton.jit
def _decoded(codes, dtype: tl.constexpr, E4M3: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes as the dtype that they are multiplied in; every code is a value of each of them."""
    if INTERPRETED:
        return codes.to(tl.float32)
    if E4M3:
        codes = tl.inline_asm_elementwise(
            _E4M3_TO_BF16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    return codes.to(dtype)


@triton.jit
def _bound(approximate, error, rounding, centred, full):  # type: ignore[no-untyped-def]
    # The last term: the roundings that scale and bias cost.
    return error * centred + rounding * full + tl.abs(approximate) * 2.0**-20


@triton.jit
def _row_norms(z, rows, count, center, norms, M, d, z_stride, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    r = tl.program_id(0)
    if r < tl.load(count):
        row = tl.load(rows + r).to(tl.int64)
        at = tl.arange(0, BK)
        largest = tl.zeros((BK,), tl.float32)
        for start in range(0, d, BK):
            inside = start + at < d
            x = tl.load(z + row * z_stride + start + at, mask=inside, other=0.0).to(tl.float32)
            c = tl.load(center + start + at, mask=inside, other=0.0)
            largest = tl.maximum(largest, tl.maximum(tl.abs(x), tl.abs(x - c)))
        unit = tl.max(largest)
        unit = tl.where(unit > 0.0, unit, 1.0)
        full = tl.zeros((BK,), tl.float32)
        centred = tl.zeros((BK,), tl.float32)
        for start in range(0, d, BK):
            inside = start + at < d
            x = tl.load(z + row * z_stride + start + at, mask=inside, other=0.0).to(tl.float32)
            c = tl.load(center + start + at, mask=inside, other=0.0)
            full += (x / unit) * (x / unit)
            centred += ((x - c) / unit) * ((x - c) / unit)
        # Rounded up. Products of so small values would be flushed to 0: no bound.
        unit = tl.where(unit < 2.0**-80, float("inf"), unit * (1 + 2.0**-12))
        tl.store(norms + r, tl.sqrt(tl.sum(centred)) * unit)
        tl.store(norms + M + r, tl.sqrt(tl.sum(full)) * unit)


@triton.jit
def _approximate(  # type: ignore[no-untyped-def]
    z,
    rows,
    count,
    codes,
    scale,
    bias,
    error,
    rounding,
    norms,
    pre,
    group_keys,
    group_upper,
    first_row,
    chunk_rows,
    M,
    n,
    groups,
    d,
    z_stride,
    E4M3: tl.constexpr,
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    blocks = tl.cdiv(chunk_rows, BM)
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    active = tl.minimum(tl.load(count) - first_row, chunk_rows)
    if block * BM < active:
        r = block * BM + tl.arange(0, BM)
        latents = tile * BN + tl.arange(0, BN)
        live = r < active
        known = latents < n
        row = tl.load(rows + first_row + r, mask=live, other=0).to(tl.int64)
        at = tl.arange(0, BK)
        # Latents are the tile's rows, so that the tensor cores take the converted codes straight
        # from registers.
        z_at = z + row[None, :] * z_stride + at[:, None]
        codes_at = codes + tl.where(known, latents, 0).to(tl.int64)[:, None] * d + at[None, :]
        acc = tl.zeros((BN, BM), tl.float32)
        for start in range(0, d, BK):
            if EVEN_K:
                z_part = tl.load(z_at)
                code = tl.load(codes_at)
            else:
                inside = start + at < d
                z_part = tl.load(z_at, mask=inside[:, None], other=0.0)
                code = tl.load(codes_at, mask=inside[None, :], other=0.0)
            weights = _decoded(code, z_part.dtype, E4M3)
            acc = tl.dot(weights, operand(z_part), acc, input_precision="ieee")
            z_at += BK
            codes_at += BK
        factor = tl.load(scale + latents, mask=known, other=0.0)
        acc = acc * factor[:, None] + tl.load(bias + latents, mask=known, other=0.0)[:, None]
        here = known[:, None] & live[None, :]
        tl.store(pre + r[None, :].to(tl.int64) * n + latents[:, None], acc, mask=here)
        upper = acc + _bound(
            acc,
            tl.load(error + latents, mask=known, other=0.0)[:, None],
            tl.load(rounding + latents, mask=known, other=0.0)[:, None],
            tl.load(norms + first_row + r, mask=live, other=0.0)[None, :],
            tl.load(norms + M + first_row + r, mask=live, other=0.0)[None, :],
        )
        upper = tl.where(upper == upper, upper, float("inf"))
        upper = tl.where(known[:, None], upper, float("-inf"))
        keys = tl.where(known[:, None], order_key(acc), NOTHING)
        group = tile * (BN // G) + tl.arange(0, BN // G)
        out = r[None, :].to(tl.int64) * groups + group[:, None]
        here = (group < groups)[:, None] & live[None, :]
        tl.store(group_keys + out, tl.max(tl.reshape(keys, (BN // G, G, BM)), 1), mask=here)
        tl.store(group_upper + out, tl.max(tl.reshape(upper, (BN // G, G, BM)), 1), mask=here)


@triton.jit
def _collect(  # type: ignore[no-untyped-def]
    pre,
    group_upper,
    count,
    error,
    rounding,
    norms,
    top_acts,
    counts,
    first_row,
    M,
    n,
    groups,
    k,
    segments,
    capacity,
    RELU: tl.constexpr,
    G: tl.constexpr,
    SEGMENT: tl.constexpr,
    KP: tl.constexpr,
):
    r = (tl.program_id(0) // segments).to(tl.int64)
    segment = tl.program_id(0) % segments
    if first_row + r < tl.load(count):
        slot = tl.arange(0, KP)
        first = tl.load(top_acts + (first_row + r) * k + slot, mask=slot < k, other=0.0)
        unproven = tl.sum(tl.where(tl.abs(first) < float("inf"), 0, 1))
        threshold = tl.min(tl.where(slot < k, first, float("inf")))
        centred = tl.load(norms + first_row + r)
        full = tl.load(norms + M + first_row + r)
        proven = (unproven == 0) & (centred < float("inf")) & (full < float("inf"))
        latents = segment * SEGMENT + tl.arange(0, SEGMENT)
        inside = latents < n
        most = tl.load(group_upper + r * groups + latents // G, mask=inside, other=0.0)
        if RELU:
            most = tl.maximum(most, 0.0)
        inside = inside & (most >= threshold)
        approximate = tl.load(pre + r * n + latents, mask=inside, other=0.0)
        upper = approximate + _bound(
            approximate,
            tl.load(error + latents, mask=inside, other=0.0),
            tl.load(rounding + latents, mask=inside, other=0.0),
            centred,
            full,
        )
        if RELU:
            upper = tl.where(upper < 0.0, 0.0, upper)
        # Whatever is not known to be below: NaN is taken.
        taken = (inside & ((upper < threshold) == 0)).to(tl.int32)
        place = tl.cumsum(taken, 0) - 1
        # The list takes the place of the segment's values, which are not needed any more.
        tl.debug_barrier()
        tl.store(
            pre + r * n + segment * SEGMENT + place,
            latents.to(tl.float32, bitcast=True),
            mask=taken != 0,
        )
        listed = tl.where(proven, tl.sum(taken), capacity + 1)
        tl.store(counts + r * segments + segment, listed)


@triton.jit
def _rescore(  # type: ignore[no-untyped-def]
    z,
    rows,
    count,
    W_enc,
    bias,
    top_acts,
    top_indices,
    pre,
    counts,
    acts,
    indices,
    first_row,
    n,
    d,
    k,
    segments,
    capacity,
    z_stride,
    lanes,
    RELU: tl.constexpr,
    FIRST: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    KP: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """Exact values of the k best by the filter (FIRST), or of every listed latent."""
    r = (tl.program_id(0) // lanes).to(tl.int64)
    lane = tl.program_id(0) % lanes
    if first_row + r < tl.load(count):
        row = tl.load(rows + first_row + r).to(tl.int64)
        best = tl.arange(0, KP)
        best_at = (first_row + r) * k + best
        segment = tl.arange(0, SEGMENTS)
        if FIRST:
            total = k
        else:
            listed = tl.load(counts + r * segments + segment, mask=segment < segments, other=0)
            ends = tl.cumsum(listed, 0)
            total = tl.sum(listed)
            total = tl.where(total > capacity, 0, total)
            best_latents = tl.load(top_indices + best_at, mask=best < k, other=-1)
            best_acts = tl.load(top_acts + best_at, mask=best < k, other=0.0)
        for start in range(lane * BC, total, lanes * BC):
            slot = start + tl.arange(0, BC)
            here = slot < total
            if FIRST:
                latents = tl.load(top_indices + (first_row + r) * k + slot, mask=here, other=0)
                unknown = here
            else:
                passed = ends[None, :] <= slot[:, None]
                place = slot - tl.sum(tl.where(passed, listed[None, :], 0), 1)
                base = tl.sum(passed.to(tl.int32), 1) * SEGMENT
                bits = tl.load(pre + r * n + base + place, mask=here, other=0.0)
                latents = bits.to(tl.int32, bitcast=True)
                same = latents[:, None] == best_latents[None, :]
                unknown = here & (tl.sum(same.to(tl.int32), 1) == 0)
            acc = tl.zeros((BC, BK), tl.float32)
            W_at = W_enc + latents.to(tl.int64)[:, None] * d
            for column in range(0, d, BK):
                at = column + tl.arange(0, BK)
                inside = at < d
                part = tl.load(z + row * z_stride + at, mask=inside, other=0.0).to(tl.float32)
                weights = tl.load(
                    W_at + at[None, :], mask=unknown[:, None] & inside[None, :], other=0.0
                )
                acc += weights.to(tl.float32) * part[None, :]
            act = tl.sum(acc, 1) + tl.load(bias + latents, mask=unknown, other=0.0)
            if RELU:
                act = tl.where(act < 0.0, 0.0, act)
            if FIRST:
                tl.store(top_acts + (first_row + r) * k + slot, act, mask=here)
            else:
                act = tl.where(unknown, act, tl.sum(tl.where(same, best_acts[None, :], 0.0), 1))
                tl.store(acts + r * capacity + slot, act, mask=here)
                tl.store(indices + r * capacity + slot, latents, mask=here)


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    acts,
    indices,
    counts,
    count,
    top_acts,
    top_indices,
    fallen,
    first_row,
    k,
    segments,
    capacity,
    SEGMENTS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    state = -1
    if first_row + r < tl.load(count):
        segment = tl.arange(0, SEGMENTS)
        listed = tl.load(counts + r * segments + segment, mask=segment < segments, other=0)
        total = tl.sum(listed)
        if (total > capacity) | (total < k):
            state = 0
        else:
            slot = tl.arange(0, CAPACITY)
            here = slot < total
            act = tl.load(acts + r * capacity + slot, mask=here, other=0.0)
            latents = tl.load(indices + r * capacity + slot, mask=here, other=0)
            keys = tl.where(here, order_key(act), NOTHING)
            least, most = key_range(keys)
            chosen, place, _ = chosen_places(keys, k, least, most)
            out = (first_row + r) * k + place
            tl.store(top_acts + out, act, mask=chosen)
            tl.store(top_indices + out, latents, mask=chosen)
    tl.store(fallen + first_row + r, state)


@triton.jit
def _fallen_rows(  # type: ignore[no-untyped-def]
    rows, fallen_rows, fallen_count, count, z_rows, report, M, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(fallen_count)
    here = (at < M) & (at < number)
    r = tl.load(fallen_rows + at, mask=here, other=0)
    tl.store(z_rows + at, tl.load(rows + r, mask=here, other=0), mask=here)
    if tl.program_id(0) == 0:
        tl.store(report, tl.load(report) + tl.load(count))
        tl.store(report + 1, tl.load(report + 1) + number)


@triton.jit
def _return_rows(  # type: ignore[no-untyped-def]
    acts, indices, fallen_rows, fallen_count, top_acts, top_indices, k, KP: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64)
    if i < tl.load(fallen_count):
        r = tl.load(fallen_rows + i).to(tl.int64)
        slot = tl.arange(0, KP)
        here = slot < k
        tl.store(top_acts + r * k + slot, tl.load(acts + i * k + slot, mask=here), mask=here)
        tl.store(top_indices + r * k + slot, tl.load(indices + i * k + slot, mask=here), mask=here)
