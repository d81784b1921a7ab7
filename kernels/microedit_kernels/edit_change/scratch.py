"""Buffers that the edit change's kernels need, made once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from microedit_kernels.edit_change.grouped_sets import GroupedSets
from microedit_kernels.edit_change.launch_config import (
    MAX_D_SPLITS,
    MAX_ROW_BLOCK,
    MIN_BLOCK_D,
    MIN_ROW_BLOCK,
)

MAX_ROWS_PER_LAUNCH = 256


@dataclass(frozen=True)
class EditChangeScratch:
    """Buffers between and within the two kernels, for so many rows at a time.

    acts: activations, [rows, latents], in bf16 where ΔW_edit is, else in fp32.
    pre_shares: shares of pre-activations, [splits of d, rows, latents] fp32.
    delta_shares: shares of δ, [parts of a set, rows, d] fp32.
    pre_arrived, delta_arrived: programs that have stored their share, int32; 0 between launches.
    """

    acts: Tensor
    pre_shares: Tensor
    delta_shares: Tensor
    pre_arrived: Tensor
    delta_arrived: Tensor

    @property
    def rows(self) -> int:
        """Active rows of one pair of launches; a larger batch takes several."""
        return self.delta_shares.shape[1]

    @classmethod
    def allocate(cls, max_rows: int, sets: GroupedSets) -> "EditChangeScratch":
        """For batches of up to `max_rows` rows with `sets`, or with smaller ones cut alike."""
        device = sets.W_enc.device
        launched = max(1, min(max_rows, MAX_ROWS_PER_LAUNCH))
        # A block of rows is read in full, beyond a launch's last row too.
        rows = launched + MAX_ROW_BLOCK
        width = -(-max(sets.max_latents, 1) // sets.step) * sets.step
        blocks = -(-launched // MIN_ROW_BLOCK)
        columns = -(-sets.d // MIN_BLOCK_D)

        def counters(*shape: int) -> Tensor:
            return torch.zeros(blocks, *shape, dtype=torch.int32, device=device)

        return cls(
            acts=torch.empty(rows, width, dtype=_acts_dtype(sets), device=device),
            pre_shares=torch.empty(MAX_D_SPLITS, rows, width, device=device),
            delta_shares=torch.empty(max(1, sets.max_shares), launched, sets.d, device=device),
            pre_arrived=counters(max(1, sets.max_tiles)),
            delta_arrived=counters(max(1, sets.max_parts), columns),
        )

    def check_fits(self, sets: GroupedSets) -> None:
        """Raises ValueError where `sets` need larger buffers, or other dtypes."""
        width, (shares, _, d) = self.acts.shape[1], self.delta_shares.shape
        if (
            sets.d != d
            or sets.max_latents > width
            or width % sets.step
            or sets.max_shares > shares
            or sets.max_tiles > self.pre_arrived.shape[1]
            or sets.max_parts > self.delta_arrived.shape[1]
            or self.acts.dtype != _acts_dtype(sets)
        ):
            raise ValueError("the edit sets don't fit a scratch that was made for smaller ones")


def _acts_dtype(sets: GroupedSets) -> torch.dtype:
    return torch.bfloat16 if sets.values.dtype == torch.bfloat16 else torch.float32
