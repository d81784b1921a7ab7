import json

import pytest
from safetensors.torch import save_file

from microedit_trainer.cli.sae import app
from microedit_vllm.artifact.sae import SparseAutoencoder
from microedit_vllm.cli.main import main
from tests.trainer.sae_import.published_folders import (
    N,
    version_3,
    version_6,
    write_sae_lens,
)
from tests.trainer.tiny_edits import LAYER


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["sae", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def test_import_writes_our_folder_and_says_what_it_changed(tmp_path, capsys):
    source = write_sae_lens(tmp_path / "theirs", version_3())
    status, out, _ = run(capsys, "import", source, "--out", tmp_path / "ours", "--k", 6)
    assert status == 0
    assert f"SAE Lens, {N} latents of width 10, k = 6, layer 7" in out
    assert "not as published: a Top-k of 6 imposed on a ReLU SAE" in out
    saved = SparseAutoencoder.load(tmp_path / "ours")
    assert (saved.k, saved.report["layer"]) == (6, 7)


def test_import_refuses_in_one_line_and_leaves_nothing(tmp_path, capsys):
    source = write_sae_lens(tmp_path / "theirs", version_3(normalize_activations="layer_norm"))
    status, out, err = run(capsys, "import", source, "--out", tmp_path / "ours", "--k", 6)
    assert (status, out) == (2, "")
    assert err.count("microedit: ") == 1
    assert "layer_norm" in err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.fixture
def published(sae, tmp_path):
    """The trained SAE as SAE Lens would store it."""
    tensors = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    config = version_6(architecture="topk", k=sae.k, d_in=sae.d_in, d_sae=sae.num_latents)
    config["metadata"]["hook_name"] = f"blocks.{LAYER}.hook_resid_post"
    folder = write_sae_lens(tmp_path / "theirs", config)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


@pytest.fixture
def prose(tmp_path):
    (tmp_path / "text.txt").write_text(
        "".join(f"In {y} it rained {y % 9} days. " for y in range(300))
    )
    return tmp_path / "text.txt"


def test_an_imported_sae_measures_like_the_one_that_was_trained(
    lm, sae_folder, published, prose, tmp_path, capsys
):
    run(capsys, "import", published, "--out", tmp_path / "ours")
    words = ("--model", lm.folder, "--text", prose, "--tokens", 2000, "--json")
    _, ours, _ = run(capsys, "check", tmp_path / "ours", *words)
    status, trained, _ = run(capsys, "check", sae_folder, *words)
    ours, trained = json.loads(ours), json.loads(trained)
    assert ours["all"] == pytest.approx(trained["all"], rel=1e-4)
    assert (ours["layer"], ours["k"]) == (LAYER, trained["k"])
    assert status == (trained["verdict"] == "does not suit editing")
    assert set(trained["sources"]) == {"text.txt"}


def test_check_prints_a_table_and_ends_with_1_where_editing_would_fail(
    lm, sae_folder, prose, capsys
):
    words = ("--model", lm.folder, "--text", prose, "--tokens", 500, "--layer", LAYER - 1)
    status, out, _ = run(capsys, "check", sae_folder, *words)
    assert status == 1
    for word in ("FVU", "L0", "latents unused", "text.txt", "does not suit editing (a guide)"):
        assert word in out


def test_the_commands_are_registered():
    assert {command.name for command in app.registered_commands} >= {"import", "check"}
