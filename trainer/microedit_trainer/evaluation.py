"""Rel, Gen, Loc and near, as the paper defines them: token accuracy under teacher forcing."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from microedit_trainer.contexts import ContextName, Contexts, PromptTokens
from microedit_trainer.facts import Fact, Probe, swap_subjects
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.stored_residuals import (
    StoredPrompt,
    answer_nll,
    predictions,
    store_residuals,
)
from microedit_vllm.artifact import EditOperator, EditSet, SparseAutoencoder


@dataclass(frozen=True)
class Outcome:
    """What a model made of one prompt: greedy tokens [A] at the answer's places, ARD, switch."""

    answer: Tensor
    ard: float
    on: bool


class Engine(Protocol):
    """Whoever runs the prompts: the trainer's own forward, or a server."""

    def edited(self, prompts: Sequence[PromptTokens]) -> list[Outcome]:
        """With the edit set."""

    def plain(self, prompts: Sequence[PromptTokens]) -> list[Tensor]:
        """Greedy tokens [A] without it."""

    def perplexities(self, prompts: Sequence[PromptTokens]) -> tuple[Tensor, Tensor] | None:
        """Perplexity of each answer without and with the edit set: [N] fp32 each.

        None where the engine does not tell likelihoods.
        """


@dataclass(frozen=True)
class TorchEngine:
    """The edit set in plain torch over the Hugging Face model.

    Attributes:
        store: residuals of the prompts seen so far, in the CPU's memory: a calibration stores more
            of them than the edit run does. Model and operator may be on different devices.
    """

    lm: LanguageModel
    operator: EditOperator
    store: dict[PromptTokens, StoredPrompt]

    @classmethod
    def build(cls, lm: LanguageModel, operator: EditOperator) -> "TorchEngine":
        return cls(lm, operator, {})

    @classmethod
    def load(
        cls, lm: LanguageModel, edit_set: EditSet, folder: Path, sae: Path | None = None
    ) -> "TorchEngine":
        """With the SAE of the set in `folder`, or with the one in `sae`, proven to be the set's.

        Raises:
            MicroEditError: no SAE there, or another one.
        """
        where = edit_set.sae_folder(folder, sae)
        encoder = SparseAutoencoder.load(where)
        edit_set.check_sae(encoder, where)
        operator = EditOperator.build(edit_set, encoder.to(lm.device))
        operator.check_golden()
        return cls.build(lm, operator)

    def stored(self, prompts: Sequence[PromptTokens]) -> list[StoredPrompt]:
        """The prompts' residuals; the layers up to l run where they are not known yet."""
        manifest = self.operator.edit_set.manifest
        new = [p for p in dict.fromkeys(prompts) if p not in self.store]
        if new:
            residuals = store_residuals(self.lm, manifest.layer, new, manifest.decision.max_norm)
            self.store.update(zip(new, (r.to("cpu") for r in residuals), strict=True))
        return [self.store[p] for p in prompts]

    @torch.no_grad()
    def ards(self, prompts: Sequence[PromptTokens]) -> Tensor:
        """The decision's statistic of each prompt: [N] fp32."""
        return torch.stack([self.ard(p) for p in self.stored(prompts)])

    def ard(self, prompt: StoredPrompt) -> Tensor:
        """The decision's statistic of one prompt's residuals: scalar fp32."""
        scored = prompt.z[prompt.scored].to(self.operator.device)
        return self.operator.ard(*self.operator.distances(scored))

    @torch.no_grad()
    def edited(self, prompts: Sequence[PromptTokens]) -> list[Outcome]:
        if not prompts:
            return []
        stored = self.stored(prompts)
        ards = [self.ard(p) for p in stored]
        on = [bool(self.operator.is_on(ard)) for ard in ards]
        residuals = [self.substituted(p) if o else p.z for p, o in zip(stored, on, strict=True)]
        answers = predictions(self.lm, self.operator.edit_set.manifest.layer, stored, residuals)
        return [Outcome(a, float(r), o) for a, r, o in zip(answers, ards, on, strict=True)]

    @torch.no_grad()
    def perplexities(self, prompts: Sequence[PromptTokens]) -> tuple[Tensor, Tensor]:
        stored = self.stored(prompts)
        plain = [p.z for p in stored]
        edited = [
            self.substituted(p) if bool(self.operator.is_on(self.ard(p))) else p.z for p in stored
        ]
        layer = self.operator.edit_set.manifest.layer
        nll = [answer_nll(self.lm, layer, stored, z) for z in (plain, edited)]
        before, after = (torch.stack([own.mean() for own in side]).exp() for side in nll)
        return before, after

    def substituted(self, prompt: StoredPrompt) -> Tensor:
        """z of a prompt whose switch is on, as the layers above get it: [P + A, d], z's dtype."""
        z = prompt.z.clone()
        start = 1 if self.operator.edit_set.manifest.position == "sequence" else prompt.edited.start
        z[start:] = self.operator.edited(prompt.z[start:].to(self.operator.device)).to(z.dtype)
        return z

    @torch.no_grad()
    def plain(self, prompts: Sequence[PromptTokens]) -> list[Tensor]:
        if not prompts:
            return []
        stored = self.stored(prompts)
        layer = self.operator.edit_set.manifest.layer
        return predictions(self.lm, layer, stored, [p.z for p in stored])

    @torch.no_grad()
    def greedy(self, prompt: PromptTokens, on: bool) -> Iterator[tuple[int, float]]:
        """The greedy answer, with the edit or without, whatever the switch says; it has no end.

        Args:
            prompt: whose own answer is not looked at.

        Yields:
            a token, and how far its logit is from the next best one's.
        """
        manifest = self.operator.edit_set.manifest
        ids = list(prompt.prompt_ids)
        while True:
            z = self.lm.lower(torch.tensor([ids]), manifest.layer)[0]
            if on:
                sinks = z.float().norm(dim=-1) > manifest.decision.max_norm
                z = self.substituted(StoredPrompt(prompt, z, sinks))
            logits = self.lm.logits(self.lm.upper(z[None], manifest.layer)[0, -1])
            first, second = logits.topk(2).values.tolist()
            ids.append(int(logits.argmax()))
            yield ids[-1], first - second


