"""What each part of a set that carries its answers is worth, at the size that carries."""

from dataclasses import replace

from benchmarks.quality.experiment import Experiment
from benchmarks.quality.lab import Lab
from benchmarks.quality.page import Section
from benchmarks.quality.plan import Plan
from benchmarks.quality.tables.ablations import HEADER, Variations, measured
from benchmarks.quality.tables.experiments import CARRIED, main_experiments

NAME = "carrying"
TEXT = """
Sets whose answers are carried from the subject's tokens, which they have seen in other texts, too,
while the facts' wordings about other subjects are held. *as shipped* is the row of the main table.
Without what carries, the switch looks at runs of 16 in the last 64 tokens, as in smaller sets.
"""
CARRYING: Variations = {
    "not carried": {"carries": False},
    "own wordings not held about other subjects": {"swapped_weight": 0.0},
    "subjects seen in no other texts": {"mentions_weight": 0.0},
}
# Where carrying begins: with and without, the wordings held in both.
BETWEEN: Variations = {
    "not carried": {"carries": False, "swapped_weight": 10.0},
    "carried": CARRIED,
}


def section(lab: Lab, plan: Plan) -> Section:
    """Build it."""
    lines = measured(lab, plan.between, between(plan))
    lines += measured(lab, plan.all_records, experiments(plan))
    return Section(NAME, "Carried answers", TEXT, HEADER, lines)


def experiments(plan: Plan) -> dict[str, Experiment]:
    """What is varied of the largest set, by its name in the table."""
    shipped = main_experiments(plan)["all"]
    varied = {name: replace(shipped, options=o, timed=False) for name, o in CARRYING.items()}
    return {"as shipped": shipped} | varied


def between(plan: Plan) -> dict[str, Experiment]:
    """A set of a size at which carrying could begin."""
    return {name: Experiment(plan.between, options=options) for name, options in BETWEEN.items()}
