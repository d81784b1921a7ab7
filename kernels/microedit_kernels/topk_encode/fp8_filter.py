"""Top-k encode through an eight-bit filter: a mode of its own, which reads half of the weights.

The result is what scoring every latent exactly would choose (`fp8_reference.candidates`), or the
plain encode's where the filter proves too little. How often that was is counted on the device.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from microedit_kernels.row_plan.kernel import group_rows
from microedit_kernels.topk_encode.fp8_kernel import (
    _approximate,
    _choose,
    _collect,
    _fallen_rows,
    _rescore,
    _return_rows,
    _row_norms,
)
from microedit_kernels.topk_encode.fp8_launch import Fp8Config, fp8_config
from microedit_kernels.topk_encode.fp8_reference import (
    likely_error,
    proven_error,
    quantisation_error,
    quantise,
    rounding_error,
)
from microedit_kernels.topk_encode.kernel import EncodeScratch, _select, topk_encode
from microedit_kernels.topk_encode.launch import EncodeConfig, group_size

_BLOCK = 256
# Rows of W_enc that are quantised at a time, in fp64.
_AT_A_TIME = 4096


@dataclass(frozen=True)
class Fp8Encoder:
    """An encoder with its filter.

    Attributes:
        W_enc: [n, d]; bias: [n] fp32, b_dec folded in (`reference.folded_bias`).
        codes, scale: W_enc in 8 bits, [n, d] and [n] fp32.
        filter_bias: the bias of the filter's product, [n] fp32.
        error: what |e_i·(z − center)| can be, in units of ‖z − center‖, [n] fp32.
        rounding: what fp32 sums can miss, in units of ‖z‖, [n] fp32.
        center: [d] fp32.
    """

    W_enc: Tensor
    bias: Tensor
    codes: Tensor
    scale: Tensor
    filter_bias: Tensor
    error: Tensor
    rounding: Tensor
    center: Tensor

    @classmethod
    def quantise(
        cls,
        W_enc: Tensor,
        bias: Tensor,
        center: Tensor | None = None,
        codes: torch.dtype = torch.float8_e4m3fn,
        chance: float | None = None,
        seed: int = 0,
    ) -> "Fp8Encoder":
        """Quantise once, at load.

        Args:
            center: a point near the mean of z, such as b_dec, [d]: the error counts from there.
            codes: float8_e4m3fn or int8.
            chance: None for a bound that holds for every z; else int8 is rounded at random, and a
                row's bounds fail with at most this probability (`fp8_reference.likely_error`).
            seed: of that rounding.

        Raises:
            ValueError: `chance` with other codes than int8.
        """
        n, d = W_enc.shape
        origin = torch.zeros(d, device=W_enc.device) if center is None else center.float()
        generator = None
        if chance is not None:
            generator = torch.Generator(W_enc.device).manual_seed(seed)

        def floats() -> Tensor:
            return torch.empty(n, device=W_enc.device)

        eight_bits = torch.empty(n, d, dtype=codes, device=W_enc.device)
        made = cls(W_enc, bias, eight_bits, floats(), floats(), floats(), floats(), origin)
        for first in range(0, n, _AT_A_TIME):
            part = slice(first, first + _AT_A_TIME)
            W = W_enc[part]
            eight, scale = quantise(W, codes, generator)
            error = quantisation_error(W, eight, scale)
            made.codes[part] = eight
            made.scale[part] = scale
            made.filter_bias[part] = (bias[part].double() + error @ origin.double()).float()
            made.error[part] = (
                proven_error(error) if chance is None else likely_error(scale, n, chance)
            )
            made.rounding[part] = rounding_error(W, eight, scale)
        return made


@dataclass(frozen=True)
class Fp8Scratch:
    """Buffers of `fp8_topk_encode`, made once.

    Attributes:
        encode: of the product, and of the plain encode for rows that fall back.
        group_upper: the highest bound of each group of latents, [chunk, groups] fp32.
        counts: listed latents of each segment of the latents, [chunk, segments] int32.
        acts, indices: the listed latents of a row, [chunk, capacity] fp32 and int32.
        norms: ‖z − center‖ and ‖z‖ of each active row, [2, M] fp32.
        fallen, fallen_rows, offsets, z_rows: which rows fall back, [M], [M], [2], [M] int32.
        spare_acts, spare_indices: their results, [M, k].
        report: rows encoded and rows that fell back since it was last set to 0, [2] int64.
        segment: latents per segment.
    """

    encode: EncodeScratch
    group_upper: Tensor
    counts: Tensor
    acts: Tensor
    indices: Tensor
    norms: Tensor
    fallen: Tensor
    fallen_rows: Tensor
    offsets: Tensor
    z_rows: Tensor
    spare_acts: Tensor
    spare_indices: Tensor
    report: Tensor
    segment: int

    @classmethod
    def allocate(
        cls,
        max_rows: int,
        n: int,
        k: int,
        device: torch.device,
        capacity: int = 4096,
        segment: int = 8192,
    ) -> "Fp8Scratch":
        """For batches of up to `max_rows` rows.

        Args:
            capacity: candidates of a row above which it falls back, at most 8,192; at least k.
            segment: a power of two.
        """
        encode = EncodeScratch.allocate(max_rows, n, k, device)
        chunk, groups = encode.group_keys.shape
        capacity = max(k, min(capacity, n))

        def ints(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(
            encode,
            torch.empty(chunk, groups, device=device),
            ints(chunk, triton.cdiv(n, segment)),
            torch.empty(chunk, capacity, device=device),
            ints(chunk, capacity),
            torch.empty(2, max_rows, device=device),
            ints(max_rows),
            ints(max_rows),
            ints(2),
            ints(max_rows),
            torch.empty(max_rows, k, device=device),
            ints(max_rows, k),
            torch.zeros(2, dtype=torch.int64, device=device),
            segment,
        )

    def fallback_share(self) -> float:
        """Share of the encoded rows that fell back; waits for the device. NaN without rows."""
        encoded, fallen = self.report.tolist()
        return fallen / encoded if encoded else float("nan")


def fp8_topk_encode(
    z: Tensor,
    rows: Tensor,
    count: Tensor,
    encoder: Fp8Encoder,
    k: int,
    top_acts: Tensor,
    top_indices: Tensor,
    scratch: Fp8Scratch,
    relu: bool = True,
    config: Fp8Config | None = None,
) -> None:
    """`kernel.topk_encode` through the filter, into buffers that are there.

    The set is that of the exact pre-activations, added up in fp32. Rows that fall back are added up
    in another order than the others, so two latents that differ by less than fp32's rounding may
    rank differently there.

    Args:
        z, rows, count, k, top_acts, top_indices, relu: as in `kernel.topk_encode`.
        config: launch configuration; by shape when None.

    Raises:
        ValueError: on an AMD GPU, whose eight-bit floats are others.
    """
    if torch.version.hip:
        raise ValueError("the eight-bit filter is made for NVIDIA's GPUs")
    M = len(top_acts)
    chunk = len(scratch.acts)
    assert z.stride(1) == 1 and encoder.codes.is_contiguous() and encoder.W_enc.is_contiguous()
    assert len(scratch.fallen) >= M and scratch.spare_acts.shape[1] == k
    wide = z.dtype != encoder.W_enc.dtype or z.dtype == torch.float32
    chosen = config or fp8_config(min(M, chunk), wide)
    norms = scratch.norms
    _row_norms[(M,)](
        *(z, rows, count, encoder.center, norms, norms.shape[1], z.shape[1], z.stride(0)),
        BK=1024,
        num_warps=4,
    )
    for first in range(0, M, chunk):
        size = min(chunk, M - first)
        approximate(z, rows, count, encoder, k, scratch, first, size, chosen.tile)
        _best_candidates(
            z, rows, count, encoder, k, top_acts, top_indices, scratch, first, size, relu, chosen
        )
    fallen_count = scratch.offsets[1:]
    group_rows(scratch.fallen[:M], scratch.fallen_rows, scratch.offsets)
    _fallen_rows[(triton.cdiv(M, _BLOCK),)](
        *(rows, scratch.fallen_rows, fallen_count, count, scratch.z_rows, scratch.report, M),
        BLOCK=_BLOCK,
        num_warps=4,
    )
    spare = (scratch.spare_acts[:M], scratch.spare_indices[:M])
    topk_encode(
        *(z, scratch.z_rows, fallen_count, encoder.W_enc, encoder.bias, k, *spare),
        scratch.encode,
        relu=relu,
    )
    _return_rows[(M,)](
        *(*spare, scratch.fallen_rows, fallen_count, top_acts, top_indices, k),
        KP=triton.next_power_of_2(k),
        num_warps=4,
    )


def approximate(
    z: Tensor,
    rows: Tensor,
    count: Tensor,
    encoder: Fp8Encoder,
    k: int,
    scratch: Fp8Scratch,
    first: int,
    size: int,
    tile: EncodeConfig,
) -> None:
    """The filter's pre-activations of `size` active rows into `scratch.encode.pre`."""
    n, d = encoder.W_enc.shape
    pre, group_keys = scratch.encode.pre, scratch.encode.group_keys
    norms = scratch.norms
    _approximate[(triton.cdiv(size, tile.rows) * triton.cdiv(n, tile.latents),)](
        *(z, rows, count, encoder.codes, encoder.scale, encoder.filter_bias),
        *(encoder.error, encoder.rounding, norms, pre, group_keys, scratch.group_upper),
        *(first, size, norms.shape[1], n, group_keys.shape[1], d, z.stride(0)),
        G=group_size(n, k),
        BM=tile.rows,
        BN=tile.latents,
        BK=tile.depth,
        EVEN_K=d % tile.depth == 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _best_candidates(
    z: Tensor,
    rows: Tensor,
    count: Tensor,
    encoder: Fp8Encoder,
    k: int,
    top_acts: Tensor,
    top_indices: Tensor,
    scratch: Fp8Scratch,
    first: int,
    size: int,
    relu: bool,
    config: Fp8Config,
) -> None:
    n, d = encoder.W_enc.shape
    pre, group_keys = scratch.encode.pre, scratch.encode.group_keys
    groups = group_keys.shape[1]
    G = group_size(n, k)
    KP = triton.next_power_of_2(k)
    segments, capacity = scratch.counts.shape[1], scratch.acts.shape[1]
    norms = scratch.norms
    _select[(size,)](
        *(pre, group_keys, scratch.encode.group_list, count),
        *(top_acts, top_indices, first, n, groups, k),
        G=G,
        GROUPS=triton.next_power_of_2(groups),
        KP=KP,
        num_warps=8,
    )

    def rescore(of_first: bool) -> None:
        _rescore[(size * config.lanes,)](
            *(z, rows, count, encoder.W_enc, encoder.bias, top_acts, top_indices),
            *(pre, scratch.counts, scratch.acts, scratch.indices),
            *(first, n, d, k, segments, capacity, z.stride(0), config.lanes),
            RELU=relu,
            FIRST=of_first,
            SEGMENT=scratch.segment,
            SEGMENTS=triton.next_power_of_2(segments),
            KP=KP,
            BC=config.candidates,
            BK=config.depth,
            num_warps=config.warps,
        )

    rescore(of_first=True)
    _collect[(size * segments,)](
        *(pre, scratch.group_upper, count, encoder.error, encoder.rounding, norms, top_acts),
        *(scratch.counts, first, norms.shape[1], n, groups, k, segments, capacity),
        RELU=relu,
        G=G,
        SEGMENT=scratch.segment,
        KP=KP,
        num_warps=8,
    )
    rescore(of_first=False)
    _choose[(size,)](
        *(scratch.acts, scratch.indices, scratch.counts, count, top_acts, top_indices),
        *(scratch.fallen, first, k, segments, capacity),
        SEGMENTS=triton.next_power_of_2(segments),
        CAPACITY=triton.next_power_of_2(capacity),
        num_warps=8,
    )
