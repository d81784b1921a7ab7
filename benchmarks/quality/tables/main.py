"""The main table: both solvers at several sizes."""

from benchmarks.quality.figures import SCORES_HEADER, percent, scores, size
from benchmarks.quality.lab import Lab
from benchmarks.quality.page import Section
from benchmarks.quality.plan import Plan
from benchmarks.quality.records import in_words
from benchmarks.quality.tables.experiments import main_experiments

NAME = "main"
TEXT = """
The seconds are those of the whole `microedit edit`, two cores or fewer, each set from nothing.
*Loc* is ZsRE's Natural Questions. Where not all of ZsRE is edited, records 300 to 399 are in the
SAE's text and calibrate τ, and 400 to 599 are *near*. Where all of it is, no record is left over:
the SAE has seen the trainer's invented facts instead, τ has the shipped prompts alone, *near* are
the locality prompts of CounterFact that name no edited subject (the same relation about another
one), and *own wording* asks about the people of SelfCheckGPT. Most of CounterFact's paraphrases
here say something that follows from the fact ("… is surrounded by restaurants including"). Sets
of more than 500 facts carry their answers from the subject's tokens.
"""
BARS = {
    "some": {"rel": 0.99, "gen": 0.88, "loc": 0.99, "near": 0.96},
    "more": {"rel": 0.99, "gen": 0.82, "loc": 0.99, "near": 0.94},
    "all": {"rel": 0.95, "gen": 0.65, "loc": 0.98, "near": 0.85},
    "sequential": {"rel": 0.80, "gen": 0.60, "loc": 0.98},
}
FIRES = ("fire_edit", "fire_para", "fire_loc", "fire_near")
HEADER = (
    *("facts", "solver", "asked", *SCORES_HEADER),
    *("on: edited", "paraphrases", "Loc", "near", "τ"),
    *("rows to score + to edit (+ that carry)", "s/fact"),
)


def section(lab: Lab, plan: Plan) -> Section:
    """Build it."""
    lines = []
    for name, experiment in main_experiments(plan).items():
        lab.say(f"main: {in_words(experiment.facts)}, {experiment.solver}")
        figures = lab.scores(experiment)
        for context in ("bare", "chat"):
            if context not in figures:
                continue
            found, first = figures[context], context == "bare"
            line = [in_words(experiment.facts), experiment.solver, context]
            line += scores(found, BARS[name] if first else None)
            line += [percent(found[fire]) for fire in FIRES]
            line += [f"{figures['tau']:.3f}", size(figures)] if first else ["", ""]
            lines.append([*line, f"{figures['seconds_per_edit']:.2f}" if first else ""])
    return Section(NAME, "Scores", TEXT, HEADER, lines)
