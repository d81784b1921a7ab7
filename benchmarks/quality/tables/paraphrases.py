"""What becomes of the paraphrases of all records: is it the switch, or what the edit knows?"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.quality.experiment import Experiment
from benchmarks.quality.figures import percent, score
from benchmarks.quality.lab import Lab
from benchmarks.quality.page import Section
from benchmarks.quality.plan import Plan
from benchmarks.quality.records import in_words
from benchmarks.quality.store import Figures
from benchmarks.quality.tables.experiments import main_experiments
from microedit_trainer.contexts import Contexts, PromptTokens
from microedit_trainer.evaluation import TorchEngine, agreement, right_shares
from microedit_trainer.facts import Fact
from microedit_trainer.solvers.targets import TargetSettings, solve_targets
from microedit_trainer.stored_residuals import StoredPrompt, predictions

NAME = "paraphrases"
TEXT = """
The largest set of the main table, asked bare, each data set's paraphrases apart. *Always on* is
Gen with every switch on, whatever τ: what the edit change knows. *Own target* is Gen with the
residual change that was solved for the edited prompt, put in where the paraphrase is answered:
what an edit could do that were told which fact is asked about. *Other question*: each subject
within another record's wording, which asks about something else; how many switch on, and what share
of the tokens stays as it was.
"""
HEADER = (
    *("records", "paraphrases", "on", "unedited", "Gen", "always on", "own target"),
    *("other question: on", "unchanged"),
)


def section(lab: Lab, plan: Plan) -> Section:
    """Build it."""
    experiment = main_experiments(plan)["all"]
    lab.say(f"paraphrases: {in_words(experiment.facts)}")
    found = lab.row(NAME, experiment, partial(_by_records, lab, experiment))
    lines = [
        [
            records,
            str(figures["count"]),
            percent(figures["on"]),
            *(score(figures[name]) for name in ("unedited", "served", "always_on", "own_target")),
            percent(figures["other_on"]),
            score(figures["other_unchanged"]),
        ]
        for records, figures in found.items()
    ]
    return Section(NAME, "Paraphrases", TEXT, HEADER, lines)


def _by_records(lab: Lab, experiment: Experiment) -> Figures:
    """Figures of each data set's facts, by its name."""
    engine, contexts = lab.engine(experiment), lab.contexts(experiment)
    facts = iter(lab.split(experiment).edited)
    return {
        in_words((chosen,)): _figures(engine, contexts, [next(facts) for _ in range(chosen[1])])
        for chosen in experiment.facts
    }


@torch.no_grad()
def _figures(engine: TorchEngine, contexts: Contexts, facts: Sequence[Fact]) -> Figures:
    def render(fact: Fact, prompt: str) -> PromptTokens:
        return contexts.render("bare", prompt, fact.target, fact.subject)

    asked = [(fact, words) for fact in facts for words in fact.paraphrases]
    stored = engine.store.of([render(*one) for one in asked])
    edited = engine.store.of([render(fact, fact.prompt) for fact, _ in asked])
    outcomes = engine.outcomes_of(stored)
    unchanged, other_on = agreement(engine, [render(f, f.prompt) for f in _other_questions(facts)])
    told = [_moved(*one) for one in zip(stored, _targets(engine, edited), strict=True)]

    def right(answers: Sequence[Tensor]) -> float:
        return float(right_shares([prompt.tokens for prompt in stored], answers).mean())

    def gen(residuals: Sequence[Tensor]) -> float:
        layer = engine.operator.edit_set.manifest.layer
        return right(predictions(engine.lm, layer, stored, residuals))

    return {
        "count": len(asked),
        "on": sum(outcome.on for outcome in outcomes) / len(outcomes),
        "unedited": gen([prompt.z for prompt in stored]),
        "served": right([outcome.answer for outcome in outcomes]),
        "always_on": gen([engine.substituted(prompt) for prompt in stored]),
        "own_target": gen(told),
        "other_on": other_on,
        "other_unchanged": unchanged,
    }


def _other_questions(facts: Sequence[Fact]) -> list[Fact]:
    """Each subject within the wording of the next record about something else."""
    named = [f for f in facts if f.subject and f.subject in f.prompt]
    asked = []
    for fact, other in zip(named, [*named[1:], *named[:1]], strict=True):
        assert fact.subject and other.subject
        prompt = other.prompt.replace(other.subject, fact.subject)
        if prompt != fact.prompt:
            asked.append(replace(fact, prompt=prompt))
    return asked


@torch.enable_grad()
def _targets(engine: TorchEngine, prompts: Sequence[StoredPrompt]) -> Iterator[Tensor]:
    """δ* of each prompt, as the joint solver finds it."""
    settings, layer = TargetSettings(), engine.operator.edit_set.manifest.layer
    for start in range(0, len(prompts), settings.batch):
        batch = prompts[start : start + settings.batch]
        yield from solve_targets(engine.lm, layer, batch, settings)


def _moved(prompt: StoredPrompt, delta: Tensor) -> Tensor:
    """z with δ* [A + 1, d] at the positions that give the answer."""
    z = prompt.z.clone()
    z[prompt.edited] = (z[prompt.edited].float() + delta).to(z.dtype)
    return z
