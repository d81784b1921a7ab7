"""Thousands of synthetic facts through the whole edit run: seconds by stage, memory, scores.

    python benchmarks/scale.py --model MODEL --sae SAE --facts 10000 --targets FOLDER

`--targets` keeps what was found, so that a stopped run goes on, and `--add-one` then adds one fact
to the same set. `--compare-dense` solves twice, by conjugate gradients and densely in fp64, and
prints how far the two changes are apart. `--solver sequential` edits fact after fact as the paper
does, all rows, and prints how memory grows with the facts that are done.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.synthetic_facts import synthetic_facts
from microedit_trainer.contexts import ContextName
from microedit_trainer.edit_run import EditRun
from microedit_trainer.edit_settings import EditSettings
from microedit_trainer.evaluation import Scores, TorchEngine, evaluate
from microedit_trainer.facts import Fact
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.solvers import JointSolver, SequentialSolver, Solver, joint
from microedit_trainer.solvers.dense_systems import RowSystem
from microedit_trainer.solvers.ridge import IterativeSystem, System
from microedit_trainer.solvers.sparse_codes import CodedTerms, Watch
from microedit_vllm.artifact import EditOperator, EditSet, SparseAutoencoder

OTHERS = 200


class Clock:
    """Seconds of each stage of a run, from what the run shows of itself, and memory on the way."""

    def __init__(self, units: int) -> None:
        self.seconds: dict[str, float] = {}
        self.notes: dict[str, list[str]] = {}
        self.peaks: dict[str, float] = {}
        self._stage, self._since = "start", time.monotonic()
        self._units, self._done = units, 0

    def progress(self, done: int) -> None:
        """So many more targets, or edits of the sequential solver, are there."""
        self.stage("facts", 0.0, "")
        self._done += done
        for share in (10, 50, 100):
            if self._done * 100 >= self._units * share:
                self.peaks.setdefault(f"{share}%", peak_gib())

    def stage(self, name: str, share: float, note: str) -> None:
        self.stop()
        self._stage = name
        if note:
            self.notes.setdefault(name, []).append(note)

    def stop(self) -> None:
        """Book the seconds since the last call on the stage that was shown then."""
        now = time.monotonic()
        spent = self.seconds.get(self._stage, 0.0) + now - self._since
        self.seconds[self._stage] = spent
        self._since = now

    def rounded(self) -> dict[str, float]:
        return {name: round(spent, 1) for name, spent in self.seconds.items()}

    def solver_steps(self) -> dict[str, str]:
        """The last step of each solve by conjugate gradients, with its residual."""
        steps = {
            name: [note for note in notes if note.startswith("step")]
            for name, notes in self.notes.items()
        }
        return {name: found[-1] for name, found in steps.items() if found}


class Scale:
    """Model and SAE, loaded once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.lm = LanguageModel.load(options.model)
        self.sae_folder = options.sae
        self.sae = SparseAutoencoder.load(options.sae)
        self.contexts: tuple[ContextName, ...] | None = options.contexts and tuple(options.contexts)
        self.rows_per_fact = options.rows_per_fact
        self.passes = options.passes
        self.build = {"joint": self._joint, "sequential": self._sequential}[options.solver]

    def _joint(self) -> Solver:
        return JointSolver(rows_per_fact=self.rows_per_fact)

    def _sequential(self) -> Solver:
        alpha = float(self.sae.report["mean_distance"])
        return SequentialSolver(
            alpha, position="sequence", passes=self.passes, statistic="relative"
        )

    def edit(self, facts: list[Fact], targets: Path) -> tuple[EditSet, EditRun, dict[str, Any]]:
        """The set, and what making it took."""
        solver = self.build()
        settings = EditSettings(
            solver=solver,
            scope=solver.scope(len(facts)),
            contexts=self.contexts,
            targets=targets,
        )
        run = EditRun(self.lm, self.sae, self.sae_folder, settings)
        clock = Clock(run.units(facts))
        with tempfile.TemporaryDirectory() as folder:
            edit_set = run.edit(facts, Path(folder) / "set", clock.progress, clock.stage)
            size = sum(file.stat().st_size for file in (Path(folder) / "set").iterdir())
        clock.stop()
        manifest = edit_set.manifest
        return (
            edit_set,
            run,
            {
                "facts": len(facts),
                "seconds": clock.rounded(),
                "seconds_in_all": round(sum(clock.seconds.values()), 1),
                "steps": clock.solver_steps(),
                "peak_gib_on_the_way": clock.peaks,
                "tau": manifest.decision.tau,
                "rel": manifest.scores["rel"],
                "rows": {name: len(c.indices) for name, c in edit_set.changes.items()},
                "set_mib": round(size / 2**20, 1),
                "kept_mib": round(sum(f.stat().st_size for f in targets.iterdir()) / 2**20, 1),
                "peak_gib": peak_gib(),
            },
        )

    def score(
        self, edit_set: EditSet, run: EditRun, facts: Sequence[Fact], others: Sequence[Fact]
    ) -> dict[str, Any]:
        """Rel, Gen and near in each context, on facts spread over the set."""
        engine = TorchEngine.build(self.lm, EditOperator.build(edit_set, self.sae))
        found: dict[str, Any] = {}
        for context in run.context_names:
            scores: Scores = evaluate(engine, run.contexts, facts, others, context)
            wanted = ("rel", "gen", "near", "near_swapped", "fire_edit", "fire_para", "fire_near")
            found[context] = {name: getattr(scores, name) for name in wanted}
        return {"scored_facts": len(facts), **found}


