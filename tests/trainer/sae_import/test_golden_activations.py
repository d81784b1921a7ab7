"""Each format's own forward pass, written down in fp64, against the converted SAE.

The references follow the libraries' documentation, one function each, and share nothing with the
readers: they take the folder's tensors in the folder's shapes.
"""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from microedit_trainer.sae_import import ImportOptions, import_sae
from tests.trainer.sae_import.published_folders import (
    D,
    K,
    N,
    inputs,
    version_3,
    version_6,
    weights,
    write_gemma_scope,
    write_llama_scope,
    write_sae_lens,
    write_sparsify,
)


def converted(source, tmp_path, **options):
    return import_sae(str(source), tmp_path / "out", ImportOptions(**options))


def dense(sae, z):
    acts, indices = sae.encode(z)
    return torch.zeros(len(z), sae.num_latents).scatter_(1, indices, acts)


def check(sae, active, reconstruction):
    """Same latents active on every row, same ẑ; h may be in another unit per latent."""
    z = inputs()
    assert torch.equal(dense(sae, z) > 0, active)
    torch.testing.assert_close(
        sae.decode(*sae.encode(z)).double(), reconstruction, rtol=1e-4, atol=1e-4
    )


def top(pre, k):
    """Zero but for the k largest of each row, in plain numpy."""
    kept = np.zeros_like(pre)
    for row, values in enumerate(pre):
        for index in sorted(range(len(values)), key=lambda i: -values[i])[:k]:
            kept[row, index] = values[index]
    return kept


def as_fp64(tensors):
    return {name: t.double().numpy() for name, t in tensors.items()}


def results(acts, reconstruction):
    return torch.from_numpy(acts) > 0, torch.from_numpy(reconstruction)


