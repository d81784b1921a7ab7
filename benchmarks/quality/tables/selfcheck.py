"""SelfCheckGPT: whole sentences as new answers."""

from benchmarks.quality.experiment import Experiment
from benchmarks.quality.figures import percent, score
from benchmarks.quality.lab import Lab
from benchmarks.quality.page import Section
from benchmarks.quality.plan import Plan
from benchmarks.quality.records import in_words

NAME = "selfcheck"
TEXT = """
Corrected sentences behind passages about a person, asked bare. Reliability is the perplexity of
the corrected sentence, the mean over prompts. Of the people that are not edited half calibrate τ,
the others are *near*.
"""
HEADER = (
    *("facts", "perplexity before", "after", "Rel", "Loc", "near"),
    *("on: edited", "Loc", "near", "τ", "s/fact"),
)


def section(lab: Lab, plan: Plan) -> Section:
    """Build it."""
    experiment = Experiment(plan.selfcheck, timed=True)
    lab.say(f"selfcheck: {in_words(experiment.facts)}")
    figures = lab.scores(experiment)
    found = figures["bare"]
    line = [
        in_words(experiment.facts),
        f"{found['ppl_before']:.2f}",
        f"{found['ppl_after']:.2f}",
        score(found["rel"]),
        score(found["loc"], 0.99),
        score(found["near"]),
        *(percent(found[fire]) for fire in ("fire_edit", "fire_loc", "fire_near")),
        f"{figures['tau']:.3f}",
        f"{figures['seconds_per_edit']:.2f}",
    ]
    return Section(NAME, "SelfCheckGPT", TEXT, HEADER, [line])
