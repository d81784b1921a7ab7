"""Top-k encode in Triton, exact without candidates that could overflow.

The product writes the pre-activations and, for every group of latents, the largest. If the k best
are sought, the groups of the k largest maxima hold them (ties to the lower group): were a latent of
the top k in another group, each of those k groups would hold a latent that comes before it. So the
selection reads n / group maxima and k groups, never all n values. Rows are done in chunks, so that
the scratch is bounded.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from microedit_kernels.interpreting import INTERPRETED, operand
from microedit_kernels.topk_encode.k_largest import NOTHING, chosen_places, key_range, order_key
from microedit_kernels.topk_encode.launch import (
    SELECT_WARPS,
    EncodeConfig,
    encode_config,
    group_size,
)


# Sizes that change from step to step must not have a kernel each.
@triton.jit(do_not_specialize=["first_row", "chunk_rows"])
def _encode(  # type: ignore[no-untyped-def]
    z,
    rows,
    count,
    W_enc,
    bias,
    row_scale,
    row_shift,
    W_sum,
    pre,
    group_keys,
    first_row,
    chunk_rows,
    n,
    groups,
    d,
    z_stride,
    RELU: tl.constexpr,
    NORM: tl.constexpr,
    WIDE: tl.constexpr,
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP and not INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()
    # Row blocks of one tile of latents run side by side: its weights come from L2 but once.
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
        z_at = z + row[:, None] * z_stride + at[None, :]
        W_at = W_enc + tl.where(known, latents, 0).to(tl.int64)[None, :] * d + at[:, None]
        acc = tl.zeros((BM, BN), tl.float32)
        steps = tl.cdiv(d, BK)
        for step in range(0, steps):
            # Each tile begins elsewhere, or all would wait for the same lines of z at once.
            place = step + tile % steps
            start = tl.where(place < steps, place, place - steps) * BK
            if EVEN_K:
                W_part = tl.load(W_at + start)
                z_part = tl.load(z_at + start)
            else:
                inside = start + at < d
                W_part = tl.load(W_at + start, mask=inside[:, None], other=0.0)
                z_part = tl.load(z_at + start, mask=inside[None, :], other=0.0)
            if WIDE:
                z_part = z_part.to(tl.float32)
                W_part = W_part.to(tl.float32)
            acc = tl.dot(operand(z_part), operand(W_part), acc, input_precision="ieee")
        if NORM:
            shift = tl.load(row_shift + first_row + r, mask=live, other=0.0)
            scale = tl.load(row_scale + first_row + r, mask=live, other=0.0)
            sums = tl.load(W_sum + latents, mask=known, other=0.0)
            acc = (acc - shift[:, None] * sums[None, :]) * scale[:, None]
        acc += tl.load(bias + latents, mask=known, other=0.0)[None, :]
        if RELU:
            acc = tl.where(acc < 0.0, 0.0, acc)
        tl.store(
            pre + r[:, None].to(tl.int64) * n + latents[None, :],
            acc,
            mask=live[:, None] & known[None, :],
        )
        keys = tl.where(known[None, :], order_key(acc), NOTHING)
        largest = tl.max(tl.reshape(keys, (BM, BN // G, G)), 2)
        group = tile * (BN // G) + tl.arange(0, BN // G)
        tl.store(
            group_keys + r[:, None].to(tl.int64) * groups + group[None, :],
            largest,
            mask=live[:, None] & (group < groups)[None, :],
        )


@triton.jit(do_not_specialize=["first_row"])
def _select(  # type: ignore[no-untyped-def]
    pre,
    group_keys,
    group_list,
    count,
    top_acts,
    top_indices,
    first_row,
    n,
    groups,
    k,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    KP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP and not INTERPRETED:
        tl.extra.cuda.gdc_wait()  # for the pre-activations
    r = tl.program_id(0)
    if first_row + r < tl.load(count):
        group = tl.arange(0, GROUPS)
        keys = tl.load(
            group_keys + r.to(tl.int64) * groups + group, mask=group < groups, other=NOTHING
        )
        wanted = tl.minimum(k, groups)
        least, most = key_range(keys)
        chosen, place, kth = chosen_places(keys, wanted, least, most)
        tl.store(group_list + r * KP + place, group, mask=chosen)
        # The list is read by other threads than those that wrote it.
        tl.debug_barrier()
        slot = tl.arange(0, KP)
        best = tl.load(group_list + r * KP + slot, mask=slot < wanted, other=0)
        latents = best[:, None] * G + tl.arange(0, G)[None, :]
        here = (slot < wanted)[:, None] & (latents < n)
        acts = tl.load(pre + r.to(tl.int64) * n + latents, mask=here, other=0.0)
        acts = tl.reshape(acts, (KP * G,))
        latents = tl.reshape(latents, (KP * G,))
        keys = tl.where(tl.reshape(here, (KP * G,)), order_key(acts), NOTHING)
        # The k best groups have k keys that are no smaller than the least of their maxima.
        least = tl.where(wanted < k, NOTHING + 1, kth)
        chosen, place, _ = chosen_places(keys, k, least, most)
        out = (first_row + r).to(tl.int64) * k + place
        tl.store(top_acts + out, acts, mask=chosen)
        tl.store(top_indices + out, latents, mask=chosen)


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    acts, indices, count, top_acts, top_indices, offers, k, OFFERS: tl.constexpr
):
    r = tl.program_id(0)
    if r < tl.load(count):
        at = tl.arange(0, OFFERS)
        here = at < offers
        source = r.to(tl.int64) * offers + at
        value = tl.load(acts + source, mask=here, other=0.0)
        index = tl.load(indices + source, mask=here, other=-1)
        keys = tl.where(here & (index >= 0), order_key(value), NOTHING)
        least, most = key_range(keys)
        chosen, place, _ = chosen_places(keys, k, least, most)
        out = r.to(tl.int64) * k + place
        tl.store(top_acts + out, value, mask=chosen)
        tl.store(top_indices + out, index, mask=chosen)


@dataclass(frozen=True)
class EncodeScratch:
    """Buffers of `topk_encode`, made once.

    Attributes:
        pre: pre-activations of one chunk of rows, [chunk, n] fp32.
        group_keys: the largest of each group of latents, as an ordered integer, [chunk, groups].
        group_list: groups that hold a row's k best, [chunk, k padded].
    """

    pre: Tensor
    group_keys: Tensor
    group_list: Tensor

    # Of `pre`, unless one block of rows needs more.
    BYTES = 256 * 2**20

    @classmethod
    def allocate(cls, max_rows: int, n: int, k: int, device: torch.device) -> "EncodeScratch":
        """For batches of up to `max_rows` rows: at most BYTES, or 128 rows, whichever is more."""
        chunk = min(max_rows, max(128, cls.BYTES // (4 * n) // 128 * 128))
        groups = triton.cdiv(n, group_size(n, k))
        return cls(
            torch.empty(chunk, n, device=device),
            torch.empty(chunk, groups, dtype=torch.int32, device=device),
            torch.empty(chunk, triton.next_power_of_2(k), dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class InputNorm:
    """What becomes of z before the product: (z − shift)·scale per row (`reference.input_norm`).

    Attributes:
        row_scale, row_shift: of each active row, two [M] fp32.
        W_sum: Σ_j W_enc[:, j], [n] fp32.
    """

    row_scale: Tensor
    row_shift: Tensor
    W_sum: Tensor


def topk_encode(
    z: Tensor,
    rows: Tensor,
    count: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    k: int,
    top_acts: Tensor,
    top_indices: Tensor,
    scratch: EncodeScratch,
    relu: bool = True,
    norm: InputNorm | None = None,
    config: EncodeConfig | None = None,
) -> None:
    """Eq. 7 for the active rows, into buffers that are there.

    The set is that of a stable sort of fp32-accumulated pre-activations, in ascending order of
    index (`reference.topk_encode` has the same set in order of value).

    Args:
        z: residual stream, [M, d], rows contiguous.
        rows, count: active rows [≥ count] int32 and their number [1] int32, on the device.
        W_enc: [n, d]; products are exact in fp32, whatever the two dtypes.
        bias: [n] fp32, b_dec folded in (`reference.folded_bias`).
        top_acts, top_indices: [M, k] fp32 and int32, written for the first `count` rows.
        relu: before the selection (sparsify's order).
        norm: see `InputNorm`; None leaves z as it is.
        config: launch configuration; by shape when None.
    """
    n, d = W_enc.shape
    chunk = len(scratch.pre)
    groups = scratch.group_keys.shape[1]
    G = group_size(n, k)
    assert (
        scratch.group_list.shape[1] == triton.next_power_of_2(k)
        and z.stride(1) == 1
        and W_enc.is_contiguous()
    )
    wide = z.dtype != W_enc.dtype or W_enc.dtype == torch.float32
    chosen = config or encode_config(min(len(top_acts), chunk), wide)
    BM, BN, BK = chosen.rows, chosen.latents, chosen.depth
    scale, shift, W_sum = (
        (norm.row_scale, norm.row_shift, norm.W_sum) if norm else (bias, bias, bias)
    )
    for first in range(0, len(top_acts), chunk):
        size = min(chunk, len(top_acts) - first)
        _encode[(triton.cdiv(size, BM) * triton.cdiv(n, BN),)](
            *(z, rows, count, W_enc, bias, scale, shift, W_sum, scratch.pre, scratch.group_keys),
            *(first, size, n, groups, d, z.stride(0)),
            RELU=relu,
            NORM=norm is not None,
            WIDE=wide,
            G=G,
            BM=BM,
            BN=BN,
            BK=BK,
            EVEN_K=d % BK == 0,
            OVERLAP=chosen.overlap,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
        )
        launch_select(scratch, count, top_acts, top_indices, first, size, n, k, chosen.overlap)


def launch_select(
    scratch: EncodeScratch,
    count: Tensor,
    top_acts: Tensor,
    top_indices: Tensor,
    first: int,
    size: int,
    n: int,
    k: int,
    overlap: bool = False,
) -> None:
    """The k largest of rows first to first + size from what `scratch` holds of them.

    Args:
        count, top_acts, top_indices: as in `topk_encode`.
        overlap: the kernel before this one has asked for it to be set up.
    """
    _select[(size,)](
        *(scratch.pre, scratch.group_keys, scratch.group_list, count),
        *(top_acts, top_indices, first, n, scratch.group_keys.shape[1], k),
        G=group_size(n, k),
        GROUPS=triton.next_power_of_2(scratch.group_keys.shape[1]),
        KP=triton.next_power_of_2(k),
        OVERLAP=overlap,
        num_warps=SELECT_WARPS,
        **({"launch_pdl": True} if overlap else {}),  # an option of NVIDIA's backend alone
    )


def merge_candidates(
    acts: Tensor, indices: Tensor, count: Tensor, k: int, top_acts: Tensor, top_indices: Tensor
) -> None:
    """The k best of what the shards of a tensor-parallel encoder offer.

    Args:
        acts: [M, offers] fp32, the shards side by side in order of their latents.
        indices: [M, offers] int32 into the whole SAE, ascending; −1 where a shard has no more.
        count, top_acts, top_indices: as in `topk_encode`.
    """
    offers = acts.shape[1]
    _merge[(len(acts),)](
        *(acts, indices, count, top_acts, top_indices, offers, k),
        OFFERS=triton.next_power_of_2(offers),
        num_warps=8,
    )
