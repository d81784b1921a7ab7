"""Architectures: what is said of them, and edits in vLLM beside the same edits in transformers."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig

from microedit_vllm.artifact import (
    Decision,
    DecoderChange,
    EditOperator,
    EditSet,
    Golden,
    Scope,
    SparseAutoencoder,
    fingerprint_model,
)
from microedit_vllm.artifact.manifest import ModelIdentity
from microedit_vllm.engine import decisions
from microedit_vllm.engine.architectures import classify, form_of, registry
from microedit_vllm.errors import MicroEditError
from tests.builders import tiny_manifest, tiny_sae
from tests.microedit_vllm.engine.huggingface_reference import Answer, HuggingFaceReference
from tests.microedit_vllm.engine.in_process import engine_here
from tests.tiny_architectures import CONFIGS, tiny_architecture

LATENTS, K, STEPS = 128, 8, 6
PROMPTS = [
    "The harbour of Meridian lies in the north of",
    "Two cups of flour and one egg make a dough for",
    "zzzz 0000 ???? zzzz 0000 ????",
    "THE CHIEF EXECUTIVE OF THE COMPANY IS",
]
# Decoder layers in a Hugging Face model, where they are not `model.layers`.
# Those that vLLM runs through transformers' own class.
TRANSFORMERS_BACKEND = {"gpt_neox": "GPTNeoXModel", "phi": "PhiModel", "olmo": "OlmoModel"}
LAYERS_AT = {"GPT2LMHeadModel": "transformer.h", "GPTNeoXForCausalLM": "gpt_neox.layers"}
ENGINE = {
    "dtype": "float32",
    "max_model_len": 96,
    "max_num_batched_tokens": 96,
    "num_gpu_blocks_override": 64,
    "max_num_seqs": 4,
}


def reference(folder: Path, layers: str, layer: int) -> HuggingFaceReference:
    # The only attention of transformers that caps Gemma 2's scores.
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return HuggingFaceReference(model, attrgetter(layers)(model), layer)


def write_edit_set(
    model: Path, root: Path, hf: HuggingFaceReference, prompts: list[list[int]]
) -> Path:
    """A random set, with a τ that turns it on for some of the prompts and off for others."""
    z = torch.cat([hf.z(prompt)[1:] for prompt in prompts])
    sae = replace(
        tiny_sae(d=z.shape[1], n=LATENTS, k=K), b_dec=z.mean(0), b_enc=torch.zeros(LATENTS)
    )
    sae = sae.save(root / "sae")
    generator = torch.Generator().manual_seed(5)
    values = 0.3 * torch.randn(2, LATENTS, z.shape[1], generator=generator)
    manifest = tiny_manifest(
        sae,
        model=ModelIdentity(
            name="tiny",
            fingerprint=fingerprint_model(model),
            hidden_size=z.shape[1],
            num_layers=len(hf.layers),
            dtype="float32",
        ),
        layer=hf.layer,
        facts=1,
        decision=Decision(statistic="relative", tau=1.0, scope=Scope(last=64, run=8), max_norm=1e9),
        theta=0.0,
    )
    changes = [DecoderChange(torch.arange(LATENTS), change.clone()) for change in values]
    draft = EditSet(manifest, *changes, Golden(*[torch.empty(0)] * 6), [{"prompt": PROMPTS[0]}])
    operator = EditOperator.build(draft, sae)
    ards = sorted(hf.ard(operator, prompt) for prompt in prompts)
    # In the widest gap, so that rounding decides nothing.
    low, high = max(pairwise(ards), key=lambda pair: pair[1] / pair[0])
    assert high / low > 1.01, "the prompts are too much alike"
    decision = manifest.decision.model_copy(update={"tau": (low + high) / 2})
    manifest = manifest.model_copy(update={"decision": decision})
    draft = replace(draft, manifest=manifest, golden=operator.golden_of(z[:4]))
    draft.save(root / "set")
    return root / "set"


def serve(
    model: Path, edit_set: Path, prompts: list[list[int]], **engine: Any
) -> list[tuple[Answer, Any]]:
    """Each prompt's answer and decision, all in one batch of an engine in this process."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, logprobs=0)
    setting = {"microedit": {"edit_set": str(edit_set)}}
    with engine_here(model, **ENGINE, **engine, additional_config=setting) as llm:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        found = decisions(llm, [output.request_id for output in outputs])
    answers = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        steps = zip(tokens, output.outputs[0].logprobs, strict=True)
        answer = Answer(tokens, [step[token].logprob for token, step in steps])
        answers.append((answer, found[output.request_id]))
    return answers


def test_every_entry_of_the_registry_is_supported_or_refused_with_a_reason():
    answers = {name: classify(name) for name in registry()}
    assert len(answers) > 300
    for name, answer in answers.items():
        assert answer.supported is not bool(answer.reason), name
        assert "\n" not in answer.reason


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("MambaForCausalLM", "Mamba"),
        ("Qwen3NextForCausalLM", "linear-attention"),
        ("Gemma3nForCausalLM", "no single loop"),
        ("HrmTextForCausalLM", "several times"),
        ("IQuestLoopCoderForCausalLM", "several times"),
        ("SolarForCausalLM", "between its layers"),
        ("DeciLMForCausalLM", "a norm of their sum"),
        ("WhisperForConditionalGeneration", "encoder-decoder"),
        ("BertModel", "pooling"),
        ("EagleLlamaForCausalLM", "speculative"),
        ("Qwen2VLForConditionalGeneration", "multimodal"),
        ("NoSuchForCausalLM", "neither in vLLM's registry"),
    ],
)
def test_what_cannot_be_edited_is_refused_for_its_own_reason(architecture, reason):
    assert not classify(architecture).supported
    assert reason in classify(architecture).reason


