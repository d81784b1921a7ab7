"""Launch configurations of the Top-k encode."""

from dataclasses import dataclass, replace

import torch

from microedit_kernels.dispatch import overlaps_launches
from microedit_kernels.launch_table import settings


@dataclass(frozen=True)
class EncodeConfig:
    """A tile of the product: rows × latents, `depth` of d at a time.

    overlap: the selection is set up while the product runs; needs Hopper or later.
    """

    rows: int
    latents: int
    depth: int
    warps: int
    stages: int
    overlap: bool = False


# There is no fast product of fp32: small tiles keep it in registers.
_FP32 = EncodeConfig(32, 64, 32, 4, 2)
# AMD has 64 KiB of shared memory: one step of a tile, while the next is on its way.
_AMD_STAGES = 2
SELECT_WARPS = 8


def encode_config(rows: int, wide: bool, hopper: bool | None = None) -> EncodeConfig:
    """The tile for a chunk of that many rows; `wide` multiplies in fp32.

    Args:
        hopper: for NVIDIA's Hopper and later; this machine's GPU decides when None.
    """
    config = _FP32 if wide else EncodeConfig(**settings("topk_encode", rows))
    overlap = overlaps_launches() if hopper is None else hopper
    config = replace(config, overlap=overlap)
    return replace(config, stages=_AMD_STAGES) if torch.version.hip else config


def group_size(n: int, k: int) -> int:
    """Latents per group: about as many group maxima as values of the k best groups, √(n / k)."""
    return 32 if n >= 512 * k else 16
