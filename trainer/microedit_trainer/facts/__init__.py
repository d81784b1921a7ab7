"""Facts: read from a file of any known layout, checked against each other, and split."""

from microedit_trainer.facts.fact import Fact, Probe, find_conflicts, swap_subjects
from microedit_trainer.facts.reader import read_facts

__all__ = ["Fact", "Probe", "find_conflicts", "read_facts", "swap_subjects"]
