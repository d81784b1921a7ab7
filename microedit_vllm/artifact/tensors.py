"""Reading safetensors that may be damaged or hostile."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from microedit_vllm.errors import MicroEditError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        MicroEditError: the file is missing, truncated, or not safetensors.
    """
    if not path.is_file():
        raise MicroEditError(f"{path} is missing")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise MicroEditError(f"{path} is damaged ({error}); make it again") from error


def expect(
    tensors: dict[str, Tensor], name: str, shape: tuple[int | None, ...], path: Path
) -> Tensor:
    """The named tensor, checked: present, of this shape (None: any size), free of NaN and inf.

    Raises:
        MicroEditError: naming file and tensor.
    """
    if name not in tensors:
        raise MicroEditError(f"{path}: tensor {name!r} is missing")
    tensor = tensors[name]
    fits = len(tensor.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = "×".join("any" if size is None else str(size) for size in shape)
        found = "×".join(map(str, tensor.shape))
        raise MicroEditError(f"{path}: tensor {name!r} is {found}, expected {wanted}")
    if tensor.is_floating_point() and not _is_finite(tensor):
        raise MicroEditError(f"{path}: tensor {name!r} holds NaN or infinite values")
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    # torch has no isfinite for some 8-bit floats.
    widened = tensor.float() if tensor.element_size() == 1 else tensor
    return bool(torch.isfinite(widened).all())


def expect_indices(tensors: dict[str, Tensor], name: str, below: int, path: Path) -> Tensor:
    """A checked list of row indices: int64, unique, in [0, below).

    Raises:
        MicroEditError: naming file and tensor.
    """
    indices = expect(tensors, name, (None,), path)
    if indices.dtype != torch.int64:
        raise MicroEditError(f"{path}: tensor {name!r} is {indices.dtype}, expected int64")
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= below):
        raise MicroEditError(f"{path}: tensor {name!r} has row indices outside 0…{below - 1}")
    if len(indices.unique()) != len(indices):
        raise MicroEditError(f"{path}: tensor {name!r} repeats row indices")
    return indices


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
