"""What an SAE was trained on, kept for others of the same text and layer: width and k may vary."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from microedit_trainer.sae.settings import SaeSettings
from microedit_trainer.sae.work_folder import WorkFolder
from microedit_vllm.artifact.atomic import atomic_folder

_DEPENDS_ON = (
    *("layer", "text", "tokens", "sample_tokens"),
    *("seed", "sequence_length", "heldout_share"),
)


class Collected:
    """Sequences and residuals of one text and layer, in a folder named by a hash of both.

    Texts are known by their names, as in a stopped run: a file that changed needs another folder.

    Args:
        folder: holds those of any text and layer.
    """

    def __init__(self, folder: Path, settings: SaeSettings, model_fingerprint: str) -> None:
        asked = asdict(settings)
        depends_on = [model_fingerprint, *(asked[name] for name in _DEPENDS_ON)]
        self.path = folder / hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]

    def lend(self, work: WorkFolder) -> None:
        """Give what is kept to a run that has no sequences of its own yet.

        Residuals go first: a run stopped between the two has no sequences, and is lent both again.

        Raises:
            MicroEditError: the disk is full.
        """
        if work.sequences.exists() or not self.path.exists():
            return
        with atomic_folder(work.sequences) as draft:
            work.activations.unlink(missing_ok=True)
            _link(self.path / work.activations.name, work.activations)
            shutil.copytree(self.path / work.sequences.name, draft, dirs_exist_ok=True)

    def keep(self, work: WorkFolder) -> None:
        """Keep what a run has collected, unless it is there.

        Raises:
            MicroEditError: the disk is full.
        """
        if self.path.exists():
            return
        with atomic_folder(self.path) as draft:
            shutil.copytree(work.sequences, draft / work.sequences.name)
            _link(work.activations, draft / work.activations.name)


def _link(source: Path, target: Path) -> None:
    """One file under two names, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
