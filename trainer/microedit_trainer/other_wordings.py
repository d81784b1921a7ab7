"""Residuals of what else a joint solve looks at: facts in other words, and about other subjects."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import Tensor

from microedit_trainer.calibration_prompts import other_subjects
from microedit_trainer.contexts import (
    ContextName,
    Contexts,
    PromptTokens,
    guess_subject,
    mentions,
    rewordings,
)
from microedit_trainer.facts import Fact, swap_subjects
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.model_wordings import ModelWordings
from microedit_trainer.residual_store import ResidualStore
from microedit_trainer.solvers.problem import Stages
from microedit_trainer.stored_residuals import StoredPrompt


@dataclass(frozen=True)
class OtherWordings:
    """Attributes:
    names: the contexts that the facts are trained in.
    stages: shown how far the layers below are.
    """

    lm: LanguageModel
    contexts: Contexts
    names: Sequence[ContextName]
    store: ResidualStore
    stages: Stages

    def wordings(self, facts: Sequence[Fact], most: int, folder: Path) -> list[tuple[str, ...]]:
        """The model's own of each fact's question, so many at most, kept in a folder."""
        if not most:
            return [()] * len(facts)

        def shown(done: int, total: int) -> None:
            self.stages("wording", done / total, f"{total} facts")

        return ModelWordings(self.lm, folder).of(facts, most, shown)

    def reworded(self, facts: Sequence[Fact], wordings: Sequence[tuple[str, ...]]) -> list[Tensor]:
        """z of each prompt in other words, as in `EditProblem.reworded`.

        Args:
            wordings: further ones of each fact.
        """
        rendered = [
            self.contexts.fitting(name, (*rewordings(fact.prompt), *further))
            for name in self.names
            for fact, further in zip(facts, wordings, strict=True)
        ]
        flat = [prompt for others in rendered for prompt in others]
        if not flat:
            return []

        def shown(done: int, total: int) -> None:
            self.stages("other words", done / total, f"{total} prompts")

        found = self.store.decisions_of(flat, shown)
        return list(found.split([len(others) for others in rendered]))

    def worded(
        self, facts: Sequence[Fact], wordings: Sequence[tuple[str, ...]]
    ) -> list[StoredPrompt]:
        """As in `EditProblem.worded`."""
        rendered = [
            prompt
            for name in self.names
            for fact, own in zip(facts, wordings, strict=True)
            for prompt in self.contexts.fitting(name, own, fact.subject)
        ]

        def shown(done: int, total: int) -> None:
            self.stages("wordings", done / total, f"{total} prompts")

        return self.store.of(rendered, shown) if rendered else []

    def mentions(self, facts: Sequence[Fact]) -> list[list[Tensor]]:
        """z of each fact's subject in other texts, as in `EditProblem.mentions`.

        Measured at 1,600 facts: with those in chat as well, τ finds fewer of the edited prompts.
        """
        rendered = [self._mentions(self.names[0], fact) for fact in facts]
        flat = [prompt for others in rendered for prompt in others]

        def shown(done: int, total: int) -> None:
            self.stages("mentions", done / total, f"{total} texts")

        found = iter(self.store.subjects_of(flat, shown) if flat else [])
        return [[z for z in islice(found, len(others)) if len(z)] for others in rendered]

    def _mentions(self, name: ContextName, fact: Fact) -> list[PromptTokens]:
        """None where the subject is not known."""
        subject = fact.subject or guess_subject(fact.prompt)
        if not subject:
            return []
        texts = self.contexts.fitting(name, mentions(subject), subject)
        return [text for text in texts if text.subject_end.start < text.subject_end.stop]

    def swapped(self, facts: Sequence[Fact], most: int) -> list[StoredPrompt]:
        """As in `EditProblem.swapped`, of at most so many facts: those of every second, third, …"""
        if not most:
            return []
        others = swap_subjects(facts, other_subjects())
        others = others[:: math.ceil(len(others) / most) or 1]
        # Behind a long passage the subject lies outside of what is scored: all of that is the
        # fact's own.
        own = {p.scored_ids for p in self._rendered(facts)}
        told = [p for p in self._rendered(others) if p.scored_ids not in own]

        def shown(done: int, total: int) -> None:
            self.stages("other subjects", done / total, f"{total} prompts")

        return self.store.of(told, shown) if told else []

    def _rendered(self, facts: Sequence[Fact]) -> list[PromptTokens]:
        return [
            prompt
            for name in self.names
            for fact in facts
            for prompt in self.contexts.fitting(name, [fact.prompt], fact.subject)
        ]
