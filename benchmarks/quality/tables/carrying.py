"""What each part of a set that carries its answers is worth, at the size that carries."""

from dataclasses import replace

from benchmarks.quality.experiment import Experiment
from benchmarks.quality.lab import Lab
from benchmarks.quality.page import Section
from benchmarks.quality.plan import Plan
from benchmarks.quality.tables.ablations import HEADER, Variations, measured
from benchmarks.quality.tables.experiments import main_experiments

NAME = "carrying"
TEXT = """
The largest set of the main table: its answers are carried from the subject's tokens, which it has
seen in other texts, too, while the facts' wordings about other subjects are held. *as shipped* is
the row of the main table. Without what carries, the switch looks at runs of 16 in the last 64
tokens, as in smaller sets.
"""
CARRYING: Variations = {
    "not carried": {"carries": False},
    "subjects seen in no other texts": {"mentions_weight": 0.0},
}


def section(lab: Lab, plan: Plan) -> Section:
    """Build it."""
    varied = experiments(plan)
    lines = measured(lab, plan.all_records, varied)
    return Section(NAME, "Carried answers", TEXT, HEADER, lines)


def experiments(plan: Plan) -> dict[str, Experiment]:
    """What is varied, by its name in the table."""
    shipped = main_experiments(plan)["all"]
    varied = {name: replace(shipped, options=o, timed=False) for name, o in CARRYING.items()}
    return {"as shipped": shipped} | varied
