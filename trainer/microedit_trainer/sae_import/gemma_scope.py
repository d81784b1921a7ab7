"""Gemma Scope's folder: `params.npz`, below folders that name layer and place.

Source: the Gemma Scope tutorial: h = ReLU(pre) where pre = z·W_enc + b_enc exceeds the threshold;
b_dec is added after, not subtracted before.
"""

import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from microedit_trainer.sae_import.published import PublishedSae
from microedit_vllm.artifact.tensors import expect
from microedit_vllm.errors import MicroEditError

WEIGHTS = "params.npz"
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_LAYER = re.compile(r"layer_(\d{1,4})")
_OTHER_PLACE = re.compile(r"gemma-scope-.*-(mlp|att|transcoders)(-.*)?$")


def read(folder: Path) -> PublishedSae:
    """Read a folder.

    Raises:
        MicroEditError: damaged, or not of the residual stream as far as its path says.
    """
    parts = folder.absolute().parts
    other = [p for p in parts if _OTHER_PLACE.search(p)]
    other += [p for p in parts[-3:] if p == "embedding"]
    if other:
        raise MicroEditError(
            f"{folder} is not of the residual stream behind a decoder layer ({other[-1]}); "
            "take one of the -res repositories"
        )
    path = folder / WEIGHTS
    tensors = _read_npz(path)
    W_enc = expect(tensors, "W_enc", (None, None), path)
    d, n = W_enc.shape
    layers = [found[1] for part in parts if (found := _LAYER.fullmatch(part))]
    return PublishedSae(
        W_enc=W_enc.T.contiguous(),
        b_enc=expect(tensors, "b_enc", (n,), path),
        W_dec=expect(tensors, "W_dec", (n, d), path),
        b_dec=expect(tensors, "b_dec", (d,), path),
        activation="jumprelu",
        format="Gemma Scope",
        threshold=expect(tensors, "threshold", (n,), path),
        subtracts_b_dec=False,
        layer=int(layers[-1]) if layers else None,
    )


def _read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of a file, in fp32; nothing in it is executed.

    Raises:
        MicroEditError: missing, damaged, or with pickled objects.
    """
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise ValueError("it holds one bare array")
        with found:
            arrays = {name: np.asarray(found[name]) for name in _NAMES if name in found.files}
    except FileNotFoundError as error:
        raise MicroEditError(f"{path} is missing") from error
    except (EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MicroEditError(
            f"{path} is damaged or no plain npz ({reason}); download it again"
        ) from error
    for name, array in arrays.items():
        if not np.issubdtype(array.dtype, np.floating):
            raise MicroEditError(f"{path}: array {name!r} is of {array.dtype}, expected floats")
    with np.errstate(over="ignore"):  # what overflows is refused as infinite
        return {name: torch.from_numpy(a.astype(np.float32)) for name, a in arrays.items()}
