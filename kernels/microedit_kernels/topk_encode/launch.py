"""Launch configurations of the Top-k encode by shape (made by `benchmarks/tune_kernels.py`)."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class EncodeConfig:
    """A tile of the product: rows × latents, `depth` of d at a time."""

    rows: int
    latents: int
    depth: int
    warps: int
    stages: int


# Up to this many rows in a chunk: the tile to use.
_BY_ROWS = (
    (16, EncodeConfig(16, 128, 128, 4, 4)),
    (64, EncodeConfig(64, 128, 64, 4, 4)),
    (128, EncodeConfig(128, 128, 64, 8, 4)),
)
_MANY_ROWS = EncodeConfig(128, 256, 64, 8, 3)
# There is no fast product of fp32: small tiles keep it in registers.
_FP32 = EncodeConfig(32, 64, 32, 4, 2)
# AMD has 64 KiB of shared memory: one step of a tile, while the next is on its way.
_AMD_STAGES = 2


def encode_config(rows: int, wide: bool) -> EncodeConfig:
    """The tile for a chunk of that many rows; `wide` multiplies in fp32."""
    if wide:
        return _FP32
    config = next((config for most, config in _BY_ROWS if rows <= most), _MANY_ROWS)
    return replace(config, stages=_AMD_STAGES) if torch.version.hip else config


def group_size(n: int, k: int) -> int:
    """Latents per group: about as many group maxima as values of the k best groups, √(n / k)."""
    return 32 if n >= 512 * k else 16
