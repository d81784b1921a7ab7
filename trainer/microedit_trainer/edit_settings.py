"""What a user chooses of an edit run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from microedit_trainer.contexts import ContextName, Contexts
from microedit_trainer.facts import Fact
from microedit_trainer.solvers import Executor, InProcess, Solver
from microedit_vllm.artifact import Scope
from microedit_vllm.errors import MicroEditError


@dataclass(frozen=True)
class EditSettings:
    """What an edit run needs beside model, SAE and facts.

    Attributes:
        solver: one of the two.
        scope: which tokens the switch scores.
        layer: decoder layer; None takes the one that the SAE was trained on.
        tau: fixes τ instead of calibrating it.
        near_rate: share of the near calibration prompts that may switch on: the held-out ones,
            and with the joint solver the facts' own wordings about another subject. None: what
            the solver says for so many facts.
        contexts: contexts that the facts are trained in. None: all that the model has, the bare
            one with the sequential solver, which like the paper trains one prompt a fact.
        hold_out: records of the same kind as the facts, for τ alone; never edited.
        targets: folder in which a run keeps, for later ones, what does not depend on the other
            facts: residuals and the joint solver's targets; and that solver's last solution.
        language: which language the facts were read in, for the record; see `read_facts`.
        executor: who finds the joint solver's targets.
        offload: the layers up to l and the SAE take turns on the device: less memory, same set.
    """

    solver: Solver
    scope: Scope
    layer: int | None = None
    tau: float | None = None
    near_rate: float | None = None
    contexts: tuple[ContextName, ...] | None = None
    hold_out: Sequence[Fact] = field(default=())
    targets: Path | None = None
    language: str | None = None
    executor: Executor = field(default_factory=InProcess)
    offload: bool = False

    def context_names(self, contexts: Contexts) -> tuple[ContextName, ...]:
        """The contexts that facts are trained in, of those that there are."""
        if self.contexts is not None:
            return self.contexts
        return contexts.names if self.solver.name == "joint" else ("bare",)

    def __post_init__(self) -> None:
        """Raises MicroEditError: a τ that no ARD can be compared with."""
        if self.tau is not None and not 0 < self.tau < math.inf:
            raise MicroEditError(f"tau is {self.tau}; it must be a positive number")
