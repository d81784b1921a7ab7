import warnings
from dataclasses import replace

import pytest
from matplotlib.image import imread

from microedit_trainer.audit.explanation import Explanation, Firing, Row, RowShare, Token
from microedit_trainer.audit.picture import check_picture, draw_explanation, headline
from microedit_vllm.errors import MicroEditError


def token(position: int, text: str = " word", ratio: float | None = 0.5) -> Token:
    decides = 2 < position < 6
    run_ard = 0.4 if position == 5 else None
    return Token(position, 7, text, position > 0, position == 2, ratio, run_ard, decides, 3)


def explanation(tokens, **changes) -> Explanation:
    rows = tuple(Row(i, 2.0, 3.0, 0.2, (RowShare(1, "What costs $x^{$?", 0.7),)) for i in range(4))
    firing = Firing((3, 4, 5), 12, 4, 30, 2.0, (), rows)
    fields = {
        "edit_set": "set",
        "model": "model",
        "layer": 1,
        "context": "bare",
        "prompt": "What costs $x^{$?",
        "system": None,
        "statistic": "relative",
        "alpha": None,
        "tau": 0.6,
        "ard": 0.4,
        "on": True,
        "decision_position": len(tokens) - 1,
        "top_k": 8,
        "tokens": tuple(tokens),
        "scoring": firing,
        "carried": None,
        "edit": firing,
        "nearest": (),
        "facts_compared": 1,
        "facts_total": 1,
        "before": "$x^{ is $",
        "after": "",
    }
    return Explanation(**(fields | changes))


STRANGE = ["$", "$x^{$", "\n", "\t", "文", "🙂", "�", "", "%", "\\frac"]


@pytest.mark.parametrize(
    "tokens",
    [
        [token(i) for i in range(8)],
        [token(i, text) for i, text in enumerate(STRANGE)],
        [token(i, ratio=1e9 if i == 3 else None) for i in range(400)],
        [token(0)],
    ],
    ids=["short", "strange", "long", "one"],
)
def test_the_picture_is_a_png_with_something_on_it(tmp_path, tokens):
    path = tmp_path / "new" / "picture.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_explanation(path, explanation(tokens))
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)
    height, width, _ = pixels.shape
    assert 600 < height < 3000
    assert 600 < width < 5000
    assert 0.02 < (pixels[..., :3] < 0.9).any(-1).mean() < 0.9
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]


def test_nothing_scored_and_no_row_is_a_picture_too(tmp_path):
    nothing = Firing((), 0, 0, 0, 0.0, (), ())
    tokens = [replace(token(0), ratio=None)]
    found = explanation(tokens, ard=None, on=False, scoring=nothing, edit=nothing)
    draw_explanation(tmp_path / "picture.png", found)
    assert imread(tmp_path / "picture.png").size
    assert headline(found) == "nothing can be scored, so the switch is off (τ 0.600)"


def test_what_is_carried_has_a_plot_of_its_own(tmp_path):
    found = explanation([token(i) for i in range(8)])
    widths = []
    for carried in (None, found.edit):
        draw_explanation(tmp_path / "picture.png", replace(found, carried=carried))
        widths.append(imread(tmp_path / "picture.png").shape[1])
    assert widths[1] > 1.3 * widths[0]


def test_what_decides_can_be_told_from_the_rest(tmp_path):
    """The colour of the deciding tokens goes where they go."""

    def orange(tokens):
        draw_explanation(tmp_path / "picture.png", explanation(tokens))
        red, green, blue, _ = imread(tmp_path / "picture.png").transpose(2, 0, 1)
        return int(((red > 0.95) & (green > 0.4) & (green < 0.6) & (blue < 0.2)).sum())

    tokens = [token(i) for i in range(8)]
    legend = orange([replace(t, decides=False) for t in tokens])
    assert 0 < legend < orange([replace(t, decides=t.position == 3) for t in tokens])
    assert orange(tokens) > 2 * orange([replace(t, decides=t.position == 3) for t in tokens])


@pytest.mark.parametrize("name", ["picture.jpg", "picture", "folder.png"])
def test_another_kind_of_file_is_refused(tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(MicroEditError, match="ends in"):
        check_picture(tmp_path / name)
    check_picture(tmp_path / "right.PNG")
