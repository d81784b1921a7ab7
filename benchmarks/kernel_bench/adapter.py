"""What every operator's benchmark has: inputs, a launch, a check, its work, its rival in torch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernel_bench.floors import Work
from benchmarks.kernel_bench.shapes import SaeShape
from benchmarks.kernel_bench.timing import Launch
from microedit_kernels.row_plan import reference

# Some rows of a batch are checked, beginning and end among them: an exact product of all is slow.
_CHECKED = 16
_SHARES = (1.0, 0.6, 0.0)


class Wrong(Exception):
    """A kernel's result is not what its definition says."""


def require(good: bool | Tensor, complaint: str) -> None:
    """Raises `Wrong` with `complaint` unless `good`."""
    if not good:
        raise Wrong(complaint)


@dataclass(frozen=True)
class SaeWeights:
    """W_enc, W_dec [n, d] bf16; b_enc [n], b_dec [d] fp32."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor


class Inputs:
    """Random tensors of a seed, and the weights that cases share.

    Args:
        cache: bytes of the device's L2 cache.
    """

    def __init__(self, device: torch.device, cache: int, seed: int) -> None:
        self.device, self.cache = device, cache
        self.draw = torch.Generator(device).manual_seed(seed)
        self._weights: dict[SaeShape, SaeWeights] = {}

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        empty = torch.empty(*shape, device=self.device, dtype=dtype)
        return empty.normal_(0, std, generator=self.draw)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device, generator=self.draw)

    def weights(self, sae: SaeShape) -> SaeWeights:
        if sae not in self._weights:
            std = sae.d**-0.5
            self._weights[sae] = SaeWeights(
                self.normal(sae.n, sae.d, std=std),
                self.normal(sae.n, std=0.1, dtype=torch.float),
                self.normal(sae.n, sae.d, std=std),
                self.normal(sae.d, std=0.1, dtype=torch.float),
            )
        return self._weights[sae]


class Activity:
    """Which rows of a batch work, and for which key: the row plan that kernels are given.

    Attributes:
        keys: [M] int32, −1 for a row that is off.
        rows, offsets, count: as `row_plan.kernel.group_rows` writes them.
    """

    def __init__(self, inputs: Inputs, M: int, num_keys: int = 1) -> None:
        self._inputs, self.num_keys = inputs, num_keys
        self.keys = torch.zeros(M, dtype=torch.int32, device=inputs.device)
        self.rows = torch.zeros_like(self.keys)
        self.offsets = torch.zeros(num_keys + 1, dtype=torch.int32, device=inputs.device)
        self.count = self.offsets[-1:]
        self.draw_keys(1.0)

    def draw_keys(self, share: float) -> None:
        """A random key for a random `share` of the rows: at least one of them, unless it is 0."""
        M = len(self.keys)
        active = 0 if share == 0 else max(1, round(share * M))
        chosen = self._inputs.uniform(M).argsort().argsort() < active
        keys = (self._inputs.uniform(M) * self.num_keys).int()
        self.keys.copy_(keys.where(chosen, -1))
        self._plan()

    def _plan(self) -> None:
        rows, offsets = reference.group_rows(self.keys, self.num_keys)
        self.rows.zero_()[: len(rows)] = rows
        self.offsets.copy_(offsets)

    @property
    def active(self) -> int:
        """Read back from the device."""
        return int(self.count)

    def sample(self) -> tuple[Tensor, Tensor]:
        """Compact indices of rows to check, and the rows themselves; int64."""
        steps = min(_CHECKED, self.active)
        compact = torch.linspace(0, self.active - 1, steps, device=self.keys.device)
        compact = compact.round().long()
        return compact, self.rows[compact].long()


class Adapter(ABC):
    """One operator at one shape.

    Attributes:
        activity: the row plan of its launches; all rows are active at first.
        variants: how many inputs there are to take turns at.
    """

    activity: Activity
    variants: int

    @abstractmethod
    def launch(self, variant: int) -> None:
        """One launch, which allocates and reads back nothing."""

    @abstractmethod
    def check_active(self) -> None:
        """Launch with the activity as it is; raises `Wrong`."""

    @abstractmethod
    def work(self) -> Work:
        """Of a launch with all rows active."""

    @abstractmethod
    def baseline(self, variant: int) -> Launch | None:
        """The same in plain torch with all rows active, as one would write it for speed."""

    def check(self) -> None:
        """Check all, some and no active rows.

        Raises:
            Wrong: with what is wrong.
        """
        for share in _SHARES:
            self.activity.draw_keys(share)
            self.check_active()
        self.activity.draw_keys(1.0)
