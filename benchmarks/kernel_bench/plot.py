"""Time against batch size, each operator beside its floor and plain torch; overhead of a step."""

import io
from collections.abc import Sequence
from typing import Any

from benchmarks.kernel_bench.overhead import TRAFFIC, Overhead
from benchmarks.kernel_bench.report import Figure


def plot(figures: Sequence[Figure], steps: Sequence[Overhead], title: str) -> bytes:
    """A PNG.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure as Canvas

    good = [f for f in figures if f.error is None]
    operators = list(dict.fromkeys(f.case.operator for f in good))
    panels = max(1, len(operators) + bool(steps))
    canvas = Canvas(figsize=(4.5 * panels, 4), layout="constrained")
    axes = canvas.subplots(1, panels, squeeze=False)[0]
    for axis, operator in zip(axes, operators, strict=False):
        _times(axis, operator, [f for f in good if f.case.operator == operator])
    if steps:
        _overhead(axes[-1], steps)
    canvas.suptitle(title)
    image = io.BytesIO()
    canvas.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _times(axis: Any, operator: str, figures: Sequence[Figure]) -> None:
    for i, label in enumerate(dict.fromkeys(f.case.label for f in figures)):
        mine = [f for f in figures if f.case.label == label]
        rows, colour = [f.case.rows for f in mine], f"C{i}"
        axis.loglog(rows, [f.seconds * 1e6 for f in mine], "o-", color=colour, label=label)
        axis.loglog(rows, [f.floor * 1e6 for f in mine], ":", color=colour)
        if all(f.torch is not None for f in mine):
            axis.loglog(rows, [f.torch * 1e6 for f in mine], "--", color=colour, alpha=0.6)
    axis.set(title=operator, xlabel="rows M (: floor, -- torch)", ylabel="µs")
    axis.legend(fontsize=8)


def _overhead(axis: Any, steps: Sequence[Overhead]) -> None:
    for traffic in TRAFFIC:
        mine = [s for s in steps if s.traffic == traffic.name]
        axis.semilogx(
            [s.rows for s in mine],
            [s.inside * 100 for s in mine],
            "o-",
            label=traffic.name,
        )
    axis.set(title="added to a decode step", xlabel="rows M", ylabel="%")
    axis.legend(fontsize=8)
