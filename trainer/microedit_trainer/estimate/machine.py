"""What this machine has: free memory, and how fast it multiplies and moves."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_MEASURED_SECONDS = 0.05
# Of what a large product reaches, for what lies between the products.
_EFFICIENCY = 0.5


@dataclass(frozen=True)
class Machine:
    """The device that a run computes on.

    Attributes:
        device: "cuda" or "cpu".
        free: bytes that can be had on it.
        free_host: bytes that can be had in the CPU's memory, which `device` may be.
    """

    device: str
    free: int
    free_host: int

    @classmethod
    def here(cls) -> "Machine":
        import psutil

        host = int(psutil.virtual_memory().available)
        if torch.cuda.is_available():
            return cls("cuda", int(torch.cuda.mem_get_info()[0]), host)
        return cls("cpu", host, host)

    def flops(self, dtype: torch.dtype, width: int, tokens: int = 256) -> float:
        """Floating-point operations per second to count on, from a short product.

        Args:
            width: of the residual stream. tokens: together in a batch; few leave a device idle.
        """
        x = torch.randn(min(tokens, 256), width, device=self.device).to(dtype)
        weight = torch.randn(4 * width, width, device=self.device).to(dtype)
        seconds = self._seconds(lambda: torch.nn.functional.linear(x, weight))
        return _EFFICIENCY * 2 * x.numel() * len(weight) / seconds

    def bytes_per_second(self) -> float:
        """How fast memory is read and written, from a short copy."""
        source = torch.zeros(1 << 24, device=self.device)
        target = torch.empty_like(source)
        seconds = self._seconds(lambda: target.copy_(source))
        return _EFFICIENCY * 2 * source.nbytes / seconds

    def _seconds(self, work: Callable[[], object]) -> float:
        """Of one call, the fastest of as many as fit into a moment."""
        best, end = float("inf"), time.perf_counter() + _MEASURED_SECONDS
        work()
        while True:
            started = time.perf_counter()
            work()
            if self.device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
            if time.perf_counter() > end:
                return best
