"""Compile every shipped kernel at real shapes for GPUs that are not there, and refuse bad ones.

    python benchmarks/kernels_aot.py --targets sm_90
    python benchmarks/kernels_aot.py --also-triton .triton-3.6.0 --json kernels.json

Ends with status 1 where a kernel spills registers within a loop, takes more shared memory than the
target has, multiplies 16-bit tiles without the instruction that is due (wgmma on sm_90 from 64
rows), does not compile, or has no case in `kernel_resources/cases.py`. `make kernels-aot` compiles
for all targets, with the installed Triton and an older one. No GPU or driver is needed.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.kernel_resources.gate import breaches
from benchmarks.kernel_resources.pool import (
    Toolchain,
    compile_all,
    installed_triton,
    triton_in,
)
from benchmarks.kernel_resources.report import (
    as_json,
    resource_table,
    summary_table,
    tables,
    with_block,
)
from benchmarks.kernel_resources.results import TARGETS, Outcome
from microedit_vllm.artifact.atomic import write_atomically
from microedit_vllm.errors import MicroEditError

DOCS = Path(__file__).parents[1] / "docs" / "kernels.md"
# The target whose table is in the documentation.
DOCUMENTED = "sm_90"


def chosen_targets(words: str) -> list[str]:
    """Names between commas.

    Raises:
        MicroEditError: one is unknown.
    """
    names = [word.strip() for word in words.split(",")]
    for name in names:
        if name not in TARGETS:
            raise MicroEditError(f"no target {name!r}: choose from {', '.join(TARGETS)}")
    return names


def compiled(
    toolchains: Sequence[Toolchain], targets: Sequence[str]
) -> tuple[list[Outcome], list[str]]:
    """What came of all cases, and a line for each kernel without one."""
    outcomes: list[Outcome] = []
    without: set[str] = set()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for toolchain in toolchains:
            task = progress.add_task(f"Triton {toolchain.version}", total=None)
            found, missing = compile_all(
                toolchain,
                targets,
                lambda done, all_, task=task: progress.update(task, completed=done, total=all_),
            )
            outcomes += found
            without.update(missing)
    lines = [
        f"{kernel}: no case in benchmarks/kernel_resources/cases.py" for kernel in sorted(without)
    ]
    return outcomes, lines


def documented(text: str, outcomes: Sequence[Outcome], everything: bool) -> str:
    """The document with these figures: the table of one target, and the summary if `everything`."""
    triton = outcomes[0].triton
    table = resource_table(o for o in outcomes if (o.target, o.triton) == (DOCUMENTED, triton))
    text = with_block(text, "resources", table)
    return with_block(text, "summary", summary_table(outcomes)) if everything else text


def main(
    targets: Annotated[str, typer.Option(help="Which GPUs, between commas.")] = ",".join(TARGETS),
    also_triton: Annotated[
        Path | None, typer.Option(help="Folder of another Triton, from pip install --target.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="JSON result.")] = None,
    write_docs: Annotated[
        bool, typer.Option("--write-docs", help="Put the tables into docs/kernels.md.")
    ] = False,
    check_docs: Annotated[
        bool, typer.Option("--check-docs", help="Fail where the table there is another.")
    ] = False,
) -> None:
    """Compile every shipped kernel ahead of time and check what it takes."""
    names = chosen_targets(targets)
    toolchains = [installed_triton(), *([triton_in(also_triton)] if also_triton else [])]
    if write_docs and (set(names) != set(TARGETS) or len(toolchains) == 1):
        raise MicroEditError("--write-docs needs every target and --also-triton")
    if check_docs and DOCUMENTED not in names:
        raise MicroEditError(f"--check-docs needs the target {DOCUMENTED}")
    outcomes, wrong = compiled(toolchains, names)
    wrong += breaches(outcomes)
    console = Console()
    # Not a terminal: a log, where a table may be as wide as it is.
    wide = console if console.is_terminal else Console(width=180)
    for table in tables(outcomes):
        wide.print(table)
    if out:
        write_atomically(out, (json.dumps(as_json(outcomes), indent=1) + "\n").encode())
    text = DOCS.read_text() if write_docs or check_docs else ""
    if write_docs and not wrong:
        write_atomically(DOCS, documented(text, outcomes, everything=True).encode())
    if check_docs and documented(text, outcomes, everything=False) != text:
        wrong.append("docs/kernels.md has another table: run make kernels-aot ARGS=--write-docs")
    for line in wrong:
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    if wrong:
        raise typer.Exit(1)
    console.print(f"{len(outcomes)} kernels compiled, none out of bounds", highlight=False)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MicroEditError as error:
        sys.exit(f"kernels_aot: {error}")
