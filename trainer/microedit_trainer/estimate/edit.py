"""Memory and time of `microedit edit`, from sizes alone.

Every item says which tensor it stands for; the sizes follow from the code that holds it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from microedit_trainer.contexts import SUBJECT_END, PromptTokens
from microedit_trainer.estimate.model_size import ModelSize
from microedit_trainer.estimate.stages import Stage
from microedit_trainer.solvers.conjugate_gradients import PANELS, PANELS_BYTES
from microedit_trainer.solvers.ridge import (
    DENSE_BYTES,
    FP64_COST,
    GATHER_COST,
    LEAST_STEPS,
    PANEL_PRODUCTS,
    REFINING_STEPS,
    STEPS_PER_BLOCK,
)
from microedit_trainer.solvers.sparse_codes import BYTES_PER_CODE, CODES_BYTES, PIECE_BYTES

# Prompts together in a batch: of `store_residuals`, and of `predictions`.
STORED_AT_ONCE, SCORED_AT_ONCE = 16, 32
# Of all latents, those that an edited token has at θ = 0: measured on the demo's model.
ACTIVE_SHARE = 0.3


@dataclass(frozen=True)
class EditPlan:
    """What an edit run is asked for, in numbers.

    Attributes:
        joint: else the sequential solver.
        offload: whether model and SAE take turns on the device.
        facts, prompts: prompts are facts in every context.
        tokens: prompt and answer of all prompts; longest: the most of one.
        edited: positions with a target; scored: those that the switch looks at.
        reworded: other wordings of each prompt, each with one target.
        worded: those of them that are scored as well, made by the model.
        said: tokens that the model runs over to make them.
        mentions: other texts that name each fact's subject.
        swapped: facts whose wordings are held about another subject.
        ordinary: tokens that must not change. checked: tokens of prompts that τ rests on.
        carries: whether the joint solver makes a carried change.
        latents, k: the SAE's. rows: budget of each change of the joint solver.
        steps: of Adam, for a target or a fact.
    """

    joint: bool
    offload: bool
    layer: int
    facts: int
    prompts: int
    tokens: int
    longest: int
    edited: int
    reworded: int
    worded: int
    said: int
    mentions: int
    swapped: int
    scored: int
    ordinary: int
    checked: int
    carries: bool
    latents: int
    k: int
    rows: int
    steps: int

    @property
    def tokens_at_once(self) -> int:
        """Of the prompts that the solver runs together, without padding."""
        return max(1, self.tokens // self.prompts) * (STORED_AT_ONCE if self.joint else 1)

    @property
    def edited_in_all(self) -> int:
        """Positions with a target, in the prompt's own and in other wordings."""
        return self.edited + self.prompts * self.reworded

    @property
    def held(self) -> int:
        """Tokens whose residuals the solver gets, the ordinary ones aside."""
        others = self.prompts * self.reworded + self._mentioned
        return self.tokens * (1 + self.worded) + others + self._swapped_of(self.tokens)

    @property
    def scored_in_all(self) -> int:
        """Scored positions, those of other texts and of other subjects among them."""
        own = self.scored * (1 + self.worded)
        return own + self._mentioned + self._swapped_of(self.scored)

    @property
    def run_below(self) -> int:
        """Tokens that the layers up to l run over before the solve."""
        others = self.tokens * (self.reworded + self.worded + self.mentions)
        return self.tokens + others + self._swapped_of(self.tokens) + self.ordinary

    @property
    def _mentioned(self) -> int:
        """The subjects' tokens in other texts."""
        return self.facts * self.mentions * SUBJECT_END

    def _swapped_of(self, count: int) -> int:
        return count * self.swapped // self.facts

    def changed_rows(self) -> int:
        """Decoder rows of a change, at most."""
        if self.joint:
            return min(self.latents, self.rows)
        return min(self.latents, self.tokens * self.k)


