"""The prompts that τ is calibrated on, and that golden prompts are taken from."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files

from microedit_trainer.contexts import ContextName, Contexts, PromptTokens
from microedit_trainer.evaluation import TorchEngine
from microedit_trainer.facts import Fact, swap_subjects
from microedit_trainer.golden_prompts import golden_prompts
from microedit_vllm.artifact import GoldenPrompt

# Facts among which the golden prompts are looked for.
GOLDEN_FACTS = 16
# Facts whose wording is tried with another subject of each kind, when τ is chosen. A share of 4%
# is then known to some 1%, since a name that is mixed up is so in many wordings.
MOST_SWAPPED = 2000


@dataclass(frozen=True)
class CalibrationPrompts:
    """Prompts of a run that edits some facts.

    Attributes:
        names: the contexts that are trained in.
        hold_out: records of the same kind as the facts, never edited.
        swaps: whether the facts' own wordings about another subject must stay off. Not with the
            paper's solver: it reconstructs the whole prompt, which leaves nothing to tell them
            apart.
    """

    contexts: Contexts
    names: tuple[ContextName, ...]
    hold_out: Sequence[Fact]
    swaps: bool

    def by_group(self, facts: Sequence[Fact]) -> dict[str, list[PromptTokens]]:
        """*held_out*, *swapped*, *invented* and *ordinary* ones, each in every context.

        Invented names have a bound of their own: facts about such are mixed up among each other far
        more often than with names that the model knows.

        Raises:
            PromptTooLongError: a held-out one; of the others those that fit are taken.
        """
        held_out = [
            self.contexts.render(n, fact.prompt) for fact in self.hold_out for n in self.names
        ]
        prompts = {"ordinary": ordinary_lines()[1::2]}
        if self.swaps:
            prompts["swapped"] = self.swapped(facts)
            prompts["invented"] = self._about(_shipped_lines("invented_subjects.txt"), facts)
        return {"held_out": held_out} | {g: self._fitting(some) for g, some in prompts.items()}

    def swapped(self, facts: Sequence[Fact]) -> list[str]:
        """The facts' wordings about subjects of held-out records, else about shipped names."""
        return self._about(unedited_subjects(self.hold_out), facts)

    def _about(self, subjects: Sequence[str], facts: Sequence[Fact]) -> list[str]:
        """The facts' wordings about these, where the switch could see that they are; of very many
        some.

        Which ones is up to their digests: every second or third would only have every second or
        third name, and another fact would change them all.

        Behind a long passage the subject lies outside of what is scored: the tokens that are, are
        the fact's own, and no τ tells the two apart.
        """

        def scored(prompt: str) -> tuple[int, ...] | None:
            fitting = self.contexts.fitting(self.names[0], [prompt])
            return fitting[0].scored_ids if fitting else None

        unseen = {scored(fact.prompt) for fact in facts} | {None}
        others = swap_subjects(facts, subjects)
        seen = [other.prompt for other in others if scored(other.prompt) not in unseen]
        if len(seen) <= MOST_SWAPPED:
            return seen
        return sorted(seen, key=lambda prompt: sha256(prompt.encode()).digest())[:MOST_SWAPPED]

    def golden(self, engine: TorchEngine, facts: Sequence[Fact]) -> tuple[GoldenPrompt, ...]:
        """Golden prompts: some facts' own, near ones, and ordinary ones.

        Args:
            engine: with the finished set.
        """

        def golden(prompts: Sequence[str], on: bool, count: int) -> list[GoldenPrompt]:
            return golden_prompts(engine, self._fitting(prompts), on, count)

        near = self.swapped(facts)
        return (
            *golden([f.prompt for f in facts[:GOLDEN_FACTS]], on=True, count=8),
            *golden(near[:GOLDEN_FACTS], on=False, count=2),
            *golden(ordinary_lines()[1::2][:GOLDEN_FACTS], on=False, count=2),
        )

    def _fitting(self, prompts: Sequence[str]) -> list[PromptTokens]:
        return [
            found for p in prompts for n in self.names for found in self.contexts.fitting(n, [p])
        ]


def ordinary_lines() -> list[str]:
    """Everyday prompts that ship with the trainer: passages, questions, requests, code."""
    return _shipped_lines("ordinary_prompts.txt")


def unedited_subjects(others: Sequence[Fact]) -> list[str]:
    """What else a fact's wording could be about: other records' subjects, else shipped names."""
    return [f.subject for f in others if f.subject] or _shipped_lines("subjects.txt")


def other_subjects() -> list[str]:
    """Shipped names beside those that choose τ: what the scoring change learns to leave alone."""
    return _shipped_lines("other_subjects.txt")


def _shipped_lines(name: str) -> list[str]:
    text = files("microedit_trainer").joinpath("data", name).read_text(encoding="utf-8")
    return [line for line in text.split("\n") if line.strip()]
