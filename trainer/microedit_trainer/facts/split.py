"""Records set aside: τ is calibrated on them, so they are neither edited nor scored."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from microedit_trainer.facts.fact import Fact, prompt_key
from microedit_trainer.facts.reader import read_facts
from microedit_vllm.errors import MicroEditError


@dataclass(frozen=True)
class Split:
    """What to edit, what to hold out, and in words where the latter comes from."""

    edited: list[Fact]
    held_out: list[Fact]
    description: str


def read_split(
    data: Path, wanted: str, seed: int, limit: int | None = None, language: str | None = None
) -> Split:
    """Read a facts file and set records aside.

    Args:
        wanted: how many of the file's records to hold out, a share of them between 0 and 1, or
            another facts file, whose records are all held out but for those `apart_from` drops.
        seed: which records a number or a share takes.
        limit: edit the first so many; a number or a share is of the whole file.
        language: see `read_facts`.

    Raises:
        MicroEditError: a number that is no size of a split, nothing left to edit, a bad file.
    """
    size = _size(wanted)
    if size is not None:
        facts = read_facts(data, language=language)
        edited, held_out = split_facts(facts, size, seed)
        source = f"{len(facts)} records of {data} (seed {seed})"
    else:
        edited = read_facts(data, limit, language)
        others = read_facts(Path(wanted), language=language)
        held_out = apart_from(edited, others)
        source = f"{len(others)} records of {wanted}"
    return Split(edited[:limit], held_out, f"{len(held_out)} of the {source}")


def apart_from(edited: Sequence[Fact], others: Sequence[Fact]) -> list[Fact]:
    """The others that share neither prompt nor subject with an edited fact.

    Another question about an edited subject is often the same one in other words, on which the
    switch is right to turn on.
    """
    own = {key for fact in edited for key in _keys(fact)}
    return [fact for fact in others if own.isdisjoint(_keys(fact))]


def split_facts(facts: Sequence[Fact], size: float, seed: int) -> tuple[list[Fact], list[Fact]]:
    """Edited and held-out facts, each in their order.

    A hash of prompts and subjects decides, so that the split outlives other records joining the
    file. Facts that share a prompt or a subject stay together: one edited and one held out would
    calibrate the switch against an edit of its own (in SelfCheckGPT a subject's prompts begin
    alike).

    Args:
        size: how many to hold out, or a share of them below 1; a few more where a group ends later.

    Raises:
        MicroEditError: none or all of the facts would be held out.
    """
    count = int(size) if size >= 1 else max(1, round(size * len(facts)))
    held: set[int] = set()
    for group in _shuffled_groups(facts, seed):
        if len(held) >= count:
            break
        held.update(group)
    if len(held) == len(facts):
        raise MicroEditError(
            f"holding out {count} of {len(facts)} records leaves nothing to edit (records with "
            "the same prompt or subject stay together); hold out fewer"
        )
    edited = [fact for index, fact in enumerate(facts) if index not in held]
    return edited, [facts[index] for index in sorted(held)]


def _shuffled_groups(facts: Sequence[Fact], seed: int) -> list[list[int]]:
    """Indices of facts linked by prompts or subjects, in an order that the seed decides."""
    parent = list(range(len(facts)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    first: dict[str, int] = {}
    for index, fact in enumerate(facts):
        for key in _keys(fact):
            parent[root(index)] = root(first.setdefault(key, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(facts)):
        groups.setdefault(root(index), []).append(index)

    def rank(group: list[int]) -> bytes:
        keys = (key for index in group for key in _keys(facts[index]))
        return min(hashlib.sha256(f"{seed}:{key}".encode()).digest() for key in keys)

    return sorted(groups.values(), key=rank)


def _keys(fact: Fact) -> list[str]:
    texts = {"prompt": fact.prompt, "subject": fact.subject}
    return [f"{name}:{prompt_key(text)}" for name, text in texts.items() if text and text.strip()]


def prompt_digest(prompt: str) -> str:
    """Short hash by which a set remembers a prompt that τ was calibrated on."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


def _size(wanted: str) -> float | None:
    try:
        number = float(wanted)
    except ValueError:
        return None
    if not (0 < number < 1 or (number >= 1 and wanted.isdecimal())):
        raise MicroEditError(
            f"--hold-out {wanted}: name a number of records from 1, a share between 0 and 1, or a "
            "facts file"
        )
    return number
