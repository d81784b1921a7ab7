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
from microedit_kernels.topk_encode.kernel import EncodeScratch, launch_select, topk_encode
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
            capacity: candidates of a row above which it falls back, at most 8,192. Each costs a
                row of W_enc, so more than n / M are not worth it.
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
    norms, codes = scratch.norms, encoder.codes
    # Not every GPU has fp8, and the kernel needs none. The interpreter reads it.
    e4m3 = codes.dtype == torch.float8_e4m3fn and codes.is_cuda
    _approximate[(triton.cdiv(size, tile.rows) * triton.cdiv(n, tile.latents),)](
        *(z, rows, count, codes.view(torch.int8) if e4m3 else codes, encoder.scale),
        *(encoder.filter_bias, encoder.error, encoder.rounding, norms, pre, group_keys),
        *(scratch.group_upper, first, size, norms.shape[1], n, group_keys.shape[1], d, z.stride(0)),
        E4M3=e4m3,
        G=group_size(n, k),
        BM=tile.rows,
        BN=tile.latents,
        BK=tile.depth,
        EVEN_K=d % tile.depth == 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@dataclass(frozen=True)
class _Call:
    """The steps behind the product, for `size` active rows from `first` on."""

    z: Tensor
    rows: Tensor
    count: Tensor
    encoder: Fp8Encoder
    k: int
    top_acts: Tensor
    top_indices: Tensor
    scratch: Fp8Scratch
    relu: bool
    config: Fp8Config

    @property
    def group(self) -> int:
        return group_size(len(self.encoder.W_enc), self.k)

    def select_first(self, first: int, size: int) -> None:
        launch_select(
            *(self.scratch.encode, self.count, self.top_acts, self.top_indices),
            *(first, size, len(self.encoder.W_enc), self.k),
        )

    def rescore(self, first: int, size: int, of_first: bool) -> None:
        n, d = self.encoder.W_enc.shape
        scratch, config = self.scratch, self.config
        segments, capacity = scratch.counts.shape[1], scratch.acts.shape[1]
        _rescore[(size * config.lanes,)](
            *(self.z, self.rows, self.count, self.encoder.W_enc, self.encoder.bias),
            *(self.top_acts, self.top_indices, scratch.encode.pre, scratch.counts),
            *(scratch.acts, scratch.indices, first, n, d, self.k, segments, capacity),
            *(self.z.stride(0), config.lanes),
            RELU=self.relu,
            FIRST=of_first,
            SEGMENT=scratch.segment,
            SEGMENTS=triton.next_power_of_2(segments),
            KP=triton.next_power_of_2(self.k),
            BC=config.candidates,
            BK=config.depth,
            num_warps=config.warps,
        )

    def collect(self, first: int, size: int) -> None:
        scratch, encoder = self.scratch, self.encoder
        groups = scratch.group_upper.shape[1]
        segments, capacity = scratch.counts.shape[1], scratch.acts.shape[1]
        _collect[(size * segments,)](
            *(scratch.encode.pre, scratch.group_upper, self.count, encoder.error),
            *(encoder.rounding, scratch.norms, self.top_acts, scratch.counts, first),
            *(scratch.norms.shape[1], len(encoder.W_enc), groups, self.k, segments, capacity),
            RELU=self.relu,
            G=self.group,
            SEGMENT=scratch.segment,
            KP=triton.next_power_of_2(self.k),
            num_warps=8,
        )

    def choose(self, first: int, size: int) -> None:
        scratch = self.scratch
        segments, capacity = scratch.counts.shape[1], scratch.acts.shape[1]
        _choose[(size,)](
            *(scratch.acts, scratch.indices, scratch.counts, self.count, self.top_acts),
            *(self.top_indices, scratch.fallen, first, self.k, segments, capacity),
            SEGMENTS=triton.next_power_of_2(segments),
            CAPACITY=triton.next_power_of_2(capacity),
            num_warps=8,
        )

    def fall_back(self) -> None:
        """The plain encode of the rows that the filter proved too little of."""
        M, scratch = len(self.top_acts), self.scratch
        number = scratch.offsets[1:]
        group_rows(scratch.fallen[:M], scratch.fallen_rows, scratch.offsets)
        _fallen_rows[(triton.cdiv(M, _BLOCK),)](
            *(self.rows, scratch.fallen_rows, number, self.count, scratch.z_rows),
            *(scratch.report, M),
            BLOCK=_BLOCK,
            num_warps=4,
        )
        spare = (scratch.spare_acts[:M], scratch.spare_indices[:M])
        topk_encode(
            *(self.z, scratch.z_rows, number, self.encoder.W_enc, self.encoder.bias, self.k),
            *(*spare, scratch.encode),
            relu=self.relu,
        )
        _return_rows[(M,)](
            *(*spare, scratch.fallen_rows, number, self.top_acts, self.top_indices, self.k),
            KP=triton.next_power_of_2(self.k),
            num_warps=4,
        )


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
    assert z.stride(1) == 1 and encoder.codes.is_contiguous() and encoder.W_enc.is_contiguous()
    assert len(scratch.fallen) >= len(top_acts) and scratch.spare_acts.shape[1] == k
    M, chunk = len(top_acts), len(scratch.acts)
    wide = z.dtype != encoder.W_enc.dtype or z.dtype == torch.float32
    chosen = config or fp8_config(min(M, chunk), wide)
    call = _Call(z, rows, count, encoder, k, top_acts, top_indices, scratch, relu, chosen)
    norms = scratch.norms
    _row_norms[(M,)](
        *(z, rows, count, encoder.center, norms, norms.shape[1], z.shape[1], z.stride(0)),
        BK=1024,
        num_warps=4,
    )
    for first in range(0, M, chunk):
        size = min(chunk, M - first)
        approximate(z, rows, count, encoder, k, scratch, first, size, chosen.tile)
        call.select_first(first, size)
        call.rescore(first, size, of_first=True)
        call.collect(first, size)
        call.rescore(first, size, of_first=False)
        call.choose(first, size)
    call.fall_back()
