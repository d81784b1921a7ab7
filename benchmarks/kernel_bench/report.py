"""Figures as a table on the screen, Markdown, JSON; and the verdict on each bar."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.kernel_bench.overhead import EDITED, IDLE, Overhead
from benchmarks.kernel_bench.shapes import OPERATORS, Case

_BAR_ROWS = 64
_BAR_LATENTS = 5_000


@dataclass(frozen=True)
class Figure:
    """One case: seconds of a launch beside its floors and rivals, or what is wrong with it."""

    case: Case
    seconds: float | None = None
    floor: float | None = None
    bound: str = ""
    streamed: float | None = None
    torch: float | None = None
    idle: float | None = None
    bytes: int | None = None
    distinct_bytes: int | None = None
    flops: int | None = None
    error: str | None = None

    def over(self, floor: float | None) -> float | None:
        return None if self.seconds is None or not floor else self.seconds / floor

    def asdict(self) -> dict[str, Any]:
        return {**asdict(self), "label": self.case.label, "over_floor": self.over(self.floor)}


@dataclass(frozen=True)
class Bar:
    """`measured` against `limit`, both times or both shares; None where it was not measured."""

    name: str
    measured: float | None
    limit: float
    share: bool = False
    beside: str = ""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return "met" if self.measured <= self.limit else "MISSED"

    def line(self) -> str:
        def shown(value: float) -> str:
            return f"{value:.2%}" if self.share else f"{value:.2f} ×"

        measured = "" if self.measured is None else f"{shown(self.measured)} "
        beside = f" ({self.beside})" if self.beside and self.measured is not None else ""
        return f"{self.verdict:12} {self.name}: {measured}bar {shown(self.limit)}{beside}"


def bars(figures: Sequence[Figure], steps: Sequence[Overhead]) -> list[Bar]:
    """The issue's bars. A step's overhead is the larger of the two ways to measure it."""
    found = []
    for operator, limit in (("topk_encode", 1.25), ("sparse_decode", 1.5), ("edit_change", 1.3)):
        for figure in figures:
            case = figure.case
            one = case.edit is None or (case.edit.latents, case.edit.sets) == (_BAR_LATENTS, 1)
            if case.operator == operator and case.rows == _BAR_ROWS and one:
                streamed = figure.over(figure.streamed)
                beside = "" if streamed is None else f"{streamed:.2f} × the streamed read"
                name = f"{operator}, {case.label}, M = {case.rows}, over its floor"
                found.append(Bar(name, figure.over(figure.floor), limit, beside=beside))
    whole = [s for s in steps if s.operators == OPERATORS]
    edited = [s for s in whole if s.traffic == EDITED.name and s.rows == _BAR_ROWS]
    idle = [s for s in whole if s.traffic == IDLE.name]
    for name, of, limit in (
        (f"a step with {EDITED.name}, M = {_BAR_ROWS}", edited, 0.01),
        (f"a step with {IDLE.name}, the worst M", idle, 0.005),
    ):
        shares = [max(s.alone, s.inside) for s in of if s.alone is not None]
        found.append(Bar(name, max(shares, default=None), limit, share=True))
    return found


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> str:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(headings), *([line(rule)] if markdown else []), *map(line, rows)])


def _micro(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e6:,.1f}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def kernel_table(figures: Sequence[Figure], markdown: bool = False) -> str:
    """Times in µs; a kernel that failed its check has none."""
    headings = ["kernel", "shape", "M", "µs", "floor", "by", "×", "streamed", "×", "torch"]
    headings += ["idle", "MB", "distinct"]
    rows = []
    for f in figures:
        cells = [f.case.operator, f.case.label, str(f.case.rows)]
        if f.error is None:
            cells += [_micro(f.seconds), _micro(f.floor), f.bound[:3], _times(f.over(f.floor))]
            cells += [_micro(f.streamed), _times(f.over(f.streamed)), _micro(f.torch)]
            sizes = (f.bytes, f.distinct_bytes)
            cells += [_micro(f.idle), *("" if s is None else f"{s / 1e6:,.1f}" for s in sizes)]
        else:
            cells += ["WRONG"] + [""] * 9
        rows.append(cells)
    return _table(headings, rows, markdown)


def step_table(steps: Sequence[Overhead], markdown: bool = False) -> str:
    """Shares of a plain step."""
    headings = ["step", "M", "step µs", "its floor", "alone", "inside", "±", "noise"]
    rows = []
    for s in steps:
        cells = [s.traffic, str(s.rows)]
        if s.error is None:
            shares = (s.alone, s.inside, s.spread, s.noise)
            cells += [_micro(s.step), _micro(s.step_floor)]
            cells += [f"{share:+.2%}" for share in shares if share is not None]
        else:
            cells += ["WRONG"] + [""] * 5
        rows.append(cells)
    return _table(headings, rows, markdown)


def failures(figures: Sequence[Figure], steps: Sequence[Overhead]) -> list[str]:
    """One line for each check that failed."""
    found = [
        f"{f.case.operator}, {f.case.label}, M = {f.case.rows}: {f.error}"
        for f in figures
        if f.error is not None
    ]
    return found + [f"step, M = {s.rows}: {s.error}" for s in steps if s.error is not None]


def text(found: dict[str, Any], markdown: bool = False) -> str:
    """Everything, the verdicts last.

    Args:
        found: environment (of str), rates, figures, steps, bars (empty where none can be judged),
            seconds.
    """
    figures, steps = found["figures"], found["steps"]
    environment = dict(found["environment"])
    timing = environment.pop("timing")
    rates = found["rates"]
    measured = (
        f"measured: read {rates['read'] / 1e12:.3g} TB/s, copy {rates['copy'] / 1e12:.3g} TB/s, "
        f"matmul {rates['matmul'] / 1e12:.3g} TFLOP/s"
    )
    parts = [f"{', '.join(environment.values())}\n{measured}\nTimes in µs: {timing}."]
    if figures:
        parts.append(kernel_table(figures, markdown))
    if steps:
        operators = ", ".join(steps[0].operators)
        parts.append(f"Share of a step that the kernels add ({operators}):")
        parts.append(step_table(steps, markdown))
    if wrong := failures(figures, steps):
        parts.append("\n".join(["Failed their checks, so without a figure:", *wrong]))
    if found["bars"]:
        lines = [bar.line() for bar in found["bars"]]
        parts.append("\n".join(f"- {line}" for line in lines) if markdown else "\n".join(lines))
    parts.append(f"{found['seconds']:.0f} s in all")
    return "\n\n".join(parts) + "\n"


def as_json(found: dict[str, Any]) -> str:
    plain = {
        **found,
        "figures": [figure.asdict() for figure in found["figures"]],
        "steps": [asdict(step) for step in found["steps"]],
        "bars": [{**asdict(bar), "verdict": bar.verdict} for bar in found["bars"]],
    }
    return json.dumps(plain, indent=1) + "\n"
