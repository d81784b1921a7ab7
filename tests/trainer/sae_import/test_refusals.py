"""What cannot be computed as published, contradicts itself, is damaged or hostile."""

import io
import pickle
import zipfile

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from microedit_trainer.sae_import import ImportOptions, import_sae
from microedit_trainer.sae_import.hook_points import layer_of
from microedit_vllm.errors import MicroEditError
from tests.trainer.sae_import.published_folders import (
    D,
    K,
    N,
    version_3,
    version_6,
    weights,
    write_gemma_scope,
    write_llama_scope,
    write_sae_lens,
    write_sparsify,
)


def refused(source, tmp_path, message, **options):
    with pytest.raises(MicroEditError, match=message) as error:
        import_sae(str(source), tmp_path / "out", ImportOptions(**options))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signed": True}, "signed is True"),
        ({"skip_connection": True}, "skip_connection is True"),
        ({"transcode": True}, "transcode is True"),
        ({"gram_lookup": True}, "gram_lookup is True"),
        ({"activation": "groupmax"}, "activation is 'groupmax'"),
    ],
)
def test_sparsify_coders_that_compute_something_else(tmp_path, changes, message):
    refused(write_sparsify(tmp_path / "layers.7", **changes), tmp_path, message)


def test_sparsifys_multi_top_k_is_a_training_loss_alone(tmp_path):
    folder = write_sparsify(tmp_path / "layers.7", multi_topk=True)
    assert import_sae(str(folder), tmp_path / "out", ImportOptions()).k == K


@pytest.mark.parametrize("name", ["layers.3.mlp", "layers.0.attention", "embed_tokens"])
def test_sparsify_coders_of_other_places(tmp_path, name):
    refused(write_sparsify(tmp_path / name), tmp_path, "decoder layer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "no fixed number of latents; choose one by --k"),
        ({"architecture": "transcoder"}, "architecture 'transcoder'"),
        ({"architecture": "batchtopk"}, "architecture 'batchtopk'"),
        ({"activation_fn_str": "tanh-relu"}, "activation 'tanh-relu'"),
        ({"activation_fn_str": "topk"}, "does not name k"),
        ({"normalize_activations": "layer_norm"}, "layer_norm"),
        ({"normalize_activations": "constant_norm_rescale"}, "each token to the norm √d"),
        ({"normalize_activations": "expected_average_only_in"}, "--norm-scale"),
        ({"normalize_activations": True}, "--norm-scale"),
        ({"normalize_activations": "by moonlight"}, "is not known"),
        ({"hook_name": "blocks.8.hook_mlp_out"}, "trained on blocks.8.hook_mlp_out"),
        ({"hook_name": "blocks.8.attn.hook_z"}, "trained on blocks.8.attn.hook_z"),
        ({"hook_name": "blocks.0.hook_resid_pre"}, "trained on blocks.0.hook_resid_pre"),
        ({"hook_name": ["x"]}, "hook_name is"),
        ({"d_in": D + 1}, f"{D}×{N}, expected {D + 1}×{N}"),
        ({"d_sae": "24"}, "d_sae is '24'"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input is 'no'"),
    ],
)
def test_sae_lens_configs(tmp_path, changes, message):
    refused(write_sae_lens(tmp_path / "sae", version_3(**changes)), tmp_path, message)


def test_the_papers_mistral_sae_is_known_to_scale_each_token(tmp_path):
    config = version_3(model_name="mistral-7b", d_sae=65536, hook_name="blocks.24.hook_resid_pre")
    del config["normalize_activations"]
    folder = write_sae_lens(tmp_path / "mistral_7b_layer_24", config)
    refused(folder, tmp_path, "each token to the norm √d", k=400)


def test_jumps_are_refused_with_the_way_around(tmp_path):
    tensors = weights() | {"threshold": torch.linspace(-1, 1, N)}
    folder = write_sae_lens(tmp_path / "sae", version_6(architecture="jumprelu"), tensors)
    refused(folder, tmp_path, f"12 of {N} latents jump at a threshold.*--ignore-thresholds", k=K)


