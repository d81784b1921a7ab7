"""The experiments that several tables are about."""

from typing import Any

from benchmarks.quality import recipe
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.plan import Plan

# Solver fields of a set that carries its answers as large ones do, whatever its size.
CARRIED: dict[str, Any] = {"carries": True, "swapped_weight": 10.0}


def main_experiments(plan: Plan) -> dict[str, Experiment]:
    """The rows of the main table, by a name for each."""
    return {
        "some": Experiment(plan.some, timed=True),
        "more": Experiment(plan.more, timed=True),
        "all": Experiment(plan.all_records, sae=recipe.SAE_WITHOUT_RECORDS, timed=True),
        "sequential": Experiment(plan.some, solver="sequential", timed=True),
    }
