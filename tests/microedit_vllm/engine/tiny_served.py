"""A tiny random model with a made-up edit set, and what each request must answer.

Small enough that an engine starts in a second. The reference is a Hugging Face forward over the
whole sequence at every token, with the operator applied behind layer l: no KV cache, no schedule.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microedit_vllm.artifact import (
    Decision,
    DecoderChange,
    EditOperator,
    EditSet,
    Golden,
    Manifest,
    Scope,
    SparseAutoencoder,
    TurnMarkers,
    fingerprint_model,
    scored_span,
)
from microedit_vllm.artifact.edit_operator import with_golden
from microedit_vllm.artifact.edit_set import relative_sae_path
from microedit_vllm.artifact.manifest import CARRYING_VERSION, ModelIdentity, SaeIdentity
from tests.tiny_model import tiny_model

LAYER, LAYERS, HIDDEN = 2, 4, 128
LATENTS, K = 384, 12
VOCABULARY = 259
# About the squared distance of the unedited SAE.
ALPHA = 1e5
# Positions whose two best tokens are nearer than this are not compared.
CLEAR = 2e-3

FORMS: dict[str, dict[str, Any]] = {
    "delta": {"placement": "delta", "activation": "threshold", "theta": 0.0},
    "carried": {
        "placement": "delta",
        "activation": "threshold",
        "theta": 0.0,
        "version": CARRYING_VERSION,
    },
    "replace": {"placement": "replace", "activation": "topk", "theta": None},
    "sequence": {
        "placement": "replace",
        "activation": "topk",
        "theta": None,
        "position": "sequence",
    },
}
SCOPES = {
    "window": Scope(last=48, run=8),
    "last": Scope(last=20, run=0),
    "all": Scope(last=None, run=0),
}


@dataclass(frozen=True)
class Answer:
    """What a request must get: greedy tokens, the decision, and how clear each choice was."""

    tokens: tuple[int, ...]
    on: bool
    ard: float
    gaps: tuple[float, ...]


@dataclass
class TinyServed:
    """Model, edit set and prompts of token ids; `edited` turn the switch on alone.

    Attributes:
        hf: the model in transformers, fp32.
    """

    model: Path
    edit_set: Path
    operator: EditOperator
    hf: Any
    edited: list[list[int]]
    unrelated: list[list[int]]
    layer: int = LAYER
    _answers: dict[Any, Answer] = field(default_factory=dict)

    @property
    def manifest(self) -> Manifest:
        return self.operator.edit_set.manifest

    @torch.inference_mode()
    def z(self, tokens: list[int]) -> Tensor:
        """The residual stream behind layer l, [P, d]."""
        output = self.hf(torch.tensor([tokens]), output_hidden_states=True)
        return output.hidden_states[self.layer + 1][0]

    def ard(self, tokens: list[int], edit_from: int | None = None) -> float:
        """The decision's statistic of a prompt."""
        decision = self.manifest.decision
        e = len(tokens) - 1 if edit_from is None else edit_from
        begin, end = scored_span(tokens, e, decision.scope, decision.turn)
        window = self.z(tokens)[begin:end]
        return float(self.operator.ard(*self.operator.distances(window)))

    def answer(
        self, tokens: list[int], count: int, edits: bool = True, edit_from: int | None = None
    ) -> Answer:
        """The greedy continuation of a prompt, `count` tokens."""
        key = (tuple(tokens), count, edits, edit_from)
        if key not in self._answers:
            ard = self.ard(tokens, edit_from) if edits else float("inf")
            on = edits and ard <= self.manifest.decision.tau
            e = len(tokens) - 1 if edit_from is None else edit_from
            self._answers[key] = self._generate(tokens, count, e if on else None, ard)
        return self._answers[key]

    @torch.inference_mode()
    def _generate(self, tokens: list[int], count: int, e: int | None, ard: float) -> Answer:
        """The answer when edits begin at e, or nowhere."""
        sequence, gaps = list(tokens), []

        def substitute(module: Any, args: Any, output: Any) -> Any:
            z = output[0] if isinstance(output, tuple) else output
            if e is not None:
                carried = self._carried(z[0], tokens, e)
                start = 1 if self.manifest.position == "sequence" else e
                z[:, start:] = self.operator.edited(z[:, start:])
                z[:, e] += carried
            return output

        hook = self.hf.model.layers[self.layer].register_forward_hook(substitute)
        try:
            for _ in range(count):
                logits = self.hf(torch.tensor([sequence])).logits[0, -1]
                best = logits.log_softmax(-1).topk(2)
                gaps.append(float(best.values[0] - best.values[1]))
                sequence.append(int(best.indices[0]))
        finally:
            hook.remove()
        return Answer(tuple(sequence[len(tokens) :]), e is not None, ard, tuple(gaps))

    def _carried(self, z: Tensor, tokens: list[int], e: int) -> Tensor:
        """What the scored tokens carry to e, [d]."""
        decision = self.manifest.decision
        begin, end = scored_span(tokens, e, decision.scope, decision.turn)
        return self.operator.carried_by(z[begin:end])


