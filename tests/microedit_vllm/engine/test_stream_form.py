"""Forms read from real layers: of vLLM, and of transformers where vLLM runs its code."""

import pytest

from microedit_vllm.engine.model_source import find_class
from microedit_vllm.engine.stream_form import Form, UnreadableError, layer_form

VLLM = "vllm.model_executor.models"


def form(module: str, name: str) -> Form:
    layer = find_class(module, name)
    assert layer is not None, f"{module} has no {name} any more"
    return layer_form(layer)


@pytest.mark.parametrize(
    ("module", "name", "wanted"),
    [
        ("llama", "LlamaDecoderLayer", Form.FUSED),
        ("gemma2", "Gemma2DecoderLayer", Form.FUSED),
        ("gemma3", "Gemma3DecoderLayer", Form.FUSED),
        ("gpt_oss", "TransformerBlock", Form.FUSED),  # takes `x`
        ("nemotron", "NemotronDecoderLayer", Form.FUSED),  # a norm of its own
        ("deepseek_v2", "DeepseekV2DecoderLayer", Form.FUSED),
        ("commandr", "CohereDecoderLayer", Form.FIRST),
        ("stablelm", "StablelmDecoderLayer", Form.FIRST),
        ("phimoe", "PhiMoEDecoderLayer", Form.FIRST),
        ("exaone4", "Exaone4DecoderLayer", Form.FIRST),
        ("minicpm", "MiniCPMDecoderLayer", Form.FIRST),
        ("gpt2", "GPT2Block", Form.SINGLE),
        ("granite", "GraniteDecoderLayer", Form.SINGLE),
    ],
)
def test_a_layer_of_vllm(module, name, wanted):
    assert form(f"{VLLM}.{module}", name) is wanted


def test_a_layer_that_inherits_its_forward():
    assert form(f"{VLLM}.mistral", "MistralDecoderLayer") is Form.FUSED
    assert form(f"{VLLM}.minicpm3", "MiniCPM3DecoderLayer") is Form.FIRST


@pytest.mark.parametrize(
    ("module", "name"), [("gpt_neox", "GPTNeoXLayer"), ("phi", "PhiDecoderLayer")]
)
def test_a_layer_of_transformers(module, name):
    assert form(f"transformers.models.{module}.modeling_{module}", name) is Form.SINGLE


def test_a_class_is_found_through_an_import():
    found = find_class(f"{VLLM}.qwen3", "Qwen2Model")
    assert found is not None
    assert found.module == f"{VLLM}.qwen2"


@pytest.mark.parametrize(
    ("module", "name"),
    [("nemotron_nas", "DeciLMDecoderLayer"), ("longcat_flash", "FlashDecoderLayer")],
)
def test_a_layer_that_does_not_say_is_refused(module, name):
    with pytest.raises(UnreadableError, match=f"{name} does not read hidden_states and residual"):
        form(f"{VLLM}.{module}", name)