def test_sparsify(tmp_path):
    folder = write_sparsify(tmp_path / "layers.7")
    w = as_fp64(load_file(folder / "sae.safetensors"))
    z = inputs().double().numpy()
    pre = (z - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
    acts = top(np.maximum(pre, 0), K)
    sae = converted(folder, tmp_path)
    check(sae, *results(acts, acts @ w["W_dec"] + w["b_dec"]))
    np.testing.assert_allclose(dense(sae, inputs()), acts, rtol=1e-4, atol=1e-4)
    assert (sae.k, sae.report["layer"], sae.report["import"]["notes"]) == (K, 7, [])


def sae_lens_pre(w, config, z, scale=1.0):
    """`process_sae_in`, then the encoder's product."""
    x = scale * z - (w["b_dec"] if config["apply_b_dec_to_input"] else 0)
    return x @ w["W_enc"] + w["b_enc"]


def sae_lens_case(config, scale=1.0, k=K):
    """The standard architecture with a Top-k imposed on what each latent adds to ẑ."""
    w, z = as_fp64(weights()), inputs().double().numpy()
    acts = np.maximum(sae_lens_pre(w, config, z, scale), 0)
    norms = np.linalg.norm(w["W_dec"], axis=1)
    acts = np.where(top(acts * norms, k) > 0, acts, 0)
    return results(acts, (acts @ w["W_dec"] + w["b_dec"]) / scale)


@pytest.mark.parametrize("layout", [version_3, version_6])
@pytest.mark.parametrize("subtracts", [True, False])
def test_sae_lens_standard_with_an_imposed_top_k(tmp_path, layout, subtracts):
    config = layout(apply_b_dec_to_input=subtracts)
    sae = converted(write_sae_lens(tmp_path / "sae", config), tmp_path, k=K)
    check(sae, *sae_lens_case(config))
    assert sae.report["layer"] == {version_3: 7, version_6: 20}[layout]
    assert "imposed" in sae.report["import"]["notes"][0]


def test_a_top_k_above_what_is_active_leaves_a_standard_sae_as_published(tmp_path):
    config = version_6()
    sae = converted(write_sae_lens(tmp_path / "sae", config), tmp_path, k=N)
    w, z = as_fp64(weights()), inputs().double().numpy()
    acts = np.maximum(sae_lens_pre(w, config, z), 0)
    acts[:, 3] = 0  # it has no decoder row, and h·‖W_dec‖ ranks it nowhere
    check(sae, *results(acts, acts @ w["W_dec"] + w["b_dec"]))


@pytest.mark.parametrize("place", ["config", "file", "option"])
def test_sae_lens_average_norm_is_folded_from_wherever_it_stands(tmp_path, place):
    scale = 0.2138
    config = version_3(normalize_activations="expected_average_only_in")
    if place == "config":
        config["norm_scaling_factor"] = scale
    folder = write_sae_lens(tmp_path / "sae", config)
    if place == "file":
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    options = {"norm_scale": scale} if place == "option" else {}
    sae = converted(folder, tmp_path, k=K, **options)
    check(sae, *sae_lens_case(config, scale))


@pytest.mark.parametrize("rescales", [True, False])
def test_sae_lens_top_k_of_version_6(tmp_path, rescales):
    config = version_6(architecture="topk", k=K, rescale_acts_by_decoder_norm=rescales)
    w, z = as_fp64(weights()), inputs().double().numpy()
    norms = np.linalg.norm(w["W_dec"], axis=1) if rescales else np.ones(N)
    acts = np.maximum(top(sae_lens_pre(w, config, z) * norms, K), 0)
    with np.errstate(invalid="ignore"):
        h = np.nan_to_num(acts / norms)
    sae = converted(write_sae_lens(tmp_path / "sae", config), tmp_path)
    check(sae, *results(acts, h @ w["W_dec"] + w["b_dec"]))
    np.testing.assert_allclose(dense(sae, inputs()), acts, rtol=1e-4, atol=1e-4)


def test_sae_lens_top_k_of_version_3(tmp_path):
    config = version_3(activation_fn_str="topk", activation_fn_kwargs={"k": K})
    w, z = as_fp64(weights()), inputs().double().numpy()
    acts = np.maximum(top(sae_lens_pre(w, config, z), K), 0)
    sae = converted(write_sae_lens(tmp_path / "sae", config), tmp_path)
    check(sae, *results(acts, acts @ w["W_dec"] + w["b_dec"]))


def test_sae_lens_jumprelu_that_never_jumps_is_a_relu(tmp_path):
    config = version_6(architecture="jumprelu")
    tensors = weights() | {"threshold": -torch.rand(N)}
    sae = converted(write_sae_lens(tmp_path / "sae", config, tensors), tmp_path, k=K)
    check(sae, *sae_lens_case(config))


def gated(seed=4, open_gates=False):
    random = torch.Generator().manual_seed(seed)
    tensors = weights()
    tensors["b_mag"] = tensors.pop("b_enc")
    tensors["r_mag"] = 0.5 * torch.randn(N, generator=random)
    lowest = tensors["b_mag"] * (-tensors["r_mag"]).exp()
    tensors["b_gate"] = lowest + 0.2 if open_gates else lowest - 0.6
    return tensors


def gated_acts(w, z):
    """Both paths as published: a gate, and a magnitude with shared weights."""
    x = z - w["b_dec"]
    gate = x @ w["W_enc"] + w["b_gate"] > 0
    magnitude = np.maximum(x @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"], 0)
    return gate * magnitude


@pytest.mark.parametrize("open_gates", [True, False])
def test_sae_lens_gated(tmp_path, open_gates):
    """Exact where gates open below the magnitudes; else its jumps are left out on request."""
    tensors = gated(open_gates=open_gates)
    folder = write_sae_lens(tmp_path / "sae", version_6(architecture="gated"), tensors)
    w, z = as_fp64(tensors), inputs().double().numpy()
    if not open_gates:
        w["b_gate"] = w["b_gate"] + 1e9
    acts = gated_acts(w, z)
    norms = np.linalg.norm(w["W_dec"], axis=1)
    acts = np.where(top(acts * norms, K) > 0, acts, 0)
    sae = converted(folder, tmp_path, k=K, ignore_thresholds=not open_gates)
    check(sae, *results(acts, acts @ w["W_dec"] + w["b_dec"]))


def test_a_gate_is_the_threshold_that_the_reader_makes_of_it(tmp_path):
    """What a refusal counts: a JumpReLU of the magnitudes at those thresholds is the SAE."""
    from microedit_trainer.sae_import.sae_lens import read

    tensors = gated()
    read_as = read(write_sae_lens(tmp_path / "sae", version_6(architecture="gated"), tensors))
    w, z = as_fp64(tensors), inputs().double().numpy()
    pre = (z - w["b_dec"]) @ read_as.W_enc.double().numpy().T + read_as.b_enc.double().numpy()
    jumped = np.where(pre > read_as.threshold.numpy(), np.maximum(pre, 0), 0)
    wanted = gated_acts(w, z)
    np.testing.assert_allclose(jumped, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted == 0).sum() > (np.maximum(pre, 0) == 0).sum()  # gates do close


def test_gemma_scope_agrees_wherever_its_k_largest_pass_their_thresholds(tmp_path):
    threshold = 0.2 + torch.rand(N, generator=torch.Generator().manual_seed(2))
    folder = write_gemma_scope(tmp_path, threshold)
    with np.load(folder / "params.npz") as stored:
        w = {name: stored[name].astype(np.float64) for name in stored.files}
    z = inputs().double().numpy()
    pre = z @ w["W_enc"] + w["b_enc"]
    acts = np.where(pre > w["threshold"], np.maximum(pre, 0), 0)
    norms = np.linalg.norm(w["W_dec"], axis=1)
    chosen = top(np.maximum(pre, 0) * norms, K) > 0
    kept = np.where(chosen, acts, 0)
    same = (acts > 0)[chosen].reshape(len(z), -1).all(1) if chosen.sum() == len(z) * K else None
    assert same is not None and same.sum() > 5
    sae = converted(folder, tmp_path, k=K, ignore_thresholds=True)
    reconstruction = sae.decode(*sae.encode(inputs())).double().numpy()
    wanted = kept @ w["W_dec"] + w["b_dec"]
    np.testing.assert_allclose(reconstruction[same], wanted[same], rtol=1e-4, atol=1e-4)
    assert sae.report["layer"] == 20
    assert "unequal thresholds" in sae.report["import"]["notes"][0]


def test_gemma_scope_without_thresholds_is_exact(tmp_path):
    folder = write_gemma_scope(tmp_path, torch.zeros(N))
    config = {"apply_b_dec_to_input": False}
    check(converted(folder, tmp_path, k=K), *sae_lens_case(config))


def llama_scope_case(folder, activation):
    """The release's forward: scale, encode, act on pre·‖decoder‖, decode, scale back."""
    config = json.loads((folder / "hyperparams.json").read_text())
    w = as_fp64(load_file(folder / "checkpoints" / "final.safetensors"))
    norms = config["dataset_average_activation_norm"]
    factor = {side: math.sqrt(D) / norms[side] for side in ("in", "out")}
    if config["norm_activation"] == "inference":
        factor = {"in": 1.0, "out": 1.0}
    x = factor["in"] * inputs().double().numpy()
    if config["apply_decoder_bias_to_pre_encoder"]:
        x = x - w["decoder.bias"]
    pre = x @ w["encoder.weight"].T + w["encoder.bias"]
    score = pre
    if config["sparsity_include_decoder_norm"]:
        score = pre * np.linalg.norm(w["decoder.weight"], axis=0)
    acts = pre * activation(score)
    out = acts @ w["decoder.weight"].T + w["decoder.bias"]
    return results(acts, out / factor["out"])


def is_top_k(score):
    return top(np.maximum(score, 0), K) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sparsity_include_decoder_norm": False},
        {"apply_decoder_bias_to_pre_encoder": True},
        {"norm_activation": "inference"},
        {"dataset_average_activation_norm": {"in": 17.125, "out": 12.5}},
    ],
)
def test_llama_scope_top_k(tmp_path, changes):
    folder = write_llama_scope(tmp_path / "Llama3_1-8B-Base-L15R-8x", **changes)
    sae = converted(folder, tmp_path)
    check(sae, *llama_scope_case(folder, is_top_k))
    assert (sae.k, sae.report["layer"], sae.report["import"]["notes"]) == (K, 15, [])


