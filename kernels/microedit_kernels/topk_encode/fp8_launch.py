"""Launch configurations of the eight-bit filter by shape."""

from dataclasses import dataclass

from microedit_kernels.topk_encode.launch import EncodeConfig


@dataclass(frozen=True)
class Fp8Config:
    """The product's tile, and how exact values are computed.

    Attributes:
        tile: of the product of 8-bit weights.
        candidates, depth: latents that a program scores at a time, and columns of d; depth is at
            least 256 (`fp8_reference.rounding_error`).
        lanes: programs that share a row's candidates.
        warps: of those programs.
    """

    tile: EncodeConfig
    candidates: int = 4
    depth: int = 1024
    lanes: int = 32
    warps: int = 4


# Up to this many rows in a chunk: what to use.
_BY_ROWS = (
    (16, Fp8Config(EncodeConfig(16, 128, 128, 4, 4), lanes=64)),
    (64, Fp8Config(EncodeConfig(64, 128, 128, 4, 4))),
)
_MANY_ROWS = Fp8Config(EncodeConfig(128, 128, 128, 8, 3), lanes=16)
# There is no fast product of fp32: small tiles keep it in registers.
_FP32 = Fp8Config(EncodeConfig(16, 64, 32, 4, 2))


def fp8_config(rows: int, wide: bool) -> Fp8Config:
    """For a chunk of that many rows; `wide` multiplies in fp32."""
    if wide:
        return _FP32
    return next((config for most, config in _BY_ROWS if rows <= most), _MANY_ROWS)
