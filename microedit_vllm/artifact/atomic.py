"""Files and folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from microedit_vllm.errors import MicroEditError


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` when the block ends well.

    An older `target` stays as it was until then, and for good when the block raises.

    Raises:
        MicroEditError: the disk is full or the place cannot be written.
    """
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise MicroEditError(f"cannot write {target}: {error.strerror}") from error
    try:
        draft.chmod(0o755)
        yield draft
        _swap(draft, target)
    except OSError as error:
        raise MicroEditError(f"cannot write {target}: {error.strerror or error}") from error
    except SafetensorError as error:
        # How safetensors reports a full disk.
        raise MicroEditError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _swap(draft: Path, target: Path) -> None:
    if not target.exists():
        draft.rename(target)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        target.rename(retired / "old")
        try:
            draft.rename(target)
        except BaseException:
            (retired / "old").rename(target)
            raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def write_atomically(target: Path, data: bytes) -> None:
    """Write `data` to `target` through a neighbouring file and a rename.

    Raises:
        MicroEditError: the disk is full or the place cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(name, 0o644)
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise MicroEditError(f"cannot write {target}: {error.strerror or error}") from error
