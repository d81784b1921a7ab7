"""What each choice of the joint solver, of the run and of the SAE is worth."""

from typing import Any

from benchmarks.quality.experiment import Experiment
from benchmarks.quality.figures import SCORES_HEADER, score, scores, size
from benchmarks.quality.lab import Lab
from benchmarks.quality.page import Section
from benchmarks.quality.plan import Plan
from benchmarks.quality.records import Chosen, in_words
from benchmarks.quality.tables.experiments import CARRIED, main_experiments
from microedit_trainer.solvers.joint import RidgeSettings
from microedit_trainer.solvers.targets import TargetSettings
from microedit_vllm.artifact import Scope

Variations = dict[str, dict[str, Any]]

NAME = "ablations"
TEXT = """
One choice changed at a time, the joint solver. *as shipped* is the row of the main table. What
changes little among 100 facts is left out among more.
"""
HEADER = (
    *("facts", "changed", *SCORES_HEADER, "chat Rel", "chat Gen"),
    *("τ", "rows to score + to edit"),
)
# Fields of `JointSolver`, of `EditSettings`, of `SaeSettings`, by the name in the table.
SOLVER: Variations = {
    "scoring ridge × 0.1": {"scoring": RidgeSettings(ridge=1e-2, unchanged_weight=1.0)},
    "scoring ridge × 3": {"scoring": RidgeSettings(ridge=3e-1, unchanged_weight=1.0)},
    "scoring holds nothing else": {"scoring": RidgeSettings(ridge=1e-1, unchanged_weight=0.0)},
    "edit ridge × 10": {"edit": RidgeSettings(ridge=3e-2, unchanged_weight=0.03)},
    "edit holds nothing else": {"edit": RidgeSettings(ridge=3e-3, unchanged_weight=0.0)},
    "θ = 2": {"theta": 2.0},
    "edit by the top k alone": {"theta": None},
    "ẑ in the place of z": {"theta": None, "placement": "replace"},
    "own wordings held about other subjects": {"swapped_weight": 10.0},
    "answers carried, wordings held": CARRIED,
    "without rewordings": {"reworded_weight": 0.0},
    "three of the model's own wordings": {"model_wordings": 3},
    "targets of 15 steps": {"targets": TargetSettings(steps=15)},
    "targets of 60 steps": {"targets": TargetSettings(steps=60)},
}
SETTINGS: Variations = {
    "trained bare alone": {"contexts": ("bare",)},
    "trained in chat alone": {"contexts": ("chat",)},
    "near prompts on: 1%": {"near_rate": 0.01},
    "near prompts on: 10%": {"near_rate": 0.1},
    "runs of 8 tokens": {"scope": Scope(run=8)},
    "the last 16 tokens as one run": {"scope": Scope(last=16, run=0)},
}
# What larger sets than the first of `Plan.ablated` are varied in.
AMONG_MORE = (
    *("scoring holds nothing else", "edit by the top k alone", "ẑ in the place of z"),
    *("own wordings held about other subjects", "answers carried, wordings held"),
    *("without rewordings", "three of the model's own wordings"),
)


def section(lab: Lab, plan: Plan) -> Section:
    """Build it."""
    lines = [
        line for facts in plan.ablated for line in measured(lab, facts, experiments(plan, facts))
    ]
    return Section(NAME, "Ablations", TEXT, HEADER, lines)


def measured(lab: Lab, facts: Chosen, varied: dict[str, Experiment]) -> list[list[str]]:
    """A line of the table for each variation."""
    lines = []
    for name, experiment in varied.items():
        lab.say(f"{in_words(facts)}, {name}")
        figures = lab.scores(experiment)
        chat = figures.get("chat", {})
        line = [in_words(facts), name, *scores(figures["bare"])]
        line += [score(chat.get("rel")), score(chat.get("gen"))]
        lines.append([*line, f"{figures['tau']:.3f}", size(figures)])
    return lines


def experiments(plan: Plan, facts: Chosen) -> dict[str, Experiment]:
    """What is varied, by its name in the table."""
    found = {"as shipped": shipped(plan, facts)}
    found |= {name: Experiment(facts, options=options) for name, options in SOLVER.items()}
    found |= {name: Experiment(facts, settings=settings) for name, settings in SETTINGS.items()}
    if facts == plan.ablated[0]:
        return found
    return {name: found[name] for name in ("as shipped", *AMONG_MORE)}


def shipped(plan: Plan, facts: Chosen) -> Experiment:
    """The row of the main table where there is one."""
    joint = {e.facts: e for e in main_experiments(plan).values() if e.solver == "joint"}
    return joint.get(facts, Experiment(facts))
