"""An edit run in numbers, from its facts and settings, before the model is loaded."""

from collections.abc import Sequence
from typing import Any

from microedit_trainer.calibration_prompts import MOST_SWAPPED, ordinary_lines
from microedit_trainer.contexts import Contexts, PromptTokens, mentions, rewordings
from microedit_trainer.edit_settings import EditSettings
from microedit_trainer.estimate.edit import EditPlan, PromptCounts
from microedit_trainer.facts import Fact
from microedit_trainer.model_wordings import BEAMS, MOST_TOKENS, SHOWN
from microedit_trainer.solvers import JointSolver, SequentialSolver
from microedit_vllm.artifact import SparseAutoencoder

# Of more facts or held-out records than this, a part stands for all.
_COUNTED = 200


def plan_edit(
    tokenizer: Any,
    max_length: int,
    sae: SparseAutoencoder,
    layer: int,
    settings: EditSettings,
    facts: Sequence[Fact],
) -> EditPlan:
    """Count what `EditRun.edit` will be given.

    Raises:
        MicroEditError: a prompt that the model cannot take.
    """
    contexts = Contexts.build(tokenizer, settings.scope, max_length)
    names = settings.context_names(contexts)

    def rendered(facts: Sequence[Fact], answered: bool) -> list[PromptTokens]:
        return [
            contexts.render(name, f.prompt, f.target if answered else "", f.subject)
            for f in facts
            for name in names
        ]

    some, share = _part(facts)
    own = PromptCounts.of(rendered(some, True), share)
    held_out, held_out_share = _part(settings.hold_out)
    others = PromptCounts.of(rendered(held_out, False), held_out_share)
    lines = [Fact(line, "") for line in ordinary_lines()]
    unchanged = PromptCounts.of(rendered(lines[::2], False))
    unrelated = PromptCounts.of(rendered(lines[1::2], False))
    solver = settings.solver
    worded = solver.model_wordings
    joint = isinstance(solver, JointSolver)
    # With the joint solver the wordings of so many facts about other subjects of two kinds.
    swapped = 2 * joint * own.tokens * min(1.0, MOST_SWAPPED / len(facts))
    checked = round(swapped) + others.tokens + unrelated.tokens
    return EditPlan(
        joint=joint,
        offload=settings.offload,
        layer=layer,
        facts=len(facts),
        prompts=own.prompts,
        tokens=own.tokens,
        longest=max(own.longest, others.longest, unchanged.longest, unrelated.longest),
        edited=own.edited,
        reworded=len(rewordings("?")) + worded if solver.uses_rewordings else 0,
        worded=worded,
        said=len(facts) * BEAMS * worded * (len(tokenizer(SHOWN).input_ids) + MOST_TOKENS),
        mentions=len(mentions("")) if solver.uses_mentions(len(facts)) else 0,
        swapped=solver.swapped_wordings(len(facts)),
        scored=own.scored,
        ordinary=unchanged.tokens if solver.holds_ordinary else 0,
        checked=checked,
        carries=isinstance(solver, JointSolver) and solver.is_carried(len(facts)),
        latents=sae.num_latents,
        k=sae.k,
        rows=_rows(solver, len(facts), own.identifying * (1 + worded), sae.num_latents),
        steps=_steps(solver),
    )


def _part(facts: Sequence[Fact]) -> tuple[Sequence[Fact], float]:
    """Some of the facts, spread over all of them, and which share of them these are."""
    every = max(1, len(facts) // _COUNTED)
    some = facts[::every]
    return some, len(some) / len(facts) if facts else 1.0


def _rows(solver: object, facts: int, identifying: int, num_latents: int) -> int:
    """Of the larger change."""
    if not isinstance(solver, JointSolver):
        return 0
    return max(solver.budgets(facts, identifying, num_latents).values())


def _steps(solver: object) -> int:
    if isinstance(solver, JointSolver):
        return solver.targets.steps
    assert isinstance(solver, SequentialSolver)
    return solver.steps_edit
