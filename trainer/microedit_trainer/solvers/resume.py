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
    """δ* of prompts, by all that they depend on; a file per batch that was solved together.

    Args:
        folder: of a run, or one that outlives it: then facts that come back in another run are not
            solved again.
        d: width of the residual stream.
        origin: the model, the layer and the settings that the targets are of.
    """

    def __init__(self, folder: Path, d: int, origin: str) -> None:
        self._folder = folder
        self._d = d
        self._origin = origin

    def read(self, prompts: Sequence[StoredPrompt]) -> dict[int, Tensor]:
        """The targets that are there and whole, [A + 1, d] fp32, by place in `prompts`."""
        wanted: dict[str, list[int]] = {}
        for place, prompt in enumerate(prompts):
            wanted.setdefault(self._key(prompt), []).append(place)
        found: dict[int, Tensor] = {}
        for path in sorted(self._folder.glob("targets-*.safetensors")):
            for key, delta in (read_checkpoint(path) or {}).items():
                for place in wanted.get(key, ()):
                    if delta.shape == (len(prompts[place].tokens.answer_ids) + 1, self._d):
                        found[place] = delta
        return found

    def write(self, prompts: Sequence[StoredPrompt], deltas: Sequence[Tensor]) -> None:
        """Keep a batch's targets, each [A + 1, d] fp32."""
        tensors = {self._key(p): delta for p, delta in zip(prompts, deltas, strict=True)}
        write_checkpoint(self._folder / f"targets-{next(iter(tensors))}.safetensors", tensors)

    def _key(self, prompt: StoredPrompt) -> str:
        tokens = prompt.tokens
        own = [self._origin, tokens.prompt_ids, tokens.answer_ids, tokens.edit_from, tokens.end_id]
        return hashlib.sha256(json.dumps(own).encode()).hexdigest()[:32]


def write_checkpoint(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors whole or not at all."""
    write_atomically(path, save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}))


def read_checkpoint(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a checkpoint, None when there is none that can be read."""
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError):
        return None
