import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from microedit_trainer.estimate import ModelSize


@pytest.fixture(scope="session")
def llama3_8b() -> ModelSize:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        return ModelSize.of(LlamaForCausalLM(config), torch.bfloat16)
