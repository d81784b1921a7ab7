"""A fact, and what facts mean to each other: contradictions, repetitions, swapped subjects."""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Probe:
    """A prompt beside a fact, with the answer whose tokens it is scored over."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Fact:
    """One edit: after `prompt` the model shall answer `target`.

    Attributes:
        subject: what the fact is about, as spelled in the prompt.
        paraphrases: the prompt in other words; the target answers them too.
        locality: prompts whose answer should stay what it was; an answer may be empty.
        portability: prompts whose answer follows from the edit, with that answer.
    """

    prompt: str
    target: str
    subject: str | None = None
    paraphrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()


def prompt_key(prompt: str) -> str:
    """What two spellings of one prompt share: letter case, spaces and accents' encoding aside."""
    return " ".join(unicodedata.normalize("NFC", prompt).casefold().split())


def find_conflicts(facts: Sequence[Fact]) -> dict[int, list[str]]:
    """Facts that contradict another one or repeat its prompt: index → notes for a person.

    Two facts with the same prompt and different targets cannot both hold; with the same target
    the second is superfluous.
    """
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for index, fact in enumerate(facts):
        by_prompt[prompt_key(fact.prompt)].append(index)
    notes: dict[int, list[str]] = defaultdict(list)
    for group in by_prompt.values():
        targets = {facts[i].target.strip().casefold() for i in group}
        for index in group if len(group) > 1 else ():
            others = ", ".join(str(other + 1) for other in group if other != index)
            kind = "contradicts" if len(targets) > 1 else "repeats"
            notes[index].append(f"{kind} fact {others}")
    return dict(notes)


def swap_subjects(facts: Sequence[Fact], subjects: Sequence[str]) -> list[Fact]:
    """The facts' own prompts about something that was not edited: what must not switch on.

    Args:
        subjects: what to ask about instead, taken in turn.

    Returns:
        one prompt, with its subject and no answer, for each fact that names a subject occurring in
        its prompt.
    """
    known = {fact.subject.casefold() for fact in facts if fact.subject}
    free = [s for s in subjects if s.casefold() not in known]
    named = [(f.prompt, f.subject) for f in facts if f.subject and f.subject in f.prompt]
    if not free:
        return []
    others = [free[index % len(free)] for index in range(len(named))]
    return [
        Fact(prompt.replace(subject, other), "", other)
        for (prompt, subject), other in zip(named, others, strict=True)
    ]
