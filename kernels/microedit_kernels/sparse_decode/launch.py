"""Launch configurations of the sparse decode."""

from dataclasses import dataclass

from microedit_kernels.launch_table import settings


@dataclass(frozen=True)
class DecodeConfig:
    """What a program gathers at a time: `latents` rows of `columns` columns."""

    columns: int
    latents: int
    warps: int
    stages: int


def decode_config(rows: int) -> DecodeConfig:
    """The shape of a program for a batch of that many rows."""
    return DecodeConfig(**settings("sparse_decode", rows))
