"""What a solver gets and what it gives, whichever solver it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from microedit_trainer.language_model import LanguageModel, Progress
from microedit_trainer.solvers.executors import Executor, InProcess
from microedit_trainer.stored_residuals import StoredPrompt
from microedit_vllm.artifact import DecoderChange, Scope, SparseAutoencoder

# Shown a stage of the work, the share of it that is done, in [0, 1], and a note.
Stages = Callable[[str, float, str], None]


def no_stages(stage: str, share: float, note: str) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class EditProblem:
    """The facts to edit, ready to train on.

    Attributes:
        facts: per fact, its prompt in each context it is trained in.
        reworded: per prompt of `facts`, context by context, z at the decision position of each
            of its rewordings, [W, d]; empty where the solver wants none.
        worded: the facts' questions in the model's own words, which shall switch on too; empty
            where the solver wants none.
        mentions: per fact, z of the subject's last tokens in other texts, [S, d] each, in the first
            of its contexts; empty where the solver wants none.
        ordinary: residuals of ordinary tokens, sinks left out, [N, d]: what must not change.
        swapped: the facts' wordings about other subjects, which must not switch on; empty where
            the solver wants none.
        work_folder: where a solver keeps what lets a stopped run resume.
        targets_folder: where the joint solver keeps targets and its solution for later runs; None
            keeps the targets in the work folder.
        origin: the model and layer as a stored target names them.
        executor: who finds the joint solver's targets.
        stages: shown how far the solves are.
    """

    lm: LanguageModel
    sae: SparseAutoencoder
    layer: int
    facts: Sequence[Sequence[StoredPrompt]]
    ordinary: Tensor
    work_folder: Path
    targets_folder: Path | None = None
    origin: str = ""
    reworded: Sequence[Tensor] = ()
    worded: Sequence[StoredPrompt] = ()
    mentions: Sequence[Sequence[Tensor]] = ()
    swapped: Sequence[StoredPrompt] = ()
    executor: Executor = field(default_factory=InProcess)
    stages: Stages = no_stages


@dataclass(frozen=True)
class Solution:
    """The decoder's changes and how they are to be served."""

    scoring: DecoderChange
    edit: DecoderChange
    placement: Literal["replace", "delta"]
    activation: Literal["topk", "threshold"]
    theta: float | None
    report: dict[str, Any]
    carried: DecoderChange | None = None


class Solver(Protocol):
    """One way to find the changes."""

    @property
    def name(self) -> Literal["sequential", "joint"]:
        """As the edit set records it."""

    @property
    def statistic(self) -> Literal["absolute", "relative"]:
        """What the switch decides by."""

    def scope(self, facts: int) -> Scope:
        """What the switch of a set of so many facts looks at, unless the user says otherwise."""

    def near_rate(self, facts: int) -> float:
        """Of other prompts of the kind of so many facts, the share that τ may let switch on."""

    def units_per_fact(self, contexts: int) -> int:
        """How far `solve` counts its progress for a fact in so many contexts."""

    @property
    def holds_ordinary(self) -> bool:
        """Whether it makes use of `EditProblem.ordinary`, which costs a second to collect."""

    @property
    def uses_rewordings(self) -> bool:
        """Whether it makes use of `EditProblem.reworded`."""

    @property
    def model_wordings(self) -> int:
        """How many wordings by the model itself, of each question at most, are in
        `EditProblem.worded` and among the rewordings."""

    def uses_mentions(self, facts: int) -> bool:
        """Whether it makes use of `EditProblem.mentions` with so many facts."""

    def swapped_wordings(self, facts: int) -> int:
        """Of so many facts, how many wordings at most `EditProblem.swapped` shall hold."""

    def hyperparameters(self) -> dict[str, Any]:
        """What the edit set records."""

    def solve(self, problem: EditProblem, progress: Progress) -> Solution:
        """Find the changes; `progress` is called with the number of facts done."""
