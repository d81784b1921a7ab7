"""False fires on ordinary traffic, at every size of the main table and others beside."""

from functools import partial

from benchmarks.ordinary import Traffic, count_fires, nq_questions, ordinary_prompts
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.lab import Lab
from benchmarks.quality.page import Section
from benchmarks.quality.plan import Plan
from benchmarks.quality.records import HOLD_OUT, in_words
from benchmarks.quality.store import Figures
from benchmarks.quality.tables.experiments import CARRIED, main_experiments

NAME = "ordinary"
MOST = 2
TEXT = """
1,000 requests, none of which names an edited subject: passages of an encyclopaedia, chat
requests, Python code, Natural Questions with and without ZsRE's prefix. The interval of the share
is Wilson's, at 95%. *Nearest* is the smallest ARD among them, where the switch is on at τ and
below. Sets of up to 500 facts carry their answers only where that is asked for (*carrying*).
"""
HEADER = ("facts", "solver", "switch on", "95% interval", "nearest", "τ", "by kind")


def section(lab: Lab, plan: Plan) -> Section:
    """Build it."""
    lines = []
    for solver, experiment in experiments(plan):
        lab.say(f"ordinary: {in_words(experiment.facts)}, {solver}")
        found = lab.row("ordinary", experiment, partial(_count, lab, experiment))
        low, high = found["interval"]
        count = f"{found['fires']} of {found['total']}"
        kinds = [f"{on} of {total} {kind}" for kind, (on, total) in found["kinds"].items() if on]
        lines.append(
            [
                in_words(experiment.facts),
                solver,
                count if found["fires"] <= MOST else f"**{count}** (> {MOST})",
                f"{low:.2%} to {high:.2%}",
                f"{found['smallest_ard']:.3f}",
                f"{found['tau']:.3f}",
                ", ".join(kinds) or "–",
            ]
        )
    return Section(NAME, "Ordinary traffic", TEXT, HEADER, lines)


def experiments(plan: Plan) -> list[tuple[str, Experiment]]:
    """The sets of the main table and three beside, each with its solver's name."""
    return [
        ("joint", Experiment(plan.few)),
        ("joint, carrying", Experiment(plan.more, options=CARRIED)),
        ("joint", Experiment(plan.between)),
        *((experiment.solver, experiment) for experiment in main_experiments(plan).values()),
    ]


def traffic(lab: Lab, experiment: Experiment) -> Traffic:
    """The requests, none of them about what the experiment edits."""
    zsre = lab.records.zsre
    # The questions of the others may be in the SAE's text.
    questions = nq_questions([*zsre[: HOLD_OUT.start], *zsre[HOLD_OUT.stop :]])
    edited = lab.split(experiment).edited
    return ordinary_prompts(lab.contexts(experiment), lab.records.text, questions, edited)


def _count(lab: Lab, experiment: Experiment) -> Figures:
    engine = lab.engine(experiment)
    tau = engine.operator.edit_set.manifest.decision.tau
    return {**count_fires(engine, traffic(lab, experiment)), "tau": tau}