@dataclass(frozen=True)
class PromptCounts:
    """Tokens of some prompts, answers included where they have one.

    Attributes:
        edited, scored, identifying: as in `StoredPrompt`.
    """

    prompts: int
    tokens: int
    longest: int
    edited: int
    scored: int
    identifying: int

    @classmethod
    def of(cls, prompts: Sequence[PromptTokens], share: float = 1.0) -> "PromptCounts":
        """Count prompts that stand for 1/share as many."""
        lengths = [len(p.prompt_ids) + len(p.answer_ids) for p in prompts]
        edited = sum(len(p.answer_ids) + 1 for p in prompts)
        scored = sum(p.scored[1] - p.scored[0] for p in prompts)
        identifying = sum(p.scored[1] - p.identifying_from for p in prompts)
        counts = (len(prompts), sum(lengths), edited, scored, identifying)
        number, tokens, *parts = [round(count / share) for count in counts]
        return cls(number, tokens, max(lengths, default=0), *parts)


def edit_stages(model: ModelSize, plan: EditPlan, device: str) -> list[Stage]:
    """What each stage of `EditRun.edit` holds, on "cuda" or "cpu"."""
    d, b = model.hidden_size, model.value_bytes
    # Where the CPU's memory is the device, nothing gains from waiting.
    offload = plan.offload and device != "cpu"
    waiting = model.waiting(plan.layer) if offload else 0
    sae = 2 * plan.latents * d * 4
    beside = {} if offload else {"SAE": sae}
    kept = {"residuals": plan.held * d * b + plan.ordinary * d * 4}
    lower = {"model": model.weights, "activations": model.activations(_batch(plan, STORED_AT_ONCE))}
    upper = {"model": model.weights - waiting, "SAE": sae}
    solver = _joint(model, plan) if plan.joint else _sequential(model, plan)
    # In the CPU's memory: of the prompts that τ rests on, and of the facts with their answers.
    checked = (plan.checked + plan.tokens) * d * b
    shared = {"residuals for τ": checked} if device == "cpu" else {}
    away = waiting + sae if offload else 0
    stages = [
        # The model is read into the CPU's memory before it goes to the device.
        Stage("storing residuals", {**lower, **beside, **kept}, model.weights + sae),
        Stage("solving", {**upper, **kept, **solver}, away),
    ]
    if offload:
        stages.append(Stage("storing residuals for τ", lower, sae + checked))
    scoring = {**upper, **_scoring(model, plan, device), **shared}
    return [*stages, Stage("calibrating", scoring, away + checked)]


def ridge_bytes(tokens: int, rows: int, d: int) -> int:
    """The most that `solvers.ridge` takes, whichever system it chooses, with its solution."""
    dense = (8 * tokens * (2 * tokens + rows + d), 8 * rows * (2 * rows + d))
    iterative = min(CODES_BYTES, BYTES_PER_CODE * tokens * rows)
    iterative += min(PANELS_BYTES, PANELS * rows * d * 4)
    half = 4 * rows * (2 * rows + d)
    refined = half + iterative if half <= DENSE_BYTES else 0
    system = max([iterative, refined, *(size for size in dense if size <= DENSE_BYTES)])
    # Right side, start, solution, and what is kept of it.
    return system + 4 * rows * d * 4


def _joint(model: ModelSize, plan: EditPlan) -> dict[str, int]:
    d, n = model.hidden_size, plan.latents
    tokens = plan.ordinary + max(plan.edited_in_all, plan.scored_in_all)
    answers = _answers(plan, STORED_AT_ONCE)
    batch = _batch(plan, STORED_AT_ONCE)
    return {
        "targets": plan.edited_in_all * d * 4,
        # Pre-activations, ReLU, dense codes in fp32, and those in fp64.
        "solver": max(
            ridge_bytes(tokens, n, d) + 5 * PIECE_BYTES,
            model.gradients(batch, plan.layer) + model.logits(answers),
        ),
    }


def _sequential(model: ModelSize, plan: EditPlan) -> dict[str, int]:
    d = model.hidden_size
    rows = min(plan.latents, plan.longest * plan.k)
    return {
        "copy of W_dec": plan.latents * d * 4,
        # A fact's rows, their gradient and Adam's two moments; then its way through the model.
        "solver": 4 * rows * d * 4
        + plan.longest * plan.latents * 3 * 4
        + model.gradients(plan.longest, plan.layer)
        + model.logits(max(1, plan.longest)),
    }