def test_the_way_around_names_the_k_of_training(tmp_path):
    folder = write_llama_scope(tmp_path / "L15R", act_fn="jumprelu")
    refused(folder, tmp_path, f"it was trained with {K}", ignore_thresholds=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn 'gelu'"),
        ({"act_fn": None}, "does not name act_fn"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"hook_point_out": "blocks.15.hook_mlp_out"}, "transcoder"),
        ({"hook_point_in": None}, "does not name hook_point_in"),
        ({"norm_activation": "token-wise"}, "token-wise"),
        ({"norm_activation": "batch-wise"}, "batch-wise"),
        ({"dataset_average_activation_norm": {}}, "dataset_average_activation_norm"),
        ({"dataset_average_activation_norm": {"in": 0}}, "in is 0"),
        ({"dataset_average_activation_norm": {"in": float("nan")}}, "in is nan"),
        ({"dataset_average_activation_norm": {"in": True}}, "in is True"),
        ({"act_fn": "jumprelu", "jump_relu_threshold": -0.5}, "jump_relu_threshold is -0.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": N + 1}, "does not fit the SAE's 24 latents"),
        ({"d_model": 11}, "24×10, expected 24×11"),
    ],
)
def test_llama_scope_configs(tmp_path, changes, message):
    refused(write_llama_scope(tmp_path / "L15R", **changes), tmp_path, message)


@pytest.mark.parametrize("kind", ["mlp", "att", "transcoders"])
def test_gemma_scope_of_other_places(tmp_path, kind):
    write_gemma_scope(tmp_path, torch.zeros(N))
    folder = tmp_path / "gemma-scope-2b-pt-res"
    folder = folder.rename(tmp_path / f"gemma-scope-2b-pt-{kind}")
    refused(folder, tmp_path, "not of the residual stream", k=K)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"threshold": np.array([Bomb()], dtype=object)}, "no plain npz"),
        ({}, "'threshold' is missing"),
        ({"threshold": np.zeros(N - 1, np.float32)}, "23, expected 24"),
        ({"threshold": np.full(N, np.nan, np.float32)}, "NaN or infinite"),
        ({"threshold": np.zeros(N, np.int64)}, "of int64, expected floats"),
        ({"W_dec": np.full((N, D), 1e300)}, "NaN or infinite"),
    ],
)
def test_hostile_npz(tmp_path, arrays, message):
    folder = tmp_path / "layer_3"
    folder.mkdir()
    np.savez(folder / "params.npz", **({n: t.numpy() for n, t in weights().items()} | arrays))
    refused(folder, tmp_path, message, k=K)


def zip_with(member: bytes) -> bytes:
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr("W_enc.npy", member)
    return stored.getvalue()


def array_file() -> bytes:
    stored = io.BytesIO()
    np.save(stored, np.zeros((D, N), np.float32))
    return stored.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 cut off",
        pickle.dumps(Bomb()),
        array_file(),
        zip_with(b"\x93NUMPY\x01\x00 no header"),
        zip_with(array_file()[:200]),
        zip_with(array_file())[:-40],
        zip_with(b"no array at all"),
    ],
)
def test_damaged_npz(tmp_path, content):
    folder = tmp_path / "layer_3"
    folder.mkdir()
    (folder / "params.npz").write_bytes(content)
    refused(folder, tmp_path, "params.npz", k=K)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("W_enc", None, "'W_enc' is missing"),
        ("b_enc", torch.zeros(N, 1), "24×1, expected 24"),
        ("W_dec", torch.zeros(D, N), "10×24, expected 24×10"),
        ("b_dec", torch.full((D,), torch.nan), "NaN or infinite"),
        ("scaling_factor", torch.full((N,), 1.5), "scaling_factor"),
        ("W_dec", torch.full((N, D), 1e38), "overflows"),
    ],
)
def test_hostile_sae_lens_weights(tmp_path, name, value, message):
    folder = write_sae_lens(tmp_path / "sae", version_3())
    stored = load_file(folder / "sae_weights.safetensors") | {name: value}
    stored = {n: t for n, t in stored.items() if t is not None}
    save_file(stored, folder / "sae_weights.safetensors")
    refused(folder, tmp_path, message, k=K)


