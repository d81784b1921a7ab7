"""Random models of a few thousand weights, one for each architecture that edits are proven on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.tiny_model import tiny_tokenizer

LAYERS = 3
# 32 is the smallest head that vLLM's CPU attention takes.
HIDDEN, HEADS, HEAD_SIZE = 64, 2, 32

_COMMON = {
    "vocab_size": 259,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 1, "head_dim": HEAD_SIZE}
_ALTERNATING = {
    "num_key_value_heads": 1,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_GEMMA = {**_GROUPED, **_ALTERNATING, "query_pre_attn_scalar": HEAD_SIZE}


def _config(name: str, **fields: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**fields)


CONFIGS: dict[str, Callable[[], Any]] = {
    "LlamaForCausalLM": _config("LlamaConfig", **_GROUPED),
    "MistralForCausalLM": _config("MistralConfig", **_GROUPED, sliding_window=None),
    "Qwen2ForCausalLM": _config("Qwen2Config", **_COMMON, num_key_value_heads=1),
    "Qwen3ForCausalLM": _config("Qwen3Config", **_GROUPED),
    "Gemma2ForCausalLM": _config("Gemma2Config", **_GEMMA, final_logit_softcapping=5.0),
    "Gemma3ForCausalLM": _config("Gemma3TextConfig", **_GEMMA),
    "GPTNeoXForCausalLM": _config("GPTNeoXConfig", **_COMMON),
    "GPT2LMHeadModel": _config("GPT2Config", **_COMMON),
    "PhiForCausalLM": _config("PhiConfig", **_COMMON),
    "Phi3ForCausalLM": _config("Phi3Config", **_COMMON, num_key_value_heads=1),
    # The pairs that do not sum to z.
    "CohereForCausalLM": _config("CohereConfig", **_COMMON, num_key_value_heads=1),
    # vLLM looks one token further back than transformers (`commandr.py`), so that the window here
    # holds every prompt.
    "Cohere2ForCausalLM": _config(
        "Cohere2Config", **{**_COMMON, **_ALTERNATING, "sliding_window": 64}
    ),
    "StableLmForCausalLM": _config("StableLmConfig", **_COMMON, num_key_value_heads=1),
}

# vLLM runs it through transformers' own class, which it changes for good; for one test alone.
ONCE = {"OlmoForCausalLM": _config("OlmoConfig", **_COMMON)}


def tiny_architecture(architecture: str, folder: Path, seed: int = 0) -> Path:
    """Save a random fp32 model of an architecture and its tokenizer; returns the folder."""
    build_architecture(architecture, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def build_architecture(architecture: str, seed: int = 0) -> PreTrainedModel:
    """The same model in memory.

    Norm weights and biases are random too: at their initial ones and zeros a norm that is left
    out or applied twice may go unseen.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, architecture)((CONFIGS | ONCE)[architecture]())
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()
