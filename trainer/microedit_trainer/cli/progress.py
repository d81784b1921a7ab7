"""The progress bars of long commands."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from microedit_trainer.sae import Progress as Callback

STAGES = {
    "sample": "sampling text",
    "collect": "collecting activations",
    "train": "training",
}


@contextmanager
def counting(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar; yields a function that takes the number of units done since its last call."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


@contextmanager
def stage_bars() -> Iterator["Callback"]:
    """One bar for each stage that work on an SAE goes through."""
    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[note]}"),
        TimeElapsedColumn(),
    )
    bars: dict[str, Any] = {}
    with Progress(*columns, console=Console(stderr=True)) as shown:

        def advance(stage: str, done: int, total: int, note: str) -> None:
            if stage not in bars:
                bars[stage] = shown.add_task(STAGES.get(stage, stage), note="", total=total)
            shown.update(bars[stage], completed=done, note=note)

        yield advance