def _scoring(model: ModelSize, plan: EditPlan, device: str) -> dict[str, int]:
    """The edit set in use (`EditOperator`) and one batch of prompts that it scores."""
    d, rows = model.hidden_size, plan.changed_rows()
    stored = 2 + (4 if device == "cpu" else 2)
    changes = rows * d * (2 * stored + 4 if plan.joint else stored)
    # The carried change is in fp32 everywhere.
    changes += rows * d * (2 + 4) if plan.carries else 0
    scored = plan.longest * plan.latents * 3 * 4
    # On a GPU a change is made fp32 where it is used.
    widened = 0 if device == "cpu" else rows * d * 4
    answers = _answers(plan, SCORED_AT_ONCE)
    batch = model.activations(_batch(plan, SCORED_AT_ONCE))
    return {"edit set": changes + widened, "activations": scored + batch + model.logits(answers)}


def _batch(plan: EditPlan, at_once: int) -> int:
    """Tokens of a padded batch of so many prompts."""
    return min(at_once, plan.prompts) * plan.longest


def _answers(plan: EditPlan, at_once: int) -> int:
    """Answer tokens of such a batch."""
    return at_once * max(1, plan.edited // max(1, plan.prompts))


def edit_seconds(
    model: ModelSize, plan: EditPlan, model_flops: float, solver_flops: float, sae_flops: float
) -> dict[str, float]:
    """Seconds by stage, from counts of operations.

    Args:
        model_flops: per second in the model's dtype; solver_flops: with `plan.tokens_at_once`
            alone; sae_flops: in fp32.
    """
    d, below, above = model.hidden_size, model.below(plan.layer), model.above(plan.layer)
    head = model.vocabulary * d
    encode = 2 * plan.latents * d / sae_flops
    # Forward, and backward in z alone: twice a forward.
    runs = plan.steps * (4 * above * plan.tokens + 4 * head * plan.edited) / solver_flops
    if plan.joint:
        coded = 3 * (plan.edited_in_all + plan.scored_in_all) + 2 * plan.ordinary
        scoring = plan.ordinary + plan.scored_in_all
        edit = plan.ordinary + plan.edited_in_all
        solves = _ridge_operations(scoring, scoring * plan.k, plan.latents, d)
        active = int(ACTIVE_SHARE * plan.latents)
        solves += _ridge_operations(edit, edit * active, plan.latents, d)
        if plan.carries:
            pooled = plan.prompts + plan.swapped + plan.ordinary
            solves += _ridge_operations(pooled, scoring * plan.k, plan.latents, d)
        solving = runs + coded * encode + solves / sae_flops
    else:
        solving = runs + plan.tokens * encode
    checked = plan.checked + plan.tokens
    wording = {"wording": 2 * (below + above) * plan.said / model_flops} if plan.said else {}
    return {
        **wording,
        "storing residuals": 2 * below * plan.run_below / model_flops,
        "solving": solving,
        "calibrating": checked * ((2 * below + 2 * above) / model_flops + 2 * encode)
        + 2 * head * plan.edited / model_flops,
    }


def _ridge_operations(tokens: int, codes: int, rows: int, d: int) -> float:
    """Operations of one change, solved on all rows and on the kept ones, by the quickest way that
    its memory allows (`solvers.ridge`)."""
    steps = LEAST_STEPS + STEPS_PER_BLOCK * rows / d
    step = d * (GATHER_COST * 2 * codes + PANEL_PRODUCTS * rows * d)
    ways = [steps * step]
    if 4 * rows * (2 * rows + d) <= DENSE_BYTES:
        refining = REFINING_STEPS * (step + d * rows**2)
        ways.append(rows**2 * (tokens / 2 + rows / 6) + refining)
    if 8 * tokens * (2 * tokens + rows + d) <= DENSE_BYTES:
        ways.append(FP64_COST * tokens**2 * (rows + tokens / 6))
    if 8 * rows * (2 * rows + d) <= DENSE_BYTES:
        ways.append(FP64_COST * (tokens * rows * (rows / 2 + d) + rows**3 / 6))
    return 2 * 2 * min(ways)