@dataclass(frozen=True)
class Scores:
    """The figures of one evaluation; shares in [0, 1], None where nothing could be scored.

    Attributes:
        rel, gen: share of answer tokens right, on the edited prompts and on their paraphrases.
        rel_exact: share of edited prompts with every answer token right.
        ppl_before, ppl_after: perplexity of the new answers without and with the edit set, the
            mean over prompts of exp(mean NLL of the answer's tokens): the reliability of answers
            that are whole sentences, as WISE and the paper report it for SelfCheckGPT.
        portability: share of answer tokens right on prompts whose answer follows from an edit.
        loc, near: share of answer tokens unchanged, on locality prompts and on other prompts of
            the same kind as the edited ones; near_swapped: on the edited prompts with one of
            their subjects.
        fire_*: share of prompts whose switch is on.
    """

    facts: int
    context: ContextName
    rel: float
    rel_exact: float
    ppl_before: float | None
    ppl_after: float | None
    gen: float | None
    portability: float | None
    loc: float | None
    near: float | None
    near_swapped: float | None
    fire_edit: float
    fire_para: float | None
    fire_portability: float | None
    fire_loc: float | None
    fire_near: float | None
    fire_near_swapped: float | None

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def evaluate(
    engine: Engine,
    contexts: Contexts,
    facts: Sequence[Fact],
    others: Sequence[Fact],
    context: ContextName,
    subjects: Sequence[str] | None = None,
) -> Scores:
    """Score an edit set.

    Args:
        facts: the edited facts.
        others: records of the same kind that were neither edited nor calibrated on.
        context: how the prompts are asked.
        subjects: what the edited prompts are asked about instead, for `near_swapped`; default: what
            `others` are about.
    """

    def render(prompt: str, answer: str, subject: str | None = None) -> PromptTokens:
        return contexts.render(context, prompt, answer, subject)

    edited = [render(f.prompt, f.target) for f in facts]
    paraphrased = [render(p, f.target) for f in facts for p in f.paraphrases]
    implied = [render(p.prompt, p.answer) for f in facts for p in f.portability]
    outcomes, gen_outcomes = engine.edited(edited), engine.edited(paraphrased)
    implied_outcomes = engine.edited(implied)
    rel, rel_exact = _accuracy(edited, outcomes)
    gen, _ = _accuracy(paraphrased, gen_outcomes)
    portability, _ = _accuracy(implied, implied_outcomes)
    ppl = engine.perplexities(edited)
    loc, fire_loc = _agreement(engine, [render(*_probe(p)) for f in facts for p in f.locality])
    near, fire_near = _agreement(engine, [render(f.prompt, f.target) for f in others])
    if subjects is None:
        subjects = [other.subject for other in others if other.subject]
    swapped = [render(p, facts[0].target) for p in swap_subjects(facts, subjects)]
    near_swapped, fire_swapped = _agreement(engine, swapped)
    assert rel is not None and rel_exact is not None
    return Scores(
        facts=len(facts),
        context=context,
        rel=rel,
        rel_exact=rel_exact,
        ppl_before=float(ppl[0].mean()) if ppl else None,
        ppl_after=float(ppl[1].mean()) if ppl else None,
        gen=gen,
        portability=portability,
        loc=loc,
        near=near,
        near_swapped=near_swapped,
        fire_edit=_fire(outcomes) or 0.0,
        fire_para=_fire(gen_outcomes),
        fire_portability=_fire(implied_outcomes),
        fire_loc=fire_loc,
        fire_near=fire_near,
        fire_near_swapped=fire_swapped,
    )


def _probe(probe: Probe) -> tuple[str, str]:
    """A probe without an answer is scored over its next token alone."""
    return probe.prompt, probe.answer.strip() or "the"


def _accuracy(
    prompts: Sequence[PromptTokens], outcomes: Sequence[Outcome]
) -> tuple[float | None, float | None]:
    if not prompts:
        return None, None
    right = [
        (o.answer == torch.tensor(p.answer_ids)).float().mean()
        for p, o in zip(prompts, outcomes, strict=True)
    ]
    shares = torch.stack(right)
    return float(shares.mean()), float((shares == 1).float().mean())


def _agreement(
    engine: Engine, prompts: Sequence[PromptTokens]
) -> tuple[float | None, float | None]:
    if not prompts:
        return None, None
    outcomes, plain = engine.edited(prompts), engine.plain(prompts)
    same = [(o.answer == p).float().mean() for o, p in zip(outcomes, plain, strict=True)]
    return float(torch.stack(same).mean()), _fire(outcomes)


def _fire(outcomes: Sequence[Outcome]) -> float | None:
    return sum(o.on for o in outcomes) / len(outcomes) if outcomes else None
