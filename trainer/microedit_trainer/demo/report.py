"""What the demo shows: a table, a summary, and a picture of ARD against τ."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from microedit_trainer.demo.client import Answer
from microedit_trainer.demo.prompts import Kind, Question
from microedit_vllm.artifact.atomic import write_atomically

KINDS: tuple[Kind, ...] = ("edited", "paraphrase", "chat", "near", "unrelated")


@dataclass(frozen=True)
class Exchange:
    """One question and its answers from the plain and from the MicroEdit server."""

    question: Question
    before: Answer
    after: Answer

    @property
    def is_correct(self) -> bool:
        return self.question.is_answered_by(self.after.text)

    @property
    def is_identical(self) -> bool:
        return self.before.text == self.after.text


@dataclass(frozen=True)
class Summary:
    """`demo/summary.json`."""

    edited_correct: int
    edited_total: int
    paraphrase_correct: int
    paraphrase_total: int
    chat_correct: int
    chat_total: int
    unrelated_identical: int
    unrelated_total: int
    near_identical: int
    near_total: int
    self_check_findings: int
    seconds_per_edit: float
    tokens_per_second_plain: float
    tokens_per_second_microedit: float
    seconds_total: float

    def write(self, path: Path) -> None:
        write_atomically(path, (json.dumps(asdict(self), indent=2) + "\n").encode())


def count_correct(exchanges: Sequence[Exchange], kind: Kind) -> tuple[int, int]:
    """Right answers and all of a kind that has a target."""
    own = [e for e in exchanges if e.question.kind == kind]
    return sum(e.is_correct for e in own), len(own)


def count_identical(exchanges: Sequence[Exchange], kind: Kind) -> tuple[int, int]:
    """Answers equal to the letter before and after, and all of a kind."""
    own = [e for e in exchanges if e.question.kind == kind]
    return sum(e.is_identical for e in own), len(own)


def print_table(console: Console, exchanges: Sequence[Exchange]) -> None:
    """Prompt, before, after, switch, ARD against τ; one section a kind of prompt."""
    table = Table(show_lines=False, expand=True)
    for name, ratio in (("prompt", 4), ("before", 3), ("after", 3)):
        table.add_column(name, ratio=ratio, overflow="ellipsis", no_wrap=True)
    for name in ("switch", "ARD / τ"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind in KINDS:
        table.add_section()
        table.add_row(Text(kind, style="bold"))
        for exchange in exchanges:
            if exchange.question.kind == kind:
                table.add_row(*_cells(exchange))
    console.print(table)


def _cells(exchange: Exchange) -> list[Text]:
    after = exchange.after
    has_target = exchange.question.target is not None
    good = exchange.is_correct if has_target else exchange.is_identical
    ard = "-" if after.ard is None or math.isinf(after.ard) else f"{after.ard:.2f}"
    return [
        Text(exchange.question.prompt),
        Text(_one_line(exchange.before.text)),
        Text(_one_line(after.text), style="green" if good else "red"),
        Text("on" if after.on else "off"),
        Text(f"{ard} / {after.tau:.2f}" if after.tau is not None else ard),
    ]


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def print_summary(console: Console, summary: Summary) -> None:
    """The counts, a line each."""
    table = Table(show_header=False, box=None)
    for name in ("edited", "paraphrase", "chat"):
        right, total = getattr(summary, f"{name}_correct"), getattr(summary, f"{name}_total")
        table.add_row(f"{name} prompts answered with the new fact", f"{right} of {total}")
    for name in ("unrelated", "near"):
        same, total = getattr(summary, f"{name}_identical"), getattr(summary, f"{name}_total")
        table.add_row(f"{name} prompts answered as before, to the letter", f"{same} of {total}")
    table.add_row("seconds per edit", f"{summary.seconds_per_edit:.2f}")
    table.add_row("tokens/s, plain vLLM", f"{summary.tokens_per_second_plain:.0f}")
    table.add_row("tokens/s, with the edit set", f"{summary.tokens_per_second_microedit:.0f}")
    table.add_row("seconds in all", f"{summary.seconds_total:.0f}")
    console.print(table)


def draw_ard(path: Path, exchanges: Sequence[Exchange], tau: float) -> None:
    """`demo/ard.png`: ARD of every kind of prompt against τ, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for row, kind in enumerate(KINDS):
        ards = [e.after.ard for e in exchanges if e.question.kind == kind]
        shown = [ard for ard in ards if ard is not None and math.isfinite(ard)]
        spread = [row + 0.25 * math.sin(2.4 * i) for i in range(len(shown))]
        colour = "tab:blue" if kind in ("near", "unrelated") else "tab:orange"
        axes.scatter(shown, spread, s=18, alpha=0.75, color=colour, linewidths=0)
    axes.axvline(tau, color="black", linestyle="--", linewidth=1)
    axes.annotate(f"τ = {tau:.2f}", (tau, -0.62), ha="center", va="bottom", fontsize=9)
    axes.set_yticks(range(len(KINDS)), KINDS)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("relative ARD (left of τ the edit applies)")
    axes.set_title("What the switch sees")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
