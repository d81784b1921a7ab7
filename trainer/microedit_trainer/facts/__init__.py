"""Facts: read from a file of any known layout, checked against each other, and split."""

from microedit_trainer.facts.fact import Fact, Probe, find_conflicts, swap_subjects
from microedit_trainer.facts.reader import read_facts
from microedit_trainer.facts.split import Split, apart_from, prompt_digest, read_split

__all__ = [
    "Fact",
    "Probe",
    "Split",
    "apart_from",
    "find_conflicts",
    "prompt_digest",
    "read_facts",
    "read_split",
    "swap_subjects",
]
