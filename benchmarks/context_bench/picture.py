"""Contexts as a picture: each way of asking, each decision scope beside the others."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.context_bench.measuring import Row

PANELS = (("bare", True), ("chat", True), ("chat", False))
TITLES = ("edited facts, bare", "edited facts, in chat", "not edited, in the second turn")


def draw(rows: Mapping[str, Sequence[Row]], title: str) -> bytes:
    """A PNG; a bar is the share of answer tokens as they should be, a diamond the share that is on.

    Args:
        rows: by the scope's name.
    """
    from matplotlib.figure import Figure

    panels = [
        (caption, {s: [r for r in own if (r.context, r.edited) == kind] for s, own in rows.items()})
        for caption, kind in zip(TITLES, PANELS, strict=True)
    ]
    panels = [(caption, mine) for caption, mine in panels if any(mine.values())]
    heights = [len(next(iter(mine.values()))) for _, mine in panels]
    height = 1.5 + 0.12 * sum(heights) * (1 + len(rows))
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, (caption, mine) in zip(axes, panels, strict=True):
        _panel(axis, caption, mine)
    figure.suptitle(title, fontsize=11)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()


def _panel(axis: Any, caption: str, rows: Mapping[str, Sequence[Row]]) -> None:
    thickness = 0.8 / len(rows)
    for place, (scope, mine) in enumerate(rows.items()):
        heights = [i + place * thickness for i in range(len(mine))]
        rights = [row.right for row in mine]
        axis.barh(heights, rights, thickness, color=f"C{place}", alpha=0.5, label=scope)
        fires = [row.fire_rate for row in mine]
        axis.plot(fires, heights, "d", color=f"C{place}", markersize=4)
    names = [f"{row.name} ({row.prompts})" for row in next(iter(rows.values()))]
    middle = (len(rows) - 1) * thickness / 2
    axis.set_yticks([i + middle for i in range(len(names))], names, fontsize=8)
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(len(names) - 0.3, -0.7)
    axis.grid(axis="x", alpha=0.3)
    axis.set_title(caption, fontsize=10)
