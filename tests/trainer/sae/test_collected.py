"""SAEs of one text and layer run the model over it once."""

from dataclasses import replace

import pytest

from microedit_trainer.sae import SaeSettings, train_sae
from tests.trainer.sae.test_train import same_weights


@pytest.fixture
def short(settings) -> SaeSettings:
    return replace(settings, steps=3)


def stages_of(model, settings, tmp_path, name, collected):
    """The SAE, and which stages ran over how much: a run that is lent residuals collects none."""
    seen: dict[str, list[int]] = {}
    sae = train_sae(
        model,
        settings,
        tmp_path / name,
        progress=lambda stage, done, total, note: seen.setdefault(stage, []).append(done),
        collected=collected,
    )
    return sae, seen


def test_the_next_sae_of_the_text_collects_nothing_and_is_the_same(model, short, tmp_path):
    collected = tmp_path / "collected"
    _, first = stages_of(model, short, tmp_path, "first", collected)
    assert {"sample", "collect"} <= set(first)
    wider = replace(short, width=64, k=4)
    lent, second = stages_of(model, wider, tmp_path, "lent", collected)
    assert set(second) == {"train"}
    own, _ = stages_of(model, wider, tmp_path, "own", None)
    assert same_weights(lent, own)
    assert lent.report["sources"] == own.report["sources"]


@pytest.mark.parametrize("changes", [{"layer": 0}, {"seed": 1}, {"tokens": 3000}])
def test_another_text_or_layer_is_collected_anew(model, short, tmp_path, changes):
    collected = tmp_path / "collected"
    stages_of(model, short, tmp_path, "first", collected)
    _, other = stages_of(model, replace(short, **changes), tmp_path, "other", collected)
    assert "collect" in other
    assert len(list(collected.iterdir())) == 2


def test_what_is_kept_outlives_a_fresh_run(model, short, tmp_path):
    """The work folder's files are other names of the kept ones."""
    collected = tmp_path / "collected"
    stages_of(model, short, tmp_path, "first", collected)
    before = {path: path.stat().st_size for path in collected.rglob("*") if path.is_file()}
    train_sae(model, short, tmp_path / "again", fresh=True, collected=collected)
    assert {path: path.stat().st_size for path in before} == before
