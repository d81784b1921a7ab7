"""The folder beside the output that lets a stopped run continue."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from microedit_trainer.sae.settings import SaeSettings
from microedit_trainer.token_sequences import TokenSequences
from microedit_vllm.artifact.atomic import atomic_folder, write_atomically
from microedit_vllm.artifact.tensors import read_tensors
from microedit_vllm.errors import MicroEditError

_CHECKPOINT = "checkpoint"
_LOCK = "lock"


class WorkFolder:
    """Sequences, activations and the last checkpoint of one run, named by what it was asked."""

    def __init__(self, out: Path, settings: SaeSettings, model_fingerprint: str) -> None:
        self.path = work_path(out)
        self._asked = json.loads(json.dumps({**asdict(settings), "model": model_fingerprint}))

    def open(self, fresh: bool) -> None:
        """Create the folder, or find the one of a stopped run with the same settings.

        Raises:
            MicroEditError: the stopped run was asked for something else, or one is going on.
        """
        self._lock()
        if fresh:
            for path in self.path.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != _LOCK:
                    path.unlink()
        settings = self.path / "settings.json"
        if not settings.exists():
            write_atomically(settings, json.dumps(self._asked, indent=2).encode())
            return
        try:
            earlier = json.loads(settings.read_text(encoding="utf-8"))
        except ValueError:
            earlier = {}
        changed = [name for name in self._asked if self._asked[name] != earlier.get(name)]
        if changed:
            raise MicroEditError(
                f"{self.path} holds a stopped run with another {', '.join(changed)}; "
                "repeat its command to resume it, or pass --fresh to start over"
            )

    def _lock(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._locked = (self.path / _LOCK).open("w")
        except OSError as error:
            raise MicroEditError(f"cannot write {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._locked.close()
            raise MicroEditError(f"another run is at work in {self.path}") from error

    def close(self) -> None:
        """Give the folder free for a run that resumes."""
        self._locked.close()

    @property
    def activations(self) -> Path:
        return self.path / "activations.bf16"

    @property
    def sequences(self) -> Path:
        return self.path / "sequences"

    def load_sequences(self) -> TokenSequences | None:
        return TokenSequences.load(self.sequences) if self.sequences.exists() else None

    def save_sequences(self, sequences: TokenSequences) -> None:
        with one_line_disk_errors(self.path):
            sequences.save(self.sequences)

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        """Tensors and the seconds spent so far, by stage."""
        folder = self.path / _CHECKPOINT
        if not folder.exists():
            return None
        seconds = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
        return read_tensors(folder / "state.safetensors"), seconds

    def save_checkpoint(self, tensors: dict[str, Tensor], seconds: dict[str, float]) -> None:
        with one_line_disk_errors(self.path), atomic_folder(self.path / _CHECKPOINT) as draft:
            save_file(tensors, draft / "state.safetensors")
            (draft / "seconds.json").write_text(json.dumps(seconds))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def check_space(self, needed: int) -> None:
        """Refuse before hours of work what the disk cannot hold.

        Raises:
            MicroEditError: less than `needed` bytes are free.
        """
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise MicroEditError(
                f"{self.path.parent} has {free / 1e9:.1f} GB free and this run needs "
                f"{needed / 1e9:.1f} GB; free some or name another --out"
            )


def work_path(out: Path) -> Path:
    """`.OUT-work` beside OUT."""
    out = out.absolute()
    return out.with_name(f".{out.name}-work")


@contextmanager
def one_line_disk_errors(path: Path) -> Iterator[None]:
    """safetensors reports a full disk as an error of its own kind."""
    try:
        yield
    except SafetensorError as error:
        raise MicroEditError(f"cannot write {path}: {error}") from error


def describe(settings: SaeSettings) -> dict[str, Any]:
    """The settings as the SAE's report keeps them."""
    return {**asdict(settings), "text": list(settings.text), "steps": settings.total_steps}
