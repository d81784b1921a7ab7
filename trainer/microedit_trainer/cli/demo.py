"""`microedit demo`: the whole loop on a real model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
) -> None:
    """Edit SmolLM2-135M, serve it with vLLM, and compare it with the plain model."""
    from microedit_trainer.demo.run import run_demo

    console = Console(width=None if Console().is_terminal else 160)
    summary = run_demo(out, console)
    console.print(f"summary: {out / 'summary.json'}; picture: {out / 'ard.png'}")
    unedited = summary.edited_total - summary.edited_correct
    changed = summary.unrelated_total - summary.unrelated_identical
    if unedited or changed or summary.self_check_findings:
        console.print(
            f"[red]{unedited} edited facts not answered, {changed} unrelated answers changed, "
            f"{summary.self_check_findings} findings of the self-check[/]"
        )
        raise typer.Exit(1)
