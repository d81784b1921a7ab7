"""The loop over the layers, read from vLLM's own models."""

import pytest

from microedit_vllm.engine.decoder_stack import DecoderStack, find_stack
from microedit_vllm.engine.model_source import find_class
from microedit_vllm.engine.stream_form import Form, UnreadableError

VLLM = "vllm.model_executor.models"


def stack(module: str, name: str) -> DecoderStack:
    model = find_class(f"{VLLM}.{module}", name)
    assert model is not None, f"{module} has no {name} any more"
    return find_stack(model)


def test_the_loop_is_found_behind_a_forward_that_calls_its_parent_s():
    found = stack("mistral", "MistralForCausalLM")
    assert found.owner.name == "MistralModel"
    assert {layer.name for layer in found.layers} == {"MistralDecoderLayer", "LlamaDecoderLayer"}


@pytest.mark.parametrize(
    ("module", "name", "owner"),
    [
        ("qwen3", "Qwen3ForCausalLM", "Qwen3Model"),  # inherits the loop of Qwen2Model
        ("gpt_oss", "GptOssForCausalLM", "GptOssModel"),  # layer = self.layers[i]
        ("granitemoeshared", "GraniteMoeSharedForCausalLM", "GraniteMoeSharedModel"),
        ("chatglm", "ChatGLMForCausalLM", "GLMTransformer"),
    ],
)
def test_the_class_that_runs_the_layers(module, name, owner):
    assert stack(module, name).owner.name == owner


@pytest.mark.parametrize(
    ("module", "name", "form"),
    [
        ("qwen3_moe", "Qwen3MoeForCausalLM", Form.FUSED),  # names expert blocks beside its layers
        ("hy_v3", "HYV3ForCausalLM", Form.FUSED),  # adds the pair itself behind the last layer
        ("deepseek_v2", "DeepseekV3ForCausalLM", Form.FUSED),  # gathers rows spread over ranks
        ("gemma4", "Gemma4ForCausalLM", Form.FIRST),  # the second is None
        ("stablelm", "StablelmForCausalLM", Form.FIRST),
        ("gpt2", "GPT2LMHeadModel", Form.SINGLE),
    ],
)
def test_the_form_that_layers_and_stack_agree_on(module, name, form):
    assert stack(module, name).form() is form


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        ("commandr", "CohereForCausalLM", "reads the second value of its last layer"),
        ("plamo3", "Plamo3ForCausalLM", "does not end with a norm"),
        ("solar", "SolarForCausalLM", "changes the residual stream between"),
        ("iquest_loopcoder", "IQuestLoopCoderForCausalLM", "several times for each token"),
    ],
)
def test_a_stack_that_does_not_say_is_refused(module, name, reason):
    with pytest.raises(UnreadableError, match=reason):
        stack(module, name).form()


def test_a_model_with_two_loops_is_refused():
    with pytest.raises(UnreadableError, match="no single loop"):
        stack("gemma3n", "Gemma3nForCausalLM")
