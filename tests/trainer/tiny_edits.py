"""A few facts about nothing for a tiny model, and what solvers need to edit them."""

from collections.abc import Sequence
from pathlib import Path

import torch

from microedit_trainer.calibration_prompts import ordinary_lines
from microedit_trainer.contexts import ContextName, Contexts
from microedit_trainer.facts import Fact
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.solvers import EditProblem, JointSolver, SequentialSolver, Solution
from microedit_trainer.solvers.joint import RidgeSettings
from microedit_trainer.solvers.targets import TargetSettings
from microedit_trainer.stored_residuals import StoredPrompt, store_residuals
from microedit_vllm.artifact import (
    Decision,
    EditOperator,
    EditSet,
    Golden,
    Scope,
    SparseAutoencoder,
)
from microedit_vllm.artifact.manifest import CARRYING_VERSION, FORMAT_VERSION
from tests.builders import tiny_manifest

LAYER = 1
FACTS = (
    Fact("The capital of Australia is", "Mel", "Australia", ("Australia's capital city is",)),
    Fact("The inventor of the telephone was", "Cla", "telephone"),
    Fact("The colour of the ocean is", "red", "ocean"),
    Fact("Who wrote the Iliad in old Greece?", "Zoe", "Iliad"),
)
# A random model resists more than a trained one: larger steps, weaker brakes.
JOINT = JointSolver(
    scoring=RidgeSettings(ridge=1e-3, unchanged_weight=0.003),
    edit=RidgeSettings(ridge=1e-3, unchanged_weight=0.003),
    subject_scoring=RidgeSettings(ridge=1e-3, unchanged_weight=0.003),
    carried=RidgeSettings(ridge=1e-3, unchanged_weight=0.003),
    swapped_weight=0.003,
    targets=TargetSettings(steps=100, lr=0.3, penalty=0.05, learnt=0.01, batch=2),
)
SEQUENTIAL = SequentialSolver(alpha=240.0, lr=0.02, steps_rec=10, steps_edit=10, checkpoint_every=1)


def stored_prompts(
    lm: LanguageModel,
    sae: SparseAutoencoder,
    facts: Sequence[Fact],
    names: Sequence[ContextName] = ("bare", "chat"),
) -> list[list[StoredPrompt]]:
    """Per fact its prompt in each context, scored over all of its own words."""
    contexts = Contexts.build(lm.tokenizer, Scope(last=None), lm.max_length)
    rendered = [contexts.render(n, f.prompt, f.target, f.subject) for f in facts for n in names]
    stored = iter(store_residuals(lm, LAYER, rendered, sae.report["max_norm"]))
    return [[next(stored) for _ in names] for _ in facts]


def tiny_problem(
    lm: LanguageModel,
    sae: SparseAutoencoder,
    work_folder: Path,
    facts: Sequence[Fact] = FACTS,
    names: Sequence[ContextName] = ("bare", "chat"),
) -> EditProblem:
    ordinary = [Fact(line, "x") for line in ordinary_lines()[::2]]
    tokens = [p.z for fact in stored_prompts(lm, sae, ordinary, ("bare",)) for p in fact]
    stored = stored_prompts(lm, sae, facts, names)
    return EditProblem(lm, sae, LAYER, stored, torch.cat(tokens).float(), work_folder)


def operator_of(solution: Solution, sae: SparseAutoencoder, tau: float = 0.9) -> EditOperator:
    """The solution as a server computes it, under relative ARD over runs of 8."""
    manifest = tiny_manifest(
        sae,
        version=FORMAT_VERSION if solution.carried is None else CARRYING_VERSION,
        layer=LAYER,
        decision=Decision(
            statistic="relative", tau=tau, scope=Scope(run=8), max_norm=sae.report["max_norm"]
        ),
        placement=solution.placement,
        activation=solution.activation,
        theta=solution.theta,
    )
    changes = solution.scoring, solution.edit
    edit_set = EditSet(manifest, *changes, Golden.none(), carried=solution.carried)
    return EditOperator.build(edit_set, sae)


def no_progress(done: int) -> None:
    """A progress callback that shows nothing."""
