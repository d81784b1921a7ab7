"""Figures as they stand in a table."""

from typing import Any

from benchmarks.quality.store import Figures

SCORES = ("rel", "gen", "loc", "near", "near_swapped")
SCORES_HEADER = ("Rel", "Gen", "Loc", "near", "own wording")


def score(value: float | None, bar: float | None = None) -> str:
    """Three digits; a missed bar stands behind the figure."""
    if value is None:
        return "–"
    missed = bar is not None and value < bar
    return f"**{value:.3f}** (< {bar})" if missed else f"{value:.3f}"


def percent(value: float | None) -> str:
    """A share, "–" for none."""
    return "–" if value is None else f"{value:.1%}"


def scores(found: dict[str, Any], bars: dict[str, float] | None = None) -> list[str]:
    """The five scores of one context, with the bars that some of them have."""
    return [score(found[name], (bars or {}).get(name)) for name in SCORES]


def size(figures: Figures) -> str:
    """Rows of the change, or of both, and what part of the decoder they are."""
    rows = " + ".join(map(str, figures["rows"]))
    return f"{rows} ({figures['share_of_decoder']:.0%})"
