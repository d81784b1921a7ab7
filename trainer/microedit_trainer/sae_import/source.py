"""The folder of a published SAE: on disk, or on the hub."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from microedit_trainer.sae_import import gemma_scope, llama_scope, sae_lens, sparsify
from microedit_vllm.errors import MicroEditError

MARKERS = (llama_scope.CONFIG, sparsify.WEIGHTS, sae_lens.WEIGHTS, gemma_scope.WEIGHTS)
"""A file that tells a format from the others; the first that a folder holds decides."""

_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+))?")
_LAYER_IN_NAME = re.compile(r"(?:layers?[._]|blocks\.|(?<![A-Za-z])h\.|-L)(\d{1,4})(?!\d)")
_SHOWN = 4


def find_folder(source: str, layer: int | None = None) -> Path:
    """The SAE's own folder.

    Args:
        source: a folder, a hub id, or a hub id with a folder in it (OWNER/NAME/FOLDER).
        layer: chooses among several SAEs by the layer in their folders' names.

    Raises:
        MicroEditError: no such folder or hub id, or not one SAE in it.
    """
    path = Path(source)
    if path.is_dir():
        found = {f.parent.relative_to(path) for m in MARKERS for f in path.rglob(m)}
        return path / _choose([PurePosixPath(p.as_posix()) for p in found], source, layer)
    hub = _HUB_ID.fullmatch(source)
    if path.exists() or hub is None or ".." in PurePosixPath(source).parts:
        raise MicroEditError(f"{source} is not a folder; name one, or a hub id (OWNER/NAME/FOLDER)")
    return _from_hub(hub[1], hub[2], layer)


def _from_hub(repository: str, inner: str | None, layer: int | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        if inner is None:
            files = [PurePosixPath(file) for file in HfApi().list_repo_files(repository)]
            folders = {file.parent for file in files if file.name in MARKERS}
            inner = str(_choose(folders, repository, layer))
        patterns = ["*"] if inner == "." else [f"{inner}/*"]
        return Path(snapshot_download(repository, allow_patterns=patterns)) / inner
    except MicroEditError:
        raise
    except Exception as error:
        raise MicroEditError(
            f"{repository} is neither a folder nor an SAE that the hub gives "
            f"({type(error).__name__}); check the name or the network, or name a folder"
        ) from error


def _choose(folders: Iterable[PurePosixPath], source: str, layer: int | None) -> PurePosixPath:
    """The one folder, relative to `source`; a folder of its own wins over those inside it."""
    found = sorted(folders)
    if PurePosixPath(".") in found:
        return PurePosixPath(".")
    if layer is not None and len(found) > 1:
        found = [folder for folder in found if _layer_in(str(folder)) == layer]
    if len(found) == 1:
        return found[0]
    if not found:
        where = "" if layer is None else f" of layer {layer}"
        raise MicroEditError(f"{source} holds no SAE{where}; a folder has {', '.join(MARKERS)}")
    names = ", ".join(str(folder) for folder in found[:_SHOWN])
    more = "" if len(found) <= _SHOWN else f" and {len(found) - _SHOWN} more"
    raise MicroEditError(f"{source} holds several SAEs; name the folder of one: {names}{more}")


def _layer_in(name: str) -> int | None:
    found = _LAYER_IN_NAME.search(name)
    return None if found is None else int(found[1]) - ("hook_resid_pre" in name)
