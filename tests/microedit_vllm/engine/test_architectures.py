"""Architectures: what is said of them, and edits in vLLM beside the same edits in transformers."""

import gc
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

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
from tests.builders import tiny_manifest, tiny_sae
from tests.microedit_vllm.engine.huggingface_reference import Answer, HuggingFaceReference
from tests.microedit_vllm.engine.synthetic import running
from tests.tiny_architectures import CONFIGS, LAYERS, tiny_architecture

LAYER, LATENTS, K, STEPS = 1, 128, 8, 6
PROMPTS = [
    "The harbour of Meridian lies in the north of",
    "Two cups of flour and one egg make a dough for",
    "zzzz 0000 ???? zzzz 0000 ????",
    "THE CHIEF EXECUTIVE OF THE COMPANY IS",
]
# Decoder layers in a Hugging Face model, where they are not `model.layers`.
LAYERS_AT = {"GPT2LMHeadModel": "transformer.h", "GPTNeoXForCausalLM": "gpt_neox.layers"}
ENGINE = {
    "dtype": "float32",
    "max_model_len": 96,
    "max_num_batched_tokens": 96,
    "num_gpu_blocks_override": 16,
    "max_num_seqs": 4,
}


def reference(architecture: str, folder: Path) -> HuggingFaceReference:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = attrgetter(LAYERS_AT.get(architecture, "model.layers"))(model)
    return HuggingFaceReference(model, layers, LAYER)


def write_edit_set(model: Path, hf: HuggingFaceReference, prompts: list[list[int]]) -> Path:
    """A random set, with a τ that turns it on for some of the prompts and off for others."""
    z = torch.cat([hf.z(prompt)[1:] for prompt in prompts])
    sae = replace(
        tiny_sae(d=z.shape[1], n=LATENTS, k=K), b_dec=z.mean(0), b_enc=torch.zeros(LATENTS)
    )
    sae = sae.save(model / "sae")
    generator = torch.Generator().manual_seed(5)
    values = 0.3 * torch.randn(2, LATENTS, z.shape[1], generator=generator)
    manifest = tiny_manifest(
        sae,
        model=ModelIdentity(
            name="tiny",
            fingerprint=fingerprint_model(model),
            hidden_size=z.shape[1],
            num_layers=LAYERS,
            dtype="float32",
        ),
        layer=LAYER,
        facts=1,
        decision=Decision(statistic="relative", tau=1.0, scope=Scope(last=64, run=8), max_norm=1e9),
        theta=0.0,
    )
    changes = [DecoderChange(torch.arange(LATENTS), change.clone()) for change in values]
    draft = EditSet(manifest, *changes, Golden(*[torch.empty(0)] * 6), [{"prompt": PROMPTS[0]}])
    operator = EditOperator.build(draft, sae)
    ards = sorted(hf.ard(operator, prompt) for prompt in prompts)
    # In the widest gap, so that rounding decides nothing.
    low, high = max(zip(ards, ards[1:], strict=False), key=lambda pair: pair[1] / pair[0])
    assert high / low > 1.01, "the prompts are too much alike"
    decision = manifest.decision.model_copy(update={"tau": (low + high) / 2})
    manifest = manifest.model_copy(update={"decision": decision})
    draft = replace(draft, manifest=manifest, golden=operator.golden_of(z[:4]))
    draft.save(model / "set")
    return model / "set"


def serve(model: Path, edit_set: Path, prompts: list[list[int]]) -> list[tuple[Answer, Any]]:
    """Each prompt's answer and decision, all in one batch of an engine in this process."""
    from vllm import SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, logprobs=0)
    setting = {"microedit": {"edit_set": str(edit_set)}}
    with running(model, **ENGINE, additional_config=setting) as llm:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        found = decisions(llm, [output.request_id for output in outputs])
    answers = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        steps = zip(tokens, output.outputs[0].logprobs, strict=True)
        answer = Answer(tokens, [step[token].logprob for token, step in steps])
        answers.append((answer, found[output.request_id]))
    del llm
    cleanup_dist_env_and_memory()
    gc.collect()
    return answers


@dataclass(frozen=True)
class Wanted:
    """What transformers makes of a prompt."""

    ard: float
    plain: Answer
    edited: Answer


@pytest.mark.parametrize("architecture", CONFIGS)
def test_edits_in_vllm_are_those_of_a_huggingface_forward(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    model = tiny_architecture(architecture, tmp_path)
    hf = reference(architecture, model)
    prompts = [[ord(letter) % 250 + 3 for letter in prompt] for prompt in PROMPTS]
    folder = write_edit_set(model, hf, prompts)
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
    served = serve(model, folder, prompts)
    assert {record["on"] for _, record in served} == {True, False}
    for wanted, (answer, record) in zip(expected, served, strict=True):
        assert record["ard"] == pytest.approx(wanted.ard, rel=1e-3)
        assert record["on"] is (wanted.ard <= edit_set.manifest.decision.tau)
        same = wanted.edited if record["on"] else wanted.plain
        assert answer.tokens == same.tokens
        assert answer.logprobs == pytest.approx(same.logprobs, abs=1e-3)
