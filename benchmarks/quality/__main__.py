"""Every table and picture of docs/quality.md.

    python -m benchmarks.quality                        # the same as `make quality`
    python -m benchmarks.quality --only main,ordinary   # some of them; the others stay
    python -m benchmarks.quality --quick --out quick.md

Hours on two cores. A stopped run goes on where it was: each row is kept in the work folder as soon
as it is measured, and SAEs, edit sets and targets are kept too.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.quality.lab import Lab
from benchmarks.quality.page import write_page
from benchmarks.quality.plan import FULL, QUICK
from benchmarks.quality.records import Records
from benchmarks.quality.tables import (
    ablations,
    budgets,
    carrying,
    contexts,
    decisions,
    main,
    ordinary,
    paraphrases,
    saes,
    selfcheck,
    subjects,
)
from benchmarks.quality.tables.experiments import main_experiments
from microedit_trainer.demo.run import cache_folder
from microedit_trainer.demo.smollm2 import prepare_smollm2
from microedit_vllm.errors import MicroEditError

TABLES = {
    table.NAME: table
    for table in (
        *(main, paraphrases, subjects, carrying, contexts, ordinary, selfcheck),
        *(budgets, ablations, decisions, saes),
    )
}


def quality(
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub id; default: the demo's.")
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder of the benchmark records.")] = Path(
        "../shared/data"
    ),
    sae: Annotated[
        Path | None, typer.Option(help="SAE folder in place of the one that would be trained.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder that keeps everything.")] = Path(".quality"),
    out: Annotated[Path, typer.Option(help="The page; pictures beside it.")] = Path(
        "docs/quality.md"
    ),
    only: Annotated[str, typer.Option(help=f"Of {', '.join(TABLES)}.")] = ",".join(TABLES),
    quick: Annotated[bool, typer.Option("--quick", help="Few facts, to try the way.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again; SAEs and targets stay.")
    ] = False,
) -> None:
    """Build the tables and write the page."""
    names = only.split(",")
    if unknown := sorted(set(names) - set(TABLES)):
        raise MicroEditError(f"no table {unknown[0]!r}; choose from {', '.join(TABLES)}")
    if quick and out == Path("docs/quality.md"):
        raise MicroEditError("--quick gives figures that mean little; name another --out")
    if model is None:
        model = str(prepare_smollm2(cache_folder() / "smollm2"))
    lab = Lab(model, Records(data), work, sae, Console(stderr=True), one_sae=quick)
    plan = QUICK if quick else FULL
    if fresh:
        lab.forget_results()
    made_with = lab.description(main_experiments(plan)["some"])
    for name in TABLES:
        if name in names:
            write_page(out, made_with, [TABLES[name].section(lab, plan)], list(TABLES))
            lab.say(f"{name}: written to {out}")


if __name__ == "__main__":
    try:
        typer.run(quality)
    except MicroEditError as error:
        sys.exit(f"quality: {error}")
