import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from microedit_vllm.artifact import SparseAutoencoder
from microedit_vllm.errors import MicroEditError
from tests.builders import tiny_sae


@pytest.fixture
def folder(tmp_path):
    tiny_sae().save(tmp_path / "sae")
    return tmp_path / "sae"


def rewrite(path, **changes):
    tensors = load_file(path)
    tensors.update(changes)
    save_file({name: t for name, t in tensors.items() if t is not None}, path)


def test_round_trip(tmp_path):
    sae = tiny_sae()
    saved = sae.save(tmp_path / "sae")
    loaded = SparseAutoencoder.load(tmp_path / "sae")
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(loaded, name), getattr(sae, name))
    assert loaded.k == sae.k
    assert loaded.fingerprint == saved.fingerprint != ""


def test_sparsify_reads_the_names_that_it_knows(folder):
    assert set(load_file(folder / "sae.safetensors")) == {
        "encoder.weight",
        "encoder.bias",
        "W_dec",
        "b_dec",
    }
    config = json.loads((folder / "cfg.json").read_text())
    assert (config["activation"], config["k"], config["d_in"]) == ("topk", 5, 12)


def test_the_report_comes_along(tmp_path):
    sae = tiny_sae()
    sae.report.update(fvu={"prose": 0.1}, max_norm=900.0)
    assert sae.save(tmp_path / "sae").report == {"fvu": {"prose": 0.1}, "max_norm": 900.0}


def test_the_fingerprint_tells_weights_and_k_apart(tmp_path):
    saes = [tiny_sae(), tiny_sae(), tiny_sae(seed=1), tiny_sae(k=6)]
    prints = [sae.save(tmp_path / str(i)).fingerprint for i, sae in enumerate(saes)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_half_precision_weights_are_read_in_fp32(folder):
    half = tiny_sae().W_enc.half()
    rewrite(folder / "sae.safetensors", **{"encoder.weight": half})
    loaded = SparseAutoencoder.load(folder)
    assert loaded.W_enc.dtype == torch.float32
    assert torch.equal(loaded.W_enc, half.float())


def with_nan(tensor):
    tensor.view(-1)[7] = torch.nan
    return tensor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_dec": None}, "'W_dec' is missing"),
        ({"W_dec": torch.zeros(47, 12)}, "47×12, expected 48×12"),
        ({"encoder.weight": torch.zeros(48, 13)}, "48×13, expected any×12"),
        ({"encoder.weight": torch.zeros(4, 12)}, "k = 5 exceeds the 4 latents"),
        ({"encoder.bias": torch.zeros(48, 1)}, "48×1, expected 48"),
        ({"b_dec": torch.full((12,), torch.inf)}, "NaN or infinite"),
        ({"W_dec": with_nan(torch.zeros(48, 12))}, "NaN or infinite"),
        (
            {"W_dec": with_nan(torch.zeros(48, 12)).to(torch.float8_e4m3fn)},
            "NaN or infinite",
        ),
    ],
)
def test_hostile_weights_are_refused(folder, changes, message):
    rewrite(folder / "sae.safetensors", **changes)
    with pytest.raises(MicroEditError, match=message):
        SparseAutoencoder.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "groupmax"}, "activation is 'groupmax'"),
        ({"transcode": True}, "transcode is True"),
        ({"signed": True}, "signed is True"),
        ({"skip_connection": True}, "skip_connection is True"),
        ({"embed_skip": True}, "embed_skip is True"),
        ({"k": 0}, "positive numbers"),
        ({"k": "5"}, "positive numbers"),
        ({"k": 49}, "exceeds the 48 latents"),
        ({"d_in": None}, "positive numbers"),
        ({"d_in": 11}, "expected any×11"),
    ],
)
def test_a_config_that_would_be_read_wrong_is_refused(folder, changes, message):
    config = json.loads((folder / "cfg.json").read_text()) | changes
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(MicroEditError, match=message):
        SparseAutoencoder.load(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cfg.json", None, "not an SAE folder: cfg.json is missing"),
        ("cfg.json", "k: 5", "cannot be read"),
        ("cfg.json", "[5]", "not a JSON object"),
        ("cfg.json", "[" * 100_000, "cannot be read"),
        ("sae.safetensors", None, "is missing"),
        ("sae.safetensors", "", "is damaged"),
        ("microedit_report.json", "[" * 100_000, "cannot be read"),
    ],
)
def test_missing_and_damaged_files_are_refused(folder, name, content, message):
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(MicroEditError, match=message):
        SparseAutoencoder.load(folder)