def test_llama_scope_jumprelu_is_its_top_k_wherever_k_latents_pass_the_one_threshold(tmp_path):
    changes = {"act_fn": "jumprelu", "jump_relu_threshold": 4.0}
    folder = write_llama_scope(tmp_path / "L15R", **changes)

    def jump(score):
        passing = score > changes["jump_relu_threshold"]
        return passing & is_top_k(score)

    sae = converted(folder, tmp_path, k=K, ignore_thresholds=True)
    active, wanted = llama_scope_case(folder, jump)
    full = active.sum(1) == K
    assert 5 < full.sum() < len(full)
    found = sae.decode(*sae.encode(inputs())).double()
    torch.testing.assert_close(found[full], wanted[full], rtol=1e-4, atol=1e-4)
    assert "equal thresholds" in sae.report["import"]["notes"][0]


def test_decoder_norms_are_moved_and_not_dropped(tmp_path):
    sae = converted(write_llama_scope(tmp_path / "L15R"), tmp_path)
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms[norms > 0], torch.ones(N - 1), rtol=1e-5, atol=0)


def test_one_scale_for_tokens_that_were_scaled_one_by_one_is_said_to_be_that(tmp_path):
    config = version_3(normalize_activations="constant_norm_rescale")
    sae = converted(write_sae_lens(tmp_path / "sae", config), tmp_path, k=K, norm_scale=0.3)
    check(sae, *sae_lens_case(config, 0.3))
    assert any("each token scaled by its own norm" in n for n in sae.report["import"]["notes"])
