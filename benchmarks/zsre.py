"""Both solvers on real ZsRE records: scores, false fires, time and memory.

    python benchmarks/zsre.py --model demo/model --sae SAE --zsre zsre.jsonl --text passages.txt

Records 0 to T-1 are edited, 300 to 399 calibrate τ, 400 to 599 are `near`; none of them may be in
the SAE's text.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ordinary import count_fires, fires_in_words, nq_questions, ordinary_prompts
from microedit_trainer.contexts import Contexts
from microedit_trainer.edit_run import EditRun
from microedit_trainer.edit_settings import EditSettings
from microedit_trainer.evaluation import TorchEngine, evaluate
from microedit_trainer.facts import Fact, apart_from, read_facts
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.solvers import JointSolver, SequentialSolver, Solver
from microedit_vllm.artifact import EditOperator, EditSet, SparseAutoencoder

HOLD_OUT = slice(300, 400)
NEAR = slice(400, 600)


class Bench:
    """Model, SAE and records, loaded once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.lm = LanguageModel.load(options.model)
        self.sae_folder = options.sae
        self.sae = SparseAutoencoder.load(options.sae)
        self.records = read_facts(options.zsre)
        self.text = options.text

    def edit(self, solver: Solver, facts: list[Fact]) -> tuple[EditSet, float]:
        """A fresh edit set of `facts`, and the seconds that the whole command took."""
        settings = EditSettings(
            solver=solver,
            scope=solver.scope(len(facts)),
            hold_out=apart_from(facts, self.records[HOLD_OUT]),
        )
        run = EditRun(self.lm, self.sae, self.sae_folder, settings)
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            edit_set = run.edit(facts, Path(folder) / "set", lambda done: None)
        return edit_set, time.monotonic() - started

    def score(self, edit_set: EditSet, facts: list[Fact], contexts: list[str]) -> dict[str, Any]:
        """Scores in each context."""
        decision = edit_set.manifest.decision
        rendering = Contexts(self.lm.tokenizer, decision.scope, decision.turn, self.lm.max_length)
        engine = TorchEngine.build(self.lm, EditOperator.build(edit_set, self.sae))
        found: dict[str, Any] = {"tau": decision.tau}
        for name in contexts:
            scores = evaluate(engine, rendering, facts, self.records[NEAR], name)  # type: ignore[arg-type]
            found[name] = {k: v for k, v in scores.to_json().items() if isinstance(v, float)}
        if self.text is not None and len(facts) > 1:
            # Those that calibrated τ may be in the SAE's text, with their questions.
            others = [*self.records[: HOLD_OUT.start], *self.records[HOLD_OUT.stop :]]
            traffic = ordinary_prompts(rendering, self.text, nq_questions(others), facts)
            found["ordinary"] = count_fires(engine, traffic)
            print(f"{len(facts)} facts: {fires_in_words(found['ordinary'])} ordinary prompts fire")
        return found


def joint(bench: Bench, sizes: list[int], rows_per_fact: int | None) -> list[dict[str, Any]]:
    """The joint solver at several sizes, in every context."""
    rows = []
    for size in sizes:
        facts = bench.records[:size]
        edit_set, seconds = bench.edit(JointSolver(rows_per_fact=rows_per_fact), facts)
        found = bench.score(edit_set, facts, ["bare", "chat", "long"])
        rows.append(_row("joint", size, edit_set, seconds, found))
    return rows


def sequential(bench: Bench, sizes: list[int], solver: SequentialSolver) -> list[dict[str, Any]]:
    """The paper's solver; T = 1 is the mean over 20 facts edited one at a time."""
    rows = []
    for size in sizes:
        singles = [[fact] for fact in bench.records[:20]] if size == 1 else [bench.records[:size]]
        parts = []
        for facts in singles:
            edit_set, seconds = bench.edit(solver, facts)
            found = bench.score(edit_set, facts, ["bare"])
            parts.append(_row("sequential", size, edit_set, seconds, found))
        rows.append(_mean(parts))
    return rows


def _row(
    solver: str, size: int, edit_set: EditSet, seconds: float, found: dict[str, Any]
) -> dict[str, Any]:
    return {
        "solver": solver,
        "facts": size,
        "seconds_per_edit": edit_set.manifest.scores["seconds_per_edit"],
        "seconds_whole_command": round(seconds, 2),
        **found,
    }


def _mean(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean of each figure over several single edits; the row itself when there is one."""
    if len(parts) == 1:
        return parts[0]
    mean = dict(parts[0])
    for key in ("seconds_per_edit", "seconds_whole_command", "tau"):
        mean[key] = sum(p[key] for p in parts) / len(parts)
    mean["bare"] = {
        key: sum(p["bare"][key] for p in parts) / len(parts)
        for key in parts[0]["bare"]
        if all(key in p["bare"] for p in parts)
    }
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sae", type=Path, required=True)
    parser.add_argument("--zsre", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="passages for the ordinary prompts")
    parser.add_argument("--solver", choices=("joint", "sequential", "both"), default="both")
    parser.add_argument("--facts", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--rows-per-fact", type=int)
    parser.add_argument("--sequential", type=json.loads, default={}, help="solver options, JSON")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = Bench(options)
    rows = []
    if options.solver != "sequential":
        rows += joint(bench, [t for t in options.facts if t > 1], options.rows_per_fact)
        print(json.dumps(rows, indent=1), flush=True)
    if options.solver != "joint":
        given = {"alpha": bench.sae.report.get("mean_distance"), **options.sequential}
        rows += sequential(bench, options.facts, SequentialSolver(**given))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {"rows": rows, "peak_gib": round(peak, 2), "torch": torch.__version__}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
