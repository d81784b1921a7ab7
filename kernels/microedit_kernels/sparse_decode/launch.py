"""Launch configurations of the sparse decode by shape (made by `benchmarks/tune_kernels.py`)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeConfig:
    """What a program gathers at a time: `latents` rows of `columns` columns."""

    columns: int
    latents: int
    warps: int
    stages: int


# Up to this many rows: the shape of a program.
_BY_ROWS = ((16, DecodeConfig(512, 16, 4, 3)),)
_MANY_ROWS = DecodeConfig(1024, 8, 4, 3)


def decode_config(rows: int) -> DecodeConfig:
    """The shape of a program for a batch of that many rows."""
    return next((config for most, config in _BY_ROWS if rows <= most), _MANY_ROWS)
