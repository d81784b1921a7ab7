"""Which facts a prompt's firing rows come from: the facts' own prompts, run once more."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from microedit_trainer.audit.explanation import NearFact, RowShare
from microedit_trainer.audit.firing import ChangeAtTokens, FiredChanges, row_strengths
from microedit_trainer.calibration import LARGE
from microedit_trainer.contexts import ContextName, Contexts
from microedit_trainer.evaluation import TorchEngine
from microedit_trainer.facts import Fact
from microedit_trainer.language_model import Progress
from microedit_trainer.stored_residuals import StoredPrompt, store_residuals
from microedit_vllm.artifact import EditOperator, EditSet

_FACTS_AT_ONCE = 64


@dataclass(frozen=True)
class StoredFact:
    """A fact as the set names it: its number, from 1, its texts, and its own ARD."""

    number: int
    fact: Fact
    ard: float | None


@dataclass(frozen=True)
class FactOverlap:
    """What F facts have in common with a prompt.

    Attributes:
        cosines, edit_cosines: [F] fp32 in [0, 1]; see `NearFact`.
        scoring, edit, carried: of each change's strongest rows Σ h over each fact's own tokens,
            [F, r] fp32.
    """

    facts: Sequence[StoredFact]
    cosines: Tensor
    edit_cosines: Tensor
    scoring: Tensor
    edit: Tensor
    carried: Tensor

    def nearest(self, count: int) -> tuple[NearFact, ...]:
        """The facts of the largest cosines; none whose cosine is 0."""
        order = self.cosines.argsort(descending=True, stable=True)[:count].tolist()
        return tuple(
            NearFact(
                fact=self.facts[i].number,
                prompt=self.facts[i].fact.prompt,
                target=self.facts[i].fact.target,
                overlap=float(self.cosines[i]),
                edit_overlap=float(self.edit_cosines[i]),
                ard=self.facts[i].ard,
            )
            for i in order
            if self.cosines[i] > 0
        )

    def behind_rows(self, acts: Tensor, count: int) -> list[tuple[RowShare, ...]]:
        """Per row the facts of the largest shares: [F, r] of one of the changes → r tuples."""
        shares = acts / acts.sum(0).clamp(min=torch.finfo(torch.float).tiny)
        return [
            tuple(
                RowShare(self.facts[i].number, self.facts[i].fact.prompt, float(column[i]))
                for i in column.argsort(descending=True, stable=True)[:count].tolist()
                if column[i] > 0
            )
            for column in shares.T
        ]


def stored_facts(edit_set: EditSet, limit: int) -> list[StoredFact]:
    """The first `limit` facts that the set remembers; lines without a prompt are passed over."""
    found = [_stored_fact(number, line) for number, line in enumerate(edit_set.facts, start=1)]
    return [fact for fact in found if fact is not None][:limit]


def _stored_fact(number: int, line: dict[str, Any]) -> StoredFact | None:
    # Any JSON may stand there; half a character (\ud800) too, which no tokenizer takes.
    texts = [line.get(name) for name in ("prompt", "target", "subject")]
    prompt, target, subject = [_encodable(t) if isinstance(t, str) else "" for t in texts]
    if not prompt.strip():
        return None
    ard = line.get("ard")
    known = float(ard) if isinstance(ard, int | float) and 0 <= ard <= LARGE else None
    return StoredFact(number, Fact(prompt, target, subject or None), known)


def _encodable(text: str) -> str:
    return text.encode(errors="replace").decode()


def trained_context(edit_set: EditSet, asked: ContextName) -> ContextName:
    """The context that the facts were trained in: the asked one where they were, else another."""
    names = edit_set.manifest.hyperparameters.get("contexts")
    trained = names if isinstance(names, list) else []
    if asked in trained:
        return asked
    return "chat" if trained == ["chat"] else "bare"


@torch.no_grad()
def compare_facts(
    engine: TorchEngine,
    contexts: Contexts,
    context: ContextName,
    facts: Sequence[StoredFact],
    fired: FiredChanges,
    rows: int,
    progress: Progress,
) -> FactOverlap:
    """Run the facts' own prompts up to the edited layer and compare what fires.

    Args:
        context: how the facts are put.
        fired: what fires on the prompt that is explained.
        rows: how many of each change's strongest rows are asked about.
        progress: called with the number of facts done since the last call.
    """
    manifest = engine.operator.edit_set.manifest
    asked = [change.strongest_rows(rows) for change in fired.all]
    found: list[tuple[Tensor, ...]] = []
    for first in range(0, len(facts), _FACTS_AT_ONCE):
        batch = [stored.fact for stored in facts[first : first + _FACTS_AT_ONCE]]
        rendered = [contexts.render(context, f.prompt, f.target, f.subject) for f in batch]
        for prompt in store_residuals(
            engine.lm, manifest.layer, rendered, manifest.decision.max_norm, progress=progress
        ):
            found.append(_overlap(engine.operator, prompt, fired, asked))
    if not facts:
        empty = torch.zeros(0)
        return FactOverlap(facts, empty, empty, *[torch.zeros(0, len(of)) for of in asked])
    return FactOverlap(facts, *[torch.stack(column).cpu() for column in zip(*found, strict=True)])


def _overlap(
    operator: EditOperator, prompt: StoredPrompt, fired: FiredChanges, asked: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """One fact's line of `FactOverlap`."""
    own = operator.scoring_acts(prompt.z[_own_tokens(operator, prompt)]).sum(0)
    own_edit = operator.edit_acts(prompt.z[prompt.edited])
    own_carried = ChangeAtTokens.carried(operator, prompt.z, prompt.scored).acts
    scoring, edit = fired.scoring, fired.edit
    return (
        cosine_similarity(row_strengths(own, scoring.change), scoring.strengths, dim=0),
        cosine_similarity(row_strengths(own_edit[0], edit.change), edit.strengths, dim=0),
        own[asked[0]],
        own_edit.sum(0)[asked[1]],
        own_carried[asked[2]],
    )


def _own_tokens(operator: EditOperator, prompt: StoredPrompt) -> Tensor:
    """The tokens that the scoring change was trained to reconstruct: [S] int64."""
    if operator.carries:
        return prompt.about
    joint = operator.edit_set.manifest.solver == "joint"
    return prompt.identifying if joint else prompt.scored