def test_scaling_factors_of_one_are_nothing(tmp_path):
    tensors = weights() | {"scaling_factor": torch.ones(N)}
    folder = write_sae_lens(tmp_path / "sae", version_3(), tensors)
    assert import_sae(str(folder), tmp_path / "out", ImportOptions(k=K)).k == K


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ("[1]", "not a JSON object"), (None, "missing")],
)
def test_damaged_configs(tmp_path, content, message):
    folder = write_sae_lens(tmp_path / "sae", version_3())
    (folder / "cfg.json").unlink()
    if content is not None:
        (folder / "cfg.json").write_text(content)
    refused(folder, tmp_path, message, k=K)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 8}, "output of layer 7, not 8"),
        ({"k": 0}, "k is 0"),
        ({"k": N + 1}, "k = 25 does not fit"),
        ({"layer": -1}, "layer -1"),
        ({"norm_scale": 0.5}, "leave --norm-scale out"),
        ({"norm_scale": float("inf")}, "positive number"),
    ],
)
def test_options_that_contradict_the_folder(tmp_path, options, message):
    folder = write_sae_lens(tmp_path / "sae", version_3())
    refused(folder, tmp_path, message, **({"k": K} | options))


def test_an_output_that_is_something_else_stays(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    folder = write_sae_lens(tmp_path / "sae", version_3())
    with pytest.raises(MicroEditError, match="not an SAE folder"):
        import_sae(str(folder), tmp_path / "notes", ImportOptions(k=K))
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("name", ["", "nowhere", "./nowhere", "/nowhere", "a/b/../../c", "a/.."])
def test_names_that_are_neither_folder_nor_hub_id(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "holds no SAE" if name == "" else "is not a folder"
    refused(name, tmp_path, message)


def write_repository(root):
    for layer in (5, 6, 16):
        write_sparsify(root / f"layers.{layer}")
    return root


def test_layer_chooses_among_the_folders_of_a_repository(tmp_path):
    root = write_repository(tmp_path / "repository")
    sae = import_sae(str(root), tmp_path / "out", ImportOptions(layer=6))
    assert (sae.report["layer"], sae.report["import"]["source"]) == (6, "layers.6")


def test_several_folders_are_listed_and_none_is_guessed(tmp_path):
    root = write_repository(tmp_path / "repository")
    refused(root, tmp_path, "several SAEs; name the folder of one: layers.16, layers.5, layers.6")
    refused(root, tmp_path, "no SAE of layer 1;", layer=1)


class Hub:
    """A hub that holds one repository, or that cannot be reached."""

    def __init__(self, monkeypatch, root=None):
        self.root, self.asked = root, []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda _, name: self.files())

    def files(self):
        if self.root is None:
            raise OSError("no network\nat all")
        return [f.relative_to(self.root).as_posix() for f in self.root.rglob("*") if f.is_file()]

    def download(self, name, allow_patterns):
        self.files()
        self.asked.append((name, allow_patterns))
        return str(self.root)


def test_a_hub_id_gives_the_folder_of_one_layer_alone(tmp_path, monkeypatch):
    hub = Hub(monkeypatch, write_repository(tmp_path / "repository"))
    source = "EleutherAI/sae-pythia-70m-32k"
    sae = import_sae(source, tmp_path / "out", ImportOptions(layer=16))
    assert (sae.report["layer"], sae.report["import"]["source"]) == (16, source)
    sae = import_sae(f"{source}/layers.5", tmp_path / "out", ImportOptions())
    assert sae.report["layer"] == 5
    assert hub.asked == [(source, ["layers.16/*"]), (source, ["layers.5/*"])]


@pytest.mark.parametrize("inner", ["", "/layers.5"])
def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch, inner):
    Hub(monkeypatch)
    refused(f"owner/name{inner}", tmp_path, r"owner/name is neither.*\(OSError\).*network")


def test_a_folder_that_the_hub_lacks_is_one_line(tmp_path, monkeypatch):
    Hub(monkeypatch, write_repository(tmp_path / "repository"))
    refused("owner/name/layers.9", tmp_path, "holds no SAE")


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.5.hook_resid_post", 5),
        ("blocks.5.hook_resid_pre", 4),
        ("model.layers.12", 12),
        ("transformer.h.3", 3),
    ],
)
def test_hook_points_name_layers(hook, layer):
    assert layer_of(hook) == layer


@pytest.mark.parametrize("hook", ["blocks.5.hook_resid_mid", "layers.3.mlp", "hook_embed", "5", ""])
def test_other_hook_points_are_refused(hook):
    with pytest.raises(MicroEditError, match="residual stream"):
        layer_of(hook)