def tiny_served(
    root: Path,
    form: str = "delta",
    scope: str = "window",
    statistic: str = "relative",
    layer: int = LAYER,
) -> TinyServed:
    """Write a model, an SAE and a set that fires on its edited prompts and on no other."""
    from transformers import AutoModelForCausalLM

    folder = root / "model"
    if not folder.exists():
        tiny_model(folder, layers=LAYERS, hidden=HIDDEN)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(7)
    edited = [_tokens(generator, length) for length in (12, 23, 34, 57, 90)]
    unrelated = [_tokens(generator, length) for length in (2, 9, 17, 31, 33, 64, 65, 120)]
    nothing: Any = None
    served = TinyServed(folder, root / "set", nothing, hf, edited, unrelated, layer)
    sae = _random_sae(torch.cat([served.z(p)[1:] for p in [*edited, *unrelated]])).save(
        root / "sae"
    )
    change = _scoring_change(served, sae)
    rows = torch.arange(0, LATENTS, 2)
    noise = torch.randn(len(rows), HIDDEN, generator=generator) / HIDDEN**0.5
    shared = FORMS[form]["activation"] == "topk"
    edit = change if shared else DecoderChange(rows, 2 * noise)
    manifest = _manifest(folder, sae, root, form, scope, statistic, layer)
    carried = DecoderChange(rows.clone(), 2 * noise.flip(0)) if manifest.carries else None
    draft = EditSet(manifest, change, edit, Golden.none(), [{}], carried=carried)
    served.operator = EditOperator.build(draft, sae)
    tau = _tau(served)
    decision = draft.manifest.decision.model_copy(update={"tau": tau})
    manifest = manifest.model_copy(update={"decision": decision})
    complete = with_golden(replace(draft, manifest=manifest), sae, served.z(edited[0])[1:5])
    complete.save(root / "set")
    served.operator = EditOperator.build(complete, sae)
    return served


def _tokens(generator: torch.Generator, length: int) -> list[int]:
    """A random prompt; 1 opens it, as a beginning-of-text token would."""
    body = torch.randint(3, VOCABULARY, (length - 1,), generator=generator)
    return [1, *body.tolist()]


def _random_sae(z: Tensor) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(LATENTS, HIDDEN, generator=generator)
    rows = rows / rows.norm(dim=1, keepdim=True)
    scale = float(((z - z.mean(0)) @ rows.T).std())
    return SparseAutoencoder(rows, torch.full((LATENTS,), -scale), rows * 0.5, z.mean(0), K)


def _scoring_change(served: TinyServed, sae: SparseAutoencoder) -> DecoderChange:
    """ΔW with which the edited prompts are reconstructed and others stay as they were."""

    def codes(z: Tensor) -> Tensor:
        acts, indices = sae.encode(z)
        return torch.zeros(len(z), LATENTS).scatter_(1, indices, acts)

    wanted, other = (
        torch.cat([served.z(prompt)[1:] for prompt in prompts])
        for prompts in (served.edited, served.unrelated)
    )
    h = torch.cat([codes(wanted), codes(other)])
    target = torch.cat([wanted - sae.decode(*sae.encode(wanted)), torch.zeros_like(other)])
    gram = h.T @ h
    ridge = 0.05 * gram.diagonal().mean() * torch.eye(LATENTS)
    return DecoderChange(torch.arange(LATENTS), torch.linalg.solve(gram + ridge, h.T @ target))


def _manifest(
    folder: Path,
    sae: SparseAutoencoder,
    root: Path,
    form: str,
    scope: str,
    statistic: str,
    layer: int,
) -> Manifest:
    return Manifest(
        model=ModelIdentity(
            name="tiny",
            fingerprint=fingerprint_model(folder),
            hidden_size=HIDDEN,
            num_layers=LAYERS,
            dtype="float32",
        ),
        sae=SaeIdentity(
            path=relative_sae_path(root / "sae", root / "set"),
            fingerprint=sae.fingerprint,
            num_latents=LATENTS,
            k=K,
        ),
        layer=layer,
        solver="joint",
        facts=1,
        decision=Decision(
            statistic=statistic,
            tau=1.0,
            alpha=ALPHA if statistic == "absolute" else None,
            scope=SCOPES[scope],
            max_norm=1e6,
            turn=TurnMarkers(start=[100, 101], end=[102, 103]),
        ),
        **FORMS[form],
    )


def _tau(served: TinyServed) -> float:
    """Between the edited prompts and the rest, where the two are far apart."""
    inside = max(served.ard(prompt) for prompt in served.edited)
    outside = min(served.ard(prompt) for prompt in served.unrelated)
    assert inside * 1.2 < outside, (inside, outside)
    return (inside * outside) ** 0.5
