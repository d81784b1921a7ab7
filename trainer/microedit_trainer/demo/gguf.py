"""A GGUF file as a folder that vLLM and transformers load."""

from pathlib import Path

import torch

from microedit_vllm.artifact.atomic import atomic_folder


def write_model_folder(gguf: Path, folder: Path) -> Path:
    """Save a GGUF file's model and tokenizer as safetensors in bf16; returns the folder.

    transformers reads the file; its state dict goes into a fresh model of the same class, because
    one that was read from GGUF is not saved without its quantisation. It overlooks that a file may
    ask for BOS before every text, without which Gemma answers with nonsense.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    source = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    config = type(source.config)(**source.config.to_dict())
    for name in ("quantization_config", "_name_or_path"):
        config.__dict__.pop(name, None)
    model = type(source)(config).to(torch.bfloat16)
    model.load_state_dict(source.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if wants_bos(gguf):
        tokenizer.add_bos_token = True
    with atomic_folder(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    return folder


def wants_bos(gguf: Path) -> bool:
    """Whether texts begin with the BOS token (`tokenizer.ggml.add_bos_token`)."""
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    return field is not None and bool(field.contents())
