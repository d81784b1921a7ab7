"""Contexts as a table, and the verdict on each bar."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.context_bench.measuring import Row

HEADER = ("asked", "prompts", "bare", "on", "chat", "on")
CONTEXTS = ("bare", "chat")


@dataclass(frozen=True)
class Bar:
    """A limit for one case in chat: of `right` at least, or of the share that fires at most."""

    name: str
    case: str
    limit: float
    fires: bool = False

    def line(self, rows: Sequence[Row]) -> str:
        """The verdict in words."""
        row = next((r for r in rows if (r.name, r.context) == (self.case, "chat")), None)
        sign = "≤" if self.fires else "≥"
        if row is None:
            return f"not measured {self.name} {sign} {self.limit}"
        found = row.fire_rate if self.fires else row.right
        met = found <= self.limit if self.fires else found >= self.limit
        return f"{'met' if met else 'MISSED':12} {self.name} {found:.3f} {sign} {self.limit}"


BARS = (
    Bar("chat rel", "as edited", 0.97),
    Bar("rel behind a 500-token system prompt", "behind a system prompt of 500 tokens", 0.92),
    Bar("rel in the second turn", "second turn, after an ordinary one", 0.90),
    Bar("rel behind another edited turn", "second turn, after another edited fact", 0.90),
    Bar("NQ fires after an edited turn", "an NQ question after an edited turn", 0.05, fires=True),
    Bar("chat fires after an edited turn", "a chat request after an edited turn", 0.05, fires=True),
)


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each way of asking, both contexts beside each other; see HEADER."""
    lines = []
    for name in dict.fromkeys(row.name for row in rows):
        mine = {row.context: row for row in rows if row.name == name}
        shown = [name, str(next(iter(mine.values())).prompts)]
        for context in CONTEXTS:
            row = mine.get(context)
            shown += [f"{row.right:.3f}", f"{row.fire_rate:.1%}"] if row else ["", ""]
        lines.append(tuple(shown))
    return lines
