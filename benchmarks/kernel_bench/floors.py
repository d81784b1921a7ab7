"""What this card can do at best: reads per second, products per second, and a plain read."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.kernel_bench.timing import Launch, Timer, rotation

# Block and warps of the read: the fastest counts at each size.
_READS = ((2048, 4), (4096, 4), (8192, 8), (16_384, 8))


@dataclass(frozen=True)
class Work:
    """What a launch has to do at the least.

    Attributes:
        bytes: read from or written to memory, each weight row once per use.
        flops: of matrix products.
        distinct_bytes: each weight row once per launch, where it is used more than once.
    """

    bytes: int
    flops: int = 0
    distinct_bytes: int | None = None


@dataclass(frozen=True)
class Rates:
    """Bytes per second of a streaming read, of a copy (read + written), and flops per second."""

    read: float
    copy: float
    matmul: float

    def floor(self, work: Work) -> tuple[float, str]:
        """Seconds that `work` takes at the least, and what bounds it: memory or arithmetic."""
        memory, arithmetic = work.bytes / self.read, work.flops / self.matmul
        return (memory, "memory") if memory >= arithmetic else (arithmetic, "arithmetic")


@triton.jit
def _read(source, sums, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + tl.program_id(0), tl.sum(tl.load(source + at, mask=at < length, other=0)))


def read(source: Tensor, sums: Tensor, block: int, warps: int) -> None:
    """Sum of each `block` numbers of `source` [N] int32 into `sums` [≥ ⌈N / block⌉] int32."""
    grid = (math.ceil(len(source) / block),)
    _read[grid](source, sums, len(source), BLOCK=block, num_warps=warps)


class Floors:
    """Measures them, on a pool of memory that is freed with it.

    Args:
        pool_bytes: size of the pool: reads of more are extrapolated from the whole pool's.
        matmul_size: of the square product.
    """

    def __init__(
        self, timer: Timer, device: torch.device, cache: int, pool_bytes: int, matmul_size: int
    ) -> None:
        self._timer, self._cache = timer, cache
        self._pool = torch.ones(pool_bytes // 4, dtype=torch.int32, device=device)
        self._sums = torch.empty(
            math.ceil(len(self._pool) / _READS[0][0]), dtype=torch.int32, device=device
        )
        self._known: dict[int, float] = {}
        self._check()
        half = self._pool.view(2, -1)
        copy = timer([lambda: half[0].copy_(half[1])])
        square = torch.randn(matmul_size, matmul_size, device=device).bfloat16()
        product = timer([lambda: square @ square])
        self.rates = Rates(
            pool_bytes / self._stream(pool_bytes),
            pool_bytes / copy,
            2 * matmul_size**3 / product,
        )

    def streamed(self, size: int) -> float:
        """Seconds of a kernel that reads `size` contiguous bytes and nothing else."""
        if size > self._pool.nbytes:
            return size / self.rates.read
        if size not in self._known:
            self._known[size] = self._stream(size)
        return self._known[size]

    def described(self) -> dict[str, float]:
        return asdict(self.rates)

    def _stream(self, size: int) -> float:
        return min(self._timer(list(self._reads(size, *how))) for how in _READS)

    def _reads(self, size: int, block: int, warps: int) -> Iterator[Launch]:
        # Whole 64-byte lines, so that every read starts aligned.
        numbers = max(16, math.ceil(size / 64) * 16)
        turns = min(rotation(size, self._cache), max(1, len(self._pool) // numbers))
        for turn in range(turns):
            part = self._pool[turn * numbers : (turn + 1) * numbers]
            yield partial(read, part, self._sums, block, warps)

    def _check(self) -> None:
        part = self._pool[: 3 * _READS[-1][0] - 16]
        for block, warps in _READS:
            read(part, self._sums, block, warps)
            if self._sums[: math.ceil(len(part) / block)].sum() != len(part):
                raise RuntimeError("the streaming read, which every floor rests on, reads wrong")
