"""One edit set, described: which facts, on which SAE, solved how."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.quality import recipe
from benchmarks.quality.records import Chosen
from microedit_trainer.solvers import JointSolver, SequentialSolver, Solver
from microedit_vllm.artifact import SparseAutoencoder
from microedit_vllm.errors import MicroEditError


def alpha_of(sae: SparseAutoencoder) -> float:
    """α: the SAE's mean ‖ẑ−z‖².

    Raises:
        MicroEditError: it does not state one.
    """
    found = sae.report.get("mean_distance")
    if found is None:
        raise MicroEditError("the SAE does not state its mean ‖ẑ−z‖²; train it again")
    return float(found)


@dataclass(frozen=True)
class Experiment:
    """What differs from the recipe.

    Attributes:
        facts: which records are edited.
        options: fields of the solver.
        settings: fields of `EditSettings`: scope, near_rate, contexts.
        sae: fields of `SaeSettings`.
        timed: the seconds are reported, so no target of another run is read.
    """

    facts: Chosen
    solver: Literal["joint", "sequential"] = "joint"
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    sae: Mapping[str, Any] = field(default_factory=dict)
    timed: bool = False

    def build_solver(self, sae: SparseAutoencoder) -> Solver:
        """The solver with the recipe's fields and one's own; α is the SAE's mean distance."""
        if self.solver == "joint":
            return self._joint
        return SequentialSolver(**{"alpha": alpha_of(sae), **recipe.SEQUENTIAL, **self.options})

    @property
    def _joint(self) -> JointSolver:
        return JointSolver(**{**recipe.JOINT, **self.options})

    def build_settings(self) -> dict[str, Any]:
        """Fields of `EditSettings`; the sequential solver scores the whole prompt, as the paper."""
        solver = self._joint if self.solver == "joint" else SequentialSolver
        scope = solver.scope(sum(count for _, count in self.facts))
        return {"scope": scope, **recipe.SETTINGS, **self.settings}
