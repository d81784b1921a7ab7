"""Which records are edited, which calibrate τ, and which are only asked: never the same."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from benchmarks.ordinary import mentions
from microedit_trainer.facts import Fact, apart_from, read_facts
from microedit_vllm.errors import MicroEditError

# Of ZsRE: up to 300 are edited.
HOLD_OUT = slice(300, 400)
NEAR = slice(400, 600)
ZSRE = 600

# How many records of which data set are edited: (("zsre", 300), ("counterfact", 700)).
Chosen = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Split:
    """Records by what they are for.

    Attributes:
        edited: with the locality prompts that they are scored on.
        hold_out: calibrate τ.
        near: neither; asked to see whether they stay as they are.
        subjects: what the edited wordings are asked about instead.
    """

    edited: Sequence[Fact]
    hold_out: Sequence[Fact]
    near: Sequence[Fact]
    subjects: Sequence[str]


@dataclass(frozen=True)
class Records:
    """The benchmark records of a folder.

    Raises:
        MicroEditError: on first use, a file that is missing or too short.
    """

    folder: Path

    def path(self, name: str) -> Path:
        """A file of the folder, which must be there."""
        path = self.folder / name
        if not path.is_file():
            raise MicroEditError(f"{path} is missing; name the records' folder with --data")
        return path

    @cached_property
    def zsre(self) -> list[Fact]:
        return self._read("zsre_dev.jsonl", ZSRE)

    @cached_property
    def counterfact(self) -> list[Fact]:
        return self._read("counterfact_dev.jsonl", 1)

    @cached_property
    def selfcheck(self) -> list[Fact]:
        return self._read("selfcheckgpt_dev.jsonl", 1)

    @property
    def text(self) -> Path:
        """Passages of an encyclopaedia."""
        return self.path("wikitext2_valid.txt")

    def held_out_lines(self) -> bytes:
        """ZsRE's held-out records as they stand in the file, for an SAE's text."""
        lines = self.path("zsre_dev.jsonl").read_bytes().split(b"\n")
        return b"\n".join([line for line in lines if line.strip()][HOLD_OUT]) + b"\n"

    def split(self, chosen: Chosen) -> Split:
        """What is edited, and what the others are for.

        Raises:
            MicroEditError: records that would be edited and something else too.
        """
        counts = dict(chosen)
        if set(counts) == {"selfcheck"}:
            return self._selfcheck(counts["selfcheck"])
        if set(counts) - {"zsre", "counterfact"}:
            raise MicroEditError(f"no such mix of records: {counts}")
        zsre = self.zsre[: counts.get("zsre", 0)]
        counterfact = self.counterfact[: counts.get("counterfact", 0)]
        # CounterFact's locality prompts are near (the same relation, another subject), not Loc.
        edited = [*zsre, *(replace(fact, locality=()) for fact in counterfact)]
        about = mentions(edited)
        near = [
            Fact(probe.prompt, probe.answer)
            for fact in counterfact
            for probe in fact.locality
            if not about(probe.prompt)
        ]
        if len(zsre) <= HOLD_OUT.start:
            near = [*self.zsre[NEAR], *near]
            subjects = [fact.subject for fact in near if fact.subject]
            hold_out = apart_from(edited, self.zsre[HOLD_OUT])
            return Split(edited, hold_out, near, subjects)
        # No ZsRE record is left for τ, and no subject of one.
        people = [fact.subject.title() for fact in self.selfcheck if fact.subject]
        free = [name for name in dict.fromkeys(people) if not about(name)]
        return Split(edited, (), near, free)

    def _selfcheck(self, count: int) -> Split:
        """Of the subjects that are not edited half calibrate τ, half are near."""
        edited = self.selfcheck[:count]
        known = {fact.subject for fact in edited}
        free = [fact for fact in self.selfcheck[count:] if fact.subject not in known]
        subjects = sorted({fact.subject for fact in free if fact.subject})
        calibrating = set(subjects[::2])
        near = [fact for fact in free if fact.subject not in calibrating]
        hold_out = [fact for fact in free if fact.subject in calibrating]
        return Split(edited, hold_out, near, subjects[1::2])

    def _read(self, name: str, least: int) -> list[Fact]:
        facts = read_facts(self.path(name))
        if len(facts) < least:
            raise MicroEditError(f"{self.folder / name} has {len(facts)} records, not {least}")
        return facts


def in_words(chosen: Chosen) -> str:
    """ "600 ZsRE, 1000 CounterFact"."""
    names = {"zsre": "ZsRE", "counterfact": "CounterFact", "selfcheck": "SelfCheckGPT"}
    return ", ".join(f"{count} {names[name]}" for name, count in chosen)
