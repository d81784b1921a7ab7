"""Dispatch modes that forbid what a device could not do without stalling.

On the CPU nothing stalls, so that a host sync or an allocation would go unnoticed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# A value goes to the host, or decides a shape.
_READS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::equal",
    "aten::is_nonzero",
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}


class ForbiddenError(AssertionError):
    """An operation that the guarded region must not contain."""


class NoHostRead(TorchDispatchMode):
    """Forbids operations that read a tensor's values on the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name in _READS:
            raise ForbiddenError(f"{name} reads a value back")
        if name in _INDEXING and any(t.dtype == torch.bool for t in _tensors(args[1])):
            raise ForbiddenError(f"{name} by a mask: the shape depends on values")
        return func(*args, **(kwargs or {}))


class NoAllocation(NoHostRead):
    """Forbids operations that return memory of their own, too."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = super().__torch_dispatch__(func, types, args, kwargs)
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        for tensor in _tensors(output):
            if tensor.untyped_storage().data_ptr() not in given:
                raise ForbiddenError(f"{func._schema.name} allocates")
        return output


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
