"""An explanation as a picture: ARD by token against τ, and the rows with their facts."""

import io
import warnings
from pathlib import Path
from typing import Any

from microedit_trainer.audit.explanation import Explanation, Firing, Token
from microedit_vllm.artifact.atomic import write_atomically
from microedit_vllm.errors import MicroEditError

DECIDES, COUNTED, LEFT_OUT = "tab:orange", "tab:blue", "lightgrey"
# Of a long prompt the end, which is where the switch looks.
MOST_TOKENS = 96
# A few far tokens must not flatten the others; bars are cut off at this many τ.
TALLEST = 4.0
LONGEST_LABEL = 42
LONGEST_TITLE = 100


def check_picture(path: Path) -> None:
    """Refuse a file that the picture cannot be written to, before the work is done.

    Raises:
        MicroEditError: not named .png, or a folder.
    """
    if path.suffix.lower() != ".png" or path.is_dir():
        raise MicroEditError(f"--out writes a PNG, not {path}; name a file that ends in .png")


def draw_explanation(path: Path, explanation: Explanation) -> None:
    """Write the picture as a PNG, atomically.

    Raises:
        MicroEditError: it cannot be written.
    """
    from matplotlib.figure import Figure

    tokens = explanation.tokens[-MOST_TOKENS:]
    width = max(9.0, 1.5 + 0.24 * len(tokens))
    changes = _changes(explanation)
    figure = Figure(figsize=(max(width, 4.5 * len(changes)), 7.5), layout="constrained")
    top, *below = figure.subplot_mosaic([["tokens"] * len(changes), list(changes)]).values()
    _draw_tokens(top, explanation, tokens)
    for axes, (title, firing) in zip(below, changes.items(), strict=True):
        _draw_rows(axes, firing, title)
    figure.suptitle(shortened(explanation.prompt, LONGEST_TITLE), parse_math=False)
    answers = [
        shortened(text, LONGEST_TITLE // 2) for text in (explanation.before, explanation.after)
    ]
    figure.supxlabel("before: {}    after: {}".format(*answers), fontsize=10, parse_math=False)
    image = io.BytesIO()
    with warnings.catch_warnings():
        # A token's letters that no installed font has are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(image, format="png", dpi=130)
    write_atomically(path, image.getvalue())


def _changes(explanation: Explanation) -> dict[str, Firing]:
    """What the set's changes do, by the titles of their plots."""
    found = {"rows that score, where it was decided": explanation.scoring}
    if explanation.carried is not None:
        found["rows that carry, at the tokens that it knows"] = explanation.carried
    return found | {f"rows that edit, at token {explanation.decision_position}": explanation.edit}


def _draw_tokens(axes: Any, explanation: Explanation, tokens: tuple[Token, ...]) -> None:
    tau = explanation.tau
    heights = [0.0 if t.ratio is None else min(t.ratio, TALLEST * tau) for t in tokens]
    axes.bar(range(len(tokens)), heights, color=[_colour(t) for t in tokens], width=0.8)
    runs = [(place, t.run_ard) for place, t in enumerate(tokens) if t.run_ard is not None]
    if runs:
        places, ards = zip(*runs, strict=True)
        shown = [min(ard, TALLEST * tau) for ard in ards]
        axes.plot(
            places, shown, ".-", color="black", linewidth=1, label="ARD of the run up to here"
        )
    axes.axhline(tau, color="tab:red", linestyle="--", linewidth=1, label=f"τ = {tau:.3f}")
    for colour, name in ((DECIDES, "decides"), (COUNTED, "counted"), (LEFT_OUT, "not counted")):
        axes.bar(0, 0, color=colour, label=name)
    axes.legend(fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    labels = [one_line(t.text) for t in tokens]
    axes.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=8, parse_math=False)
    axes.set_xlim(-0.7, len(tokens) - 0.3)
    axes.set_ylim(0, TALLEST * tau if max(heights, default=0) > 2 * tau else 2 * tau)
    axes.set_ylabel(f"{explanation.statistic} ARD of a token")
    axes.set_title(headline(explanation), fontsize=11, pad=24)


def _colour(token: Token) -> str:
    if token.decides:
        return DECIDES
    return COUNTED if token.scored and not token.sink else LEFT_OUT


def _draw_rows(axes: Any, firing: Firing, title: str) -> None:
    axes.set_title(f"{title} ({firing.rows_firing} of {firing.rows_total})", fontsize=10)
    axes.set_xlabel("share of what the change adds")
    places = range(len(firing.rows))
    axes.xaxis.set_major_formatter("{x:.1%}")
    axes.barh(places, [row.share for row in firing.rows], color="tab:green", alpha=0.45)
    axes.set_yticks(places, [str(row.latent) for row in firing.rows], fontsize=8)
    axes.invert_yaxis()
    for place, row in zip(places, firing.rows, strict=True):
        if row.facts:
            first = row.facts[0]
            axes.text(
                0.0,
                place,
                f" {first.share:.0%} {shortened(first.prompt, LONGEST_LABEL)}",
                va="center",
                fontsize=7,
                parse_math=False,
                clip_on=True,
            )
    if not firing.rows:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "none fires", ha="center", va="center", transform=axes.transAxes)


def headline(explanation: Explanation) -> str:
    """ARD against τ and the decision, on one line."""
    if explanation.ard is None:
        return f"nothing can be scored, so the switch is off (τ {explanation.tau:.3f})"
    sign, switch = ("≤", "on") if explanation.on else (">", "off")
    return (
        f"{explanation.statistic} ARD {explanation.ard:.3f} {sign} τ {explanation.tau:.3f}: "
        f"the switch is {switch}"
    )


def one_line(text: str) -> str:
    """A token as it can be shown: blanks marked, line breaks and tabs spelled."""
    spelled = text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return spelled.replace(" ", "·")


def shortened(text: str, length: int) -> str:
    """On one line, of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
