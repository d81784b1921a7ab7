"""Rel, Gen, Loc and near, as the paper defines them: token accuracy under teacher forcing."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from microedit_trainer.contexts import ContextName, Contexts, PromptTokens
from microedit_trainer.facts import Fact, Probe, swap_subjects
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.residual_store import ResidualStore
from microedit_trainer.stored_residuals import StoredPrompt, answer_nll, predictions
from microedit_vllm.artifact import EditOperator, EditSet, SparseAutoencoder

# Prompts that are run together: memory does not grow with how many there are.
SLICE = 128
T = TypeVar("T")


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
    store: ResidualStore

    @classmethod
    def build(
        cls, lm: LanguageModel, operator: EditOperator, kept: Path | None = None
    ) -> "TorchEngine":
        """With a store of its own; `kept`: the folder that keeps residuals for later runs."""
        manifest = operator.edit_set.manifest
        store = ResidualStore(lm, manifest.layer, manifest.decision.max_norm, kept)
        return cls(lm, operator, store)

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

    @torch.no_grad()
    def ards(self, prompts: Sequence[PromptTokens]) -> Tensor:
        """The decision's statistic of each prompt: [N] fp32."""
        parts = [self.ards_of(self.store.of(some)) for some in _slices(prompts)]
        return torch.cat(parts) if parts else torch.empty(0)

    @torch.no_grad()
    def ards_of(self, stored: Sequence[StoredPrompt]) -> Tensor:
        """The same from residuals that are known."""
        found = []
        for some in _slices(stored):
            scored = [p.z[p.scored].to(self.operator.device) for p in some]
            distances = self.operator.distances(torch.cat(scored))
            parts = [part.split([len(z) for z in scored]) for part in distances]
            found += [self.operator.ard(*pair) for pair in zip(*parts, strict=True)]
        return torch.stack(found) if found else torch.empty(0)

    def ard(self, prompt: StoredPrompt) -> Tensor:
        """The decision's statistic of one prompt's residuals: scalar fp32."""
        scored = prompt.z[prompt.scored].to(self.operator.device)
        return self.operator.ard(*self.operator.distances(scored))

    def edited(self, prompts: Sequence[PromptTokens]) -> list[Outcome]:
        return [o for some in _slices(prompts) for o in self.outcomes_of(self.store.of(some))]

    @torch.no_grad()
    def outcomes_of(self, stored: Sequence[StoredPrompt]) -> list[Outcome]:
        """`edited` from residuals that are known, slice by slice."""
        found = []
        for some in _slices(stored):
            ards = self.ards_of(some)
            on = self.operator.is_on(ards).tolist()
            answers = predictions(self.lm, self._layer, some, self._as_served(some, on))
            outcomes = zip(answers, ards.tolist(), on, strict=True)
            found += [Outcome(answer, ard, o) for answer, ard, o in outcomes]
        return found

    @torch.no_grad()
    def perplexities(self, prompts: Sequence[PromptTokens]) -> tuple[Tensor, Tensor]:
        before: list[Tensor] = []
        after: list[Tensor] = []
        for some in _slices(prompts):
            stored = self.store.of(some)
            on = self.operator.is_on(self.ards_of(stored)).tolist()
            plain, edited = [p.z for p in stored], self._as_served(stored, on)
            for side, residuals in ((before, plain), (after, edited)):
                nll = answer_nll(self.lm, self._layer, stored, residuals)
                side += [own.mean().exp() for own in nll]
        return torch.stack(before), torch.stack(after)

    def substituted(self, prompt: StoredPrompt) -> Tensor:
        """z of a prompt whose switch is on, as the layers above get it: [P + A, d], z's dtype."""
        return self._as_served([prompt], [True])[0]

    def _as_served(self, prompts: Sequence[StoredPrompt], on: Sequence[bool]) -> list[Tensor]:
        """z of each prompt, edited where its switch is on."""
        sequence = self.operator.edit_set.manifest.position == "sequence"
        starts = [1 if sequence else p.edited.start for p in prompts]
        device = self.operator.device
        where = [
            (p.z.to(device), start) for p, start, o in zip(prompts, starts, on, strict=True) if o
        ]
        if not where:
            return [p.z for p in prompts]
        edited = self.operator.edited(torch.cat([z[start:] for z, start in where]))
        parts = iter(edited.split([len(z) - start for z, start in where]))
        residuals = []
        for prompt, start, is_on in zip(prompts, starts, on, strict=True):
            z = prompt.z
            if is_on:
                z = z.clone()
                changed = next(parts)
                if self.operator.carries:
                    scored = prompt.z[prompt.scored].to(device)
                    changed[prompt.edited.start - start] += self.operator.carried_by(scored)
                z[start:] = changed.to(z.dtype)
            residuals.append(z)
        return residuals

    @property
    def _layer(self) -> int:
        return self.operator.edit_set.manifest.layer

    @torch.no_grad()
    def plain(self, prompts: Sequence[PromptTokens]) -> list[Tensor]:
        found = []
        for some in _slices(prompts):
            stored = self.store.of(some)
            found += predictions(self.lm, self._layer, stored, [p.z for p in stored])
        return found

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


def _slices(prompts: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(prompts), SLICE):
        yield prompts[start : start + SLICE]


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
    loc, fire_loc = agreement(engine, [render(*_probe(p)) for f in facts for p in f.locality])
    near, fire_near = agreement(engine, [render(f.prompt, f.target) for f in others])
    if subjects is None:
        subjects = [other.subject for other in others if other.subject]
    swapped = [render(f.prompt, facts[0].target) for f in swap_subjects(facts, subjects)]
    near_swapped, fire_swapped = agreement(engine, swapped)
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


def right_shares(prompts: Sequence[PromptTokens], answers: Sequence[Tensor]) -> Tensor:
    """Of each prompt the share of its answer's tokens that are right: [N] fp32, N ≥ 1.

    Args:
        answers: greedy tokens [A] at the answer's places.
    """
    right = [
        (answer == torch.tensor(prompt.answer_ids)).float().mean()
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return torch.stack(right)


def _accuracy(
    prompts: Sequence[PromptTokens], outcomes: Sequence[Outcome]
) -> tuple[float | None, float | None]:
    if not prompts:
        return None, None
    shares = right_shares(prompts, [outcome.answer for outcome in outcomes])
    return float(shares.mean()), float((shares == 1).float().mean())


def agreement(engine: Engine, prompts: Sequence[PromptTokens]) -> tuple[float | None, float | None]:
    """Share of answer tokens unchanged, and of prompts whose switch is on; None without prompts."""
    if not prompts:
        return None, None
    outcomes, plain = engine.edited(prompts), engine.plain(prompts)
    same = [(o.answer == p).float().mean() for o, p in zip(outcomes, plain, strict=True)]
    return float(torch.stack(same).mean()), _fire(outcomes)


def _fire(outcomes: Sequence[Outcome]) -> float | None:
    return sum(o.on for o in outcomes) / len(outcomes) if outcomes else None