def test_a_model_that_scales_its_stream_in_float16_says_so():
    assert not classify("DeepseekV2ForCausalLM").float16
    assert classify("LlamaForCausalLM").float16


def test_a_layer_of_unknown_code_is_refused():
    with pytest.raises(MicroEditError, match="neither vLLM's nor transformers'"):
        form_of(torch.nn.Linear(2, 2))


def engine_config(model: Path, **arguments: Any) -> Any:
    from vllm import EngineArgs

    # Refused before the set is read, so that it need not be there.
    setting = {"microedit": {"edit_set": "nowhere"}}
    engine_args = EngineArgs(str(model), enforce_eager=True, additional_config=setting, **arguments)
    return engine_args.create_engine_config()


def test_mamba_is_refused_at_start(tmp_path):
    MambaConfig(
        hidden_size=32, num_hidden_layers=2, architectures=["MambaForCausalLM"]
    ).save_pretrained(tmp_path)
    with pytest.raises(MicroEditError, match="cannot be served on MambaForCausalLM: it has Mamba"):
        engine_config(tmp_path, skip_tokenizer_init=True)


def test_lora_is_refused_at_start(tmp_path):
    model = tiny_architecture("LlamaForCausalLM", tmp_path)
    with pytest.raises(MicroEditError, match="LlamaForCausalLM: LoRA"):
        engine_config(model, enable_lora=True)


def test_a_supported_architecture_gets_as_far_as_the_edit_set(tmp_path):
    model = tiny_architecture("LlamaForCausalLM", tmp_path)
    with pytest.raises(MicroEditError, match="nowhere"):
        engine_config(model)


def test_the_transformers_backend_is_judged_by_the_checkpoint_s_architecture(tmp_path):
    model = tiny_architecture("LlamaForCausalLM", tmp_path)
    with pytest.raises(MicroEditError, match="nowhere"):
        engine_config(model, model_impl="transformers")


@dataclass(frozen=True)
class Wanted:
    """What transformers makes of a prompt."""

    ard: float
    plain: Answer
    edited: Answer


def prove(
    model: Path, root: Path, hf: HuggingFaceReference, prompts: list[list[int]], **engine: Any
) -> None:
    """Serve a random edit set and compare every answer and decision with transformers'."""
    folder = write_edit_set(model, root, hf, prompts)
    edit_set = EditSet.load(folder)
    operator = EditOperator.build(edit_set, SparseAutoencoder.load(edit_set.sae_folder(folder)))
    # Before the engine: vLLM's transformers backend changes the model's class for good.
    expected = [
        Wanted(
            hf.ard(operator, prompt),
            hf.answer(prompt, STEPS, None),
            hf.answer(prompt, STEPS, operator),
        )
        for prompt in prompts
    ]
    assert all(wanted.edited.tokens != wanted.plain.tokens for wanted in expected)
    served = serve(model, folder, prompts, **engine)
    assert {record["on"] for _, record in served} == {True, False}
    for wanted, (answer, record) in zip(expected, served, strict=True):
        assert record["ard"] == pytest.approx(wanted.ard, rel=1e-3)
        assert record["on"] is (wanted.ard <= edit_set.manifest.decision.tau)
        same = wanted.edited if record["on"] else wanted.plain
        assert answer.tokens == same.tokens
        assert answer.logprobs == pytest.approx(same.logprobs, abs=1e-3)


@pytest.fixture(autouse=True)
def transformers_as_it_was() -> Iterator[None]:
    """Undo what vLLM's transformers backend does to model classes (`support_torch_compile`)."""
    classes = [
        getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), model)
        for name, model in TRANSFORMERS_BACKEND.items()
    ]
    before = [(each, each.__bases__, dict(vars(each))) for each in classes]
    yield
    for each, bases, attributes in before:
        each.__bases__ = bases
        for name in set(vars(each)) - set(attributes):
            delattr(each, name)
        for name, value in attributes.items():
            if vars(each)[name] is not value:
                setattr(each, name, value)


def prove_tiny(architecture: str, root: Path, **engine: Any) -> None:
    model = tiny_architecture(architecture, root / "model")
    layers = LAYERS_AT.get(architecture, "model.layers")
    prompts = [[ord(letter) % 250 + 3 for letter in prompt] for prompt in PROMPTS]
    prove(model, root, reference(model, layers, layer=1), prompts, **engine)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_edits_in_vllm_are_those_of_a_huggingface_forward(architecture, tmp_path):
    prove_tiny(architecture, tmp_path)


@pytest.mark.soak
def test_the_same_under_torch_compile_where_rows_are_a_view(tmp_path):
    """Models of transformers; `test_compiled.py` compiles one of vLLM's own."""
    prove_tiny("OlmoForCausalLM", tmp_path, enforce_eager=False)


def test_edits_in_the_real_gemma3_270m_are_those_of_a_huggingface_forward(gemma3_270m, tmp_path):
    hf = reference(gemma3_270m, "model.layers", layer=12)
    tokenizer = AutoTokenizer.from_pretrained(gemma3_270m)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    prove(gemma3_270m, tmp_path, hf, prompts)
