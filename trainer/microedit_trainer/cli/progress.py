"""The progress bars of long commands."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
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
def edit_bars(
    console: Console, total: int
) -> Iterator[tuple[Callable[[int], None], Callable[[str, float, str], None]]]:
    """One bar for the facts and one for each other stage of an edit run.

    Yields two functions: one takes the number of facts' prompts done since its last call, the
    other a stage, the share of it that is done, and a note.
    """
    columns = (
        TextColumn("{task.description:14}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as shown:
        bars: dict[str, Any] = {}

        def stage(name: str, share: float, note: str) -> None:
            if name not in bars:
                bars[name] = shown.add_task(name, total=1.0, note=note)
            shown.update(bars[name], completed=share, note=note)

        def advance(done: int) -> None:
            if "editing" not in bars:
                bars["editing"] = shown.add_task("editing", total=total, note=f"{total} prompts")
            shown.advance(bars["editing"], done)

        yield advance, stage


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