class BothWays:
    """Solves by conjugate gradients and densely in fp64, and remembers how far apart they are."""

    def __init__(self, coded: CodedTerms, watch: Watch, apart: list[float]) -> None:
        self._iterative = IterativeSystem.of(coded, watch)
        self._dense = RowSystem.of(coded, watch)
        self._apart = apart

    def solve(
        self,
        ridge: float,
        kept: Tensor | None = None,
        start: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        ways = (self._iterative, self._dense)
        found, wanted = (way.solve(ridge, kept, start, last) for way in ways)
        self._apart.append(float((found - wanted).norm() / wanted.norm()))
        return found


def apart(scale: Scale, facts: list[Fact], targets: Path) -> list[float]:
    """‖ΔW − ΔW_dense‖ / ‖ΔW_dense‖ of each solve: scoring, then edit, each on all rows and, where
    the budget is less, on the strongest."""
    found: list[float] = []

    def system(coded: CodedTerms, watch: Watch) -> System:
        return BothWays(coded, watch, found)

    with patch.object(joint, "ridge_system", system):
        scale.edit(facts, targets)
    return found


def peak_gib() -> float:
    """The most memory that this process has had."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sae", type=Path, required=True)
    parser.add_argument("--facts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contexts", nargs="+", choices=("bare", "chat"))
    parser.add_argument("--solver", choices=("joint", "sequential"), default="joint")
    parser.add_argument("--rows-per-fact", type=int, default=15, help="joint")
    parser.add_argument("--passes", type=int, default=1, help="sequential")
    parser.add_argument("--targets", type=Path, help="keep what was found in this folder")
    parser.add_argument("--scored", type=int, default=300, help="facts to ask in other words")
    parser.add_argument("--add-one", action="store_true", help="then add one fact")
    parser.add_argument("--compare-dense", action="store_true", help="then solve densely as well")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    scale = Scale(options)
    facts = synthetic_facts(options.facts + 1 + OTHERS, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        targets = options.targets or Path(folder)
        targets.mkdir(parents=True, exist_ok=True)
        edit_set, run, result = scale.edit(facts[: options.facts], targets)
        print(json.dumps(result), flush=True)
        spread = facts[: options.facts][:: -(-options.facts // options.scored)]
        result |= scale.score(edit_set, run, spread, facts[options.facts + 1 :])
        if options.add_one:
            result["add_one"] = scale.edit(facts[: options.facts + 1], targets)[2]
        if options.compare_dense:
            result["apart_from_dense"] = apart(scale, facts[: options.facts], targets)
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
