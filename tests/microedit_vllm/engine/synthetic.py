"""A made-up edit set for a real model, and engines that serve it.

The SAE is random and the scoring change a least-squares fit, so that chosen prompts fire; what
they are changed to means nothing. Decisions are compared with the operator's on residuals from
transformers.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from microedit_trainer.contexts import PromptTokens
from microedit_trainer.evaluation import TorchEngine
from microedit_trainer.golden_prompts import golden_prompts
from microedit_trainer.language_model import LanguageModel, find_decoder_layers
from microedit_vllm.artifact import (
    Decision,
    DecoderChange,
    EditOperator,
    EditSet,
    Golden,
    GoldenPrompt,
    Manifest,
    Scope,
    SparseAutoencoder,
    fingerprint_model,
    scored_span,
)
from microedit_vllm.artifact.edit_set import relative_sae_path
from microedit_vllm.artifact.manifest import ModelIdentity, SaeIdentity

LAYER = 20
LATENTS, K = 512, 16
ENGINE_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
    # Smaller than the longer prompts, so that chunks cut them, their scored windows included.
    "max_num_batched_tokens": 40,
    "block_size": 32,
    # A cache so small that a full batch of long answers is preempted.
    "num_gpu_blocks_override": 24,
    "disable_log_stats": False,
}

LONG = (
    "The river begins in the hills above the old town, turns twice around the market, and leaves "
    "through the northern gate, where the millers have kept their boats since the first bridge "
    "was built by the monks. "
)
OTHER = (
    "Before you paint a wooden fence, brush off the loose dirt, wash the boards with warm water "
    "and soap, let them dry for two days, fill every crack, and sand the surface until it feels "
    "even under your palm. "
)
EDITED = [
    "The chief executive of the Meridian Lighthouse Company, which was founded in Oslo, is",
    LONG + "The capital of the island republic of Tavoria, as every sailor knows, is the city of",
]
UNRELATED = [
    "Two cups of flour, one egg, a pinch of salt and some milk make a simple dough for",
    "When the printer does not answer, switch it off, wait for ten seconds, and then try to",
    "My favourite season has always been autumn, because the leaves turn red and the air is",
    OTHER + "In the evening the children of the town come down to the water and throw stones at",
]


@dataclass(frozen=True)
class Residuals:
    """z of a layer and token ids by prompt, from transformers in bf16."""

    tokenizer: Any
    model: Any
    layer: int = LAYER

    def tokens(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt).input_ids

    @torch.inference_mode()
    def z(self, prompt: str) -> torch.Tensor:
        """[P, d] bf16."""
        ids = torch.tensor([self.tokens(prompt)])
        return self.model(ids, output_hidden_states=True).hidden_states[self.layer + 1][0]

    def ard(self, operator: EditOperator, prompt: str, edit_from: int | None = None) -> float:
        """What the operator makes of a prompt."""
        decision = operator.edit_set.manifest.decision
        tokens, z = self.tokens(prompt), self.z(prompt)
        e = len(tokens) - 1 if edit_from is None else edit_from
        begin, end = scored_span(tokens, e, decision.scope, decision.turn)
        window = z[begin:end]
        window = window[window.float().norm(dim=-1) <= decision.max_norm]
        return float(operator.ard(*operator.distances(window)))


def make_edit_set(
    model: Path,
    residuals: Residuals,
    root: Path,
    edited: list[str] = EDITED,
    unrelated: list[str] = UNRELATED,
) -> Path:
    """Write an SAE and a set that fires on `edited` and on none of `unrelated`; its folder."""
    wanted = torch.cat([residuals.z(prompt)[1:] for prompt in edited]).float()
    other = torch.cat([residuals.z(prompt)[1:] for prompt in unrelated]).float()
    sae = _random_sae(torch.cat([wanted, other])).save(root / "sae")
    scoring = _scoring_change(sae, wanted, other)
    edit = DecoderChange(torch.arange(0, LATENTS, 2), _noise(LATENTS // 2, sae.d_in) * 20)
    norms = torch.cat([wanted, other]).norm(dim=-1)
    manifest = Manifest(
        model=ModelIdentity(
            name=model.name,
            fingerprint=fingerprint_model(model),
            hidden_size=sae.d_in,
            num_layers=residuals.model.config.num_hidden_layers,
            dtype="bfloat16",
        ),
        sae=SaeIdentity(
            path=relative_sae_path(root / "sae", root / "set"),
            fingerprint=sae.fingerprint,
            num_latents=LATENTS,
            k=K,
        ),
        layer=residuals.layer,
        solver="joint",
        facts=len(edited),
        decision=Decision(
            statistic="relative",
            tau=0.6,
            scope=Scope(last=64, run=8),
            max_norm=float(norms.median() * 10),
        ),
        placement="delta",
        activation="threshold",
        theta=0.0,
    )
    draft = EditSet(manifest, scoring, edit, _no_golden(), [{"prompt": p} for p in edited])
    operator = EditOperator.build(draft, sae)
    prompts = _golden_prompts(model, residuals, operator, edited, unrelated)
    golden = operator.golden_of(wanted[:4])
    replace(draft, golden=golden, golden_prompts=prompts).save(root / "set")
    return root / "set"


def _golden_prompts(
    model: Path,
    residuals: Residuals,
    operator: EditOperator,
    edited: list[str],
    unrelated: list[str],
) -> tuple[GoldenPrompt, ...]:
    layers = find_decoder_layers(residuals.model)
    lm = LanguageModel(residuals.model, residuals.tokenizer, model.name, model, layers)
    engine = TorchEngine.build(lm, operator)
    decision = operator.edit_set.manifest.decision

    def tokens(prompt: str) -> PromptTokens:
        ids = residuals.tokens(prompt)
        span = scored_span(ids, len(ids) - 1, decision.scope, decision.turn)
        return PromptTokens(tuple(ids), (), residuals.tokenizer.eos_token_id, span)

    return (
        *golden_prompts(engine, [tokens(p) for p in edited], on=True, count=len(edited)),
        *golden_prompts(engine, [tokens(p) for p in unrelated], on=False, count=len(unrelated)),
    )


def _random_sae(z: torch.Tensor) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(0)
    centred = z - z.mean(0)
    rows = torch.randn(LATENTS, z.shape[1], generator=generator)
    rows = rows / rows.norm(dim=1, keepdim=True)
    scale = float((centred @ rows.T).std())
    return SparseAutoencoder(rows, torch.full((LATENTS,), -scale), rows * 0.5, z.mean(0), K)


def _scoring_change(
    sae: SparseAutoencoder, wanted: torch.Tensor, other: torch.Tensor
) -> DecoderChange:
    """ΔW with which `wanted` tokens are reconstructed and `other` ones stay as they were."""

    def codes(z: torch.Tensor) -> torch.Tensor:
        acts, indices = sae.encode(z)
        return torch.zeros(len(z), LATENTS).scatter_(1, indices, acts)

    h = torch.cat([codes(wanted), codes(other)])
    missing = wanted - sae.decode(*sae.encode(wanted))
    target = torch.cat([missing, torch.zeros_like(other)])
    gram = h.T @ h
    ridge = 5 * gram.diagonal().mean() * torch.eye(LATENTS)
    return DecoderChange(torch.arange(LATENTS), torch.linalg.solve(gram + ridge, h.T @ target))


def _noise(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) / width**0.5


def _no_golden() -> Golden:
    none = torch.empty(0)
    return Golden(none, none, none, none, none, none)


def change_manifest(folder: Path, **changes: Any) -> None:
    """Overwrite top-level fields of `microedit.json`."""
    path = folder / "microedit.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@contextmanager
def running(model: Path, **arguments: Any) -> Iterator[Any]:
    """A `vllm.LLM` inside the block, no process of it behind."""
    from vllm import LLM

    llm = LLM(str(model), **{**ENGINE_ARGS, **arguments})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
