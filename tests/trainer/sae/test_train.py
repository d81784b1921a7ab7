"""The whole way from texts to an SAE folder, on a tiny model."""

import os
import resource
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from microedit_trainer.activations import SINK_FACTOR
from microedit_trainer.sae import SaeSettings, train_sae
from microedit_trainer.sae.work_folder import work_path
from microedit_vllm.artifact.sae import SparseAutoencoder
from microedit_vllm.errors import MicroEditError

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


class _Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may catch it."""


def stop_at(step: int, action):
    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage == "train" and done == step:
            action()

    return progress


def killed():
    raise _Killed


@pytest.fixture(scope="module")
def module_cache():
    return {}


@pytest.fixture
def unbroken(model, settings, tmp_path_factory, module_cache) -> SparseAutoencoder:
    if "sae" not in module_cache:
        out = tmp_path_factory.mktemp("unbroken") / "sae"
        module_cache["sae"] = train_sae(model, settings, out)
        module_cache["out"] = out
    return module_cache["sae"]


def same_weights(first: SparseAutoencoder, second: SparseAutoencoder) -> bool:
    return all(torch.equal(getattr(first, n), getattr(second, n)) for n in WEIGHTS)


def test_held_out_text_is_reconstructed(unbroken):
    sources = unbroken.report["sources"]
    assert set(sources) >= {"prose.txt", "self", "self turns"}
    assert sources["prose.txt"]["fvu"] < 0.5
    assert unbroken.report["fvu"] < 0.6


def test_decoder_rows_have_norm_one(unbroken):
    torch.testing.assert_close(unbroken.W_dec.norm(dim=1), torch.ones(unbroken.num_latents))


def test_report_says_what_the_sae_is(unbroken, settings, model, module_cache):
    report = unbroken.report
    expected = {
        "layer": 1,
        "model": model.name,
        "steps": 120,
        "seed": 0,
    }
    assert {name: report[name] for name in expected} == expected
    assert report["max_norm"] == SINK_FACTOR * report["median_norm"]
    assert len(report["model_fingerprint"]) == 64
    assert 0 <= report["dead_share"] < 1
    assert report["mean_distance"] > 0
    assert report["tokens"] > settings.width
    assert set(report["seconds_by_stage"]) == {"sample", "collect", "train", "report"}
    for found in report["sources"].values():
        assert set(found) == {"held_out_tokens", "fvu", "dead_share", "mean_distance"}
    assert SparseAutoencoder.load(module_cache["out"]).report == report
    assert [path.name for path in module_cache["out"].parent.iterdir()] == ["sae"]


def test_same_seed_same_weights_other_seed_other_weights(model, settings, unbroken, tmp_path):
    assert same_weights(train_sae(model, settings, tmp_path / "again"), unbroken)
    other = train_sae(model, replace(settings, seed=1), tmp_path / "other")
    assert not same_weights(other, unbroken)


@pytest.mark.parametrize("step", [30, 75])
def test_killed_and_resumed_gives_the_unbroken_weights(model, settings, unbroken, tmp_path, step):
    out = tmp_path / "sae"
    with pytest.raises(_Killed):
        train_sae(model, settings, out, progress=stop_at(step, killed))
    assert not out.exists()
    resumed = train_sae(model, settings, out)
    assert same_weights(resumed, unbroken)
    assert resumed.fingerprint == unbroken.fingerprint
    assert not work_path(out).exists()


def test_ctrl_c_saves_that_very_step(model, settings, unbroken, tmp_path):
    out = tmp_path / "sae"
    interrupt = stop_at(61, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train_sae(model, settings, out, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == [".sae-work"]
    steps = []
    resumed = train_sae(model, settings, out, progress=lambda s, done, *_: steps.append((s, done)))
    assert next(done for stage, done in steps if stage == "train") == 62
    assert same_weights(resumed, unbroken)


def test_a_stopped_run_of_other_settings_is_not_continued(model, settings, tmp_path):
    out = tmp_path / "sae"
    with pytest.raises(_Killed):
        train_sae(model, settings, out, progress=stop_at(2, killed))
    with pytest.raises(MicroEditError, match=r"with another width.*--fresh"):
        train_sae(model, replace(settings, width=64), out)
    fresh = train_sae(model, replace(settings, width=64, steps=5), out, fresh=True)
    assert fresh.num_latents == 64


def test_a_finished_sae_is_replaced_and_other_folders_are_not(model, settings, tmp_path):
    short = replace(settings, steps=3)
    train_sae(model, short, tmp_path / "sae")
    train_sae(model, replace(short, width=64), tmp_path / "sae")
    assert SparseAutoencoder.load(tmp_path / "sae").num_latents == 64
    (tmp_path / "thesis").mkdir()
    with pytest.raises(MicroEditError, match="not an SAE folder"):
        train_sae(model, short, tmp_path / "thesis")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"width": 7}, "width 7 is smaller than k = 8"),
        ({"batch": 0}, "batch is 0"),
        ({"lr": -1.0}, "lr must be > 0"),
    ],
)
def test_impossible_numbers_are_refused(settings, changes, message):
    with pytest.raises(MicroEditError, match=message):
        replace(settings, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 3}, "layer 3 does not exist"),
        ({"layer": -1}, "layer -1 does not exist"),
        ({"text": ("nowhere.txt",)}, "nowhere.txt is no file"),
        ({"text": (), "sample_tokens": 0}, "no text to train on"),
        ({"width": 20_000}, "too few for 20,000 latents: at least 20,000"),
    ],
)
def test_bad_input_gives_one_line_and_no_folder(model, settings, tmp_path, changes, message):
    with pytest.raises(MicroEditError, match=message) as error:
        train_sae(model, replace(settings, **changes), tmp_path / "sae")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_named_before_the_work(model, settings, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MicroEditError, match="this run needs"):
        train_sae(model, settings, tmp_path / "sae")


def test_a_failed_write_is_one_line(model, settings, tmp_path):
    """A limit on the size of files fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(MicroEditError, match="cannot write") as error:
            train_sae(model, settings, tmp_path / "sae")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "sae").exists()


def test_two_runs_do_not_share_a_work_folder(model, settings, tmp_path):
    out = tmp_path / "sae"

    def start_another():
        with pytest.raises(MicroEditError, match="another run is at work"):
            train_sae(model, settings, out)

    short = replace(settings, steps=3)
    train_sae(model, short, out, progress=stop_at(2, start_another))
    assert out.exists()


def test_dead_latents_come_back(model, settings, tmp_path):
    """A wide SAE, most of whose latents would die: AuxK keeps them in use."""
    wide = replace(settings, width=1024, steps=400)
    assert train_sae(model, wide, tmp_path / "sae").report["dead_share"] < 0.5


def test_default_steps_are_nine_passes():
    common = {"layer": 0, "width": 8, "k": 1, "text": ()}
    assert SaeSettings(**common, tokens=1000).total_steps == 850
    assert SaeSettings(**common, tokens=1_024_000).total_steps == 9000
