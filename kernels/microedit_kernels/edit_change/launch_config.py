"""Block sizes of the edit change's two kernels."""

from dataclasses import dataclass, replace

import torch

from microedit_kernels.dispatch import overlaps_launches
from microedit_kernels.launch_table import settings

MAX_ROW_BLOCK = 128
MIN_ROW_BLOCK = 16
MIN_BLOCK_D, MAX_BLOCK_D = 32, 512
MAX_D_SPLITS = 8


@dataclass(frozen=True)
class LaunchConfig:
    """How both products are cut; `GroupedSets` fixes the latents of a program.

    rows: tokens of a block, in both.
    acts_d: depth of a step of the first product; acts_splits: programs that share its d.
    delta_d: columns of a program of the second product; delta_latents: depth of its steps, a
        divisor of the sets' `step`.
    even: the products are cut as `even_tiles` and `even_parts` of `GroupedSets` say, the latter for
        a `delta_d` of 32; `acts_splits` is not used.
    ahead: latents of ΔW_edit, 32 columns wide, that a program of the first product asks the L2
        cache for; 0 before Hopper.
    overlap: a kernel is set up while the one before it runs; needs Hopper or later.
    """

    rows: int
    acts_d: int
    acts_splits: int
    acts_warps: int
    acts_stages: int
    delta_d: int
    delta_latents: int
    delta_warps: int
    delta_stages: int
    even: bool = False
    ahead: int = 0
    overlap: bool = False

    def __post_init__(self) -> None:
        if not MIN_ROW_BLOCK <= self.rows <= MAX_ROW_BLOCK:
            raise ValueError(f"a block of {self.rows} rows is not in 16 to {MAX_ROW_BLOCK}")
        if not MIN_BLOCK_D <= self.delta_d <= MAX_BLOCK_D:
            raise ValueError(f"delta_d is not in {MIN_BLOCK_D} to {MAX_BLOCK_D}")
        if not 1 <= self.acts_splits <= MAX_D_SPLITS:
            raise ValueError(f"acts_splits is not in 1 to {MAX_D_SPLITS}")


def launch_config(
    rows: int, max_latents: int, d: int, element_size: int = 2, hopper: bool | None = None
) -> LaunchConfig:
    """The block sizes for at most `rows` active rows and sets of at most `max_latents`.

    Args:
        element_size: bytes of the widest of the stream, the weights and the activations between
            the products; 4 halves the steps, so that they fit the shared memory.
        hopper: for NVIDIA's Hopper and later; this machine's GPU decides when None.
    """
    config = LaunchConfig(**settings("edit_change", rows))
    if overlaps_launches() if hopper is None else hopper:
        config = replace(config, overlap=True)
    else:
        # Tensor cores that cannot read shared memory take operands from registers, and there is
        # less shared memory to hold steps ahead.
        config = replace(
            config,
            ahead=0,
            delta_d=min(config.delta_d, 64),
            acts_stages=min(config.acts_stages, 4),
            delta_stages=min(config.delta_stages, 4),
        )
    if max_latents * d < 1 << 20:
        config = replace(config, acts_splits=1)
    if torch.version.hip:
        # AMD has 64 KiB of shared memory: one step of a tile, while the next is on its way.
        config = replace(config, acts_stages=2, delta_stages=2)
    if element_size == 4:
        config = replace(
            config,
            acts_d=config.acts_d // 2,
            delta_d=min(config.delta_d, 64),
            delta_latents=config.delta_latents // 2,
        )
    return config
