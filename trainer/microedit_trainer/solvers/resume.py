"""What solvers keep on disk so that a stopped run goes on where it was."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from microedit_trainer.stored_residuals import StoredPrompt
from microedit_vllm.artifact.atomic import write_atomically

RUN = "run.json"


def open_work_folder(folder: Path, run: dict[str, Any]) -> bool:
    """Make `folder` ready for the run described by `run`; work of another run is dropped.

    Returns:
        whether there is work of this very run to go on with.
    """
    described = json.dumps(run, sort_keys=True).encode()
    digest = hashlib.sha256(described).hexdigest().encode()
    marker = folder / RUN
    if marker.exists() and marker.read_bytes() == digest:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    write_atomically(marker, digest)
    return False


class TargetStore:
    """Targets of finished batches, one file each."""

    def __init__(self, folder: Path, d: int) -> None:
        self._folder = folder
        self._d = d

    def read(self, number: int, batch: Sequence[StoredPrompt]) -> list[Tensor] | None:
        """The batch's targets, None when they are not there or do not fit it."""
        tensors = read_checkpoint(self._path(number))
        if tensors is None or len(tensors) != len(batch):
            return None
        found = [tensors[str(i)] for i in range(len(batch))]
        fits = all(
            delta.shape == (len(prompt.tokens.answer_ids) + 1, self._d)
            for delta, prompt in zip(found, batch, strict=True)
        )
        return found if fits else None

    def write(self, number: int, deltas: Sequence[Tensor]) -> None:
        """Keep a batch's targets, each [A + 1, d] fp32."""
        write_checkpoint(self._path(number), {str(i): d for i, d in enumerate(deltas)})

    def _path(self, number: int) -> Path:
        return self._folder / f"targets-{number:05d}.safetensors"


def write_checkpoint(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors whole or not at all."""
    write_atomically(path, save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}))


def read_checkpoint(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a checkpoint, None when there is none that can be read."""
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError):
        return None
