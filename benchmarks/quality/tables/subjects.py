"""What another edited fact about the same subject does to a fact's paraphrases."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

from benchmarks.quality.experiment import Experiment
from benchmarks.quality.figures import percent, score
from benchmarks.quality.lab import Lab
from benchmarks.quality.page import Section
from benchmarks.quality.plan import Plan
from benchmarks.quality.records import in_words
from benchmarks.quality.store import Figures
from benchmarks.quality.tables.experiments import main_experiments
from microedit_trainer.contexts import ContextName, Contexts
from microedit_trainer.evaluation import TorchEngine, right_shares
from microedit_trainer.facts import Fact

NAME = "subjects"
TEXT = """
The joint sets of the main table: Gen of the facts whose subject no other edited fact has, and of
those that share theirs. The records of ZsRE ask the same in several wordings, each with an answer
of its own: "Which constellation is NGC 6604 in?" with Andromeda, "What constellation does NGC 6604
belong to?" with Pegasus. A paraphrase of the one, "Which constellation does NGC 6604 belong to?",
is then nearer to the other.
"""
CONTEXTS: tuple[ContextName, ...] = ("bare", "chat")
HEADER = ("facts", "about the subject", "of them", "Gen", "on", "chat Gen", "chat on")


def section(lab: Lab, plan: Plan) -> Section:
    """Build it."""
    lines = []
    for experiment in main_experiments(plan).values():
        if experiment.solver != "joint":
            continue
        lab.say(f"subjects: {in_words(experiment.facts)}")
        found = lab.row(NAME, experiment, partial(_by_subjects, lab, experiment))
        for about, figures in found.items():
            line = [in_words(experiment.facts), about, str(figures["facts"])]
            for context in CONTEXTS:
                gen, on = figures.get(context, (None, None))
                line += [score(gen), percent(on)]
            lines.append(line)
    return Section(NAME, "Facts about one subject", TEXT, HEADER, lines)


def by_subjects(facts: Sequence[Fact]) -> dict[str, list[Fact]]:
    """The facts that are alone about their subject, and those that are not."""
    counts = Counter(fact.subject for fact in facts)
    alone = [fact for fact in facts if fact.subject is None or counts[fact.subject] == 1]
    others = [fact for fact in facts if fact.subject is not None and counts[fact.subject] > 1]
    return {name: some for name, some in (("one fact", alone), ("several", others)) if some}


def _by_subjects(lab: Lab, experiment: Experiment) -> Figures:
    engine, contexts = lab.engine(experiment), lab.contexts(experiment)
    return {
        about: {
            "facts": len(facts),
            **{context: _gen(engine, contexts, facts, context) for context in contexts.names},
        }
        for about, facts in by_subjects(lab.split(experiment).edited).items()
    }


def _gen(
    engine: TorchEngine, contexts: Contexts, facts: Sequence[Fact], context: ContextName
) -> tuple[float | None, float | None]:
    """Share of the paraphrases' answer tokens that are right, and of them that switch on."""
    asked = [contexts.render(context, p, f.target) for f in facts for p in f.paraphrases]
    if not asked:
        return None, None
    outcomes = engine.edited(asked)
    right = right_shares(asked, [outcome.answer for outcome in outcomes])
    return float(right.mean()), sum(outcome.on for outcome in outcomes) / len(outcomes)
