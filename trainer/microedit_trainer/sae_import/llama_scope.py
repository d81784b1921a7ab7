"""Llama Scope's folder: `hyperparams.json` and `checkpoints/final.safetensors`.

Source: OpenMOSS/Language-Model-SAEs, `SparseAutoEncoder` of the release (2024).
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from microedit_trainer.sae_import.config_file import ConfigFile
from microedit_trainer.sae_import.hook_points import layer_of
from microedit_trainer.sae_import.published import Activation, PublishedSae
from microedit_vllm.artifact.tensors import expect, read_tensors
from microedit_vllm.errors import MicroEditError

CONFIG = "hyperparams.json"
_WEIGHTS = ("checkpoints/pruned.safetensors", "checkpoints/final.safetensors")
_ACTIVATIONS: tuple[Activation, ...] = ("relu", "topk", "jumprelu")


def read(folder: Path, norm_scale: float | None = None) -> PublishedSae:
    """Read a folder.

    Args:
        norm_scale: one scale for all tokens, where the SAE scales each by its own norm.

    Raises:
        MicroEditError: damaged, a transcoder, or of a kind that editing cannot use.
    """
    config = ConfigFile.read(folder / CONFIG)
    layer = _layer(config)
    activation = config.need("act_fn", config.text("act_fn")).lower()
    if activation not in _ACTIVATIONS:
        raise MicroEditError(f"{config.path}: act_fn {activation!r} is not supported")
    if config.flag("use_glu_encoder", False):
        raise MicroEditError(
            f"{config.path}: its encoder is gated (use_glu_encoder): not supported"
        )
    k = config.count("top_k")
    if activation == "topk":
        config.need("top_k", k)
    path = next((folder / p for p in _WEIGHTS if (folder / p).exists()), folder / _WEIGHTS[-1])
    tensors = read_tensors(path)
    sizes = (config.count("d_sae"), config.count("d_model"))
    W_enc = expect(tensors, "encoder.weight", sizes, path)
    n, d = W_enc.shape
    has_bias = config.flag("use_decoder_bias", True)
    scale_in, scale_out, is_assumed = _scales(config, d, norm_scale)
    return PublishedSae(
        W_enc=W_enc,
        b_enc=expect(tensors, "encoder.bias", (n,), path),
        W_dec=expect(tensors, "decoder.weight", (d, n), path).T.contiguous(),
        b_dec=expect(tensors, "decoder.bias", (d,), path) if has_bias else torch.zeros(d),
        activation=activation,
        format="Llama Scope",
        k=k,
        threshold=_threshold(config, n) if activation == "jumprelu" else None,
        subtracts_b_dec=config.flag("apply_decoder_bias_to_pre_encoder", True),
        ranks_by_norm=config.flag("sparsity_include_decoder_norm", True),
        scale_in=scale_in,
        scale_out=scale_out,
        scale_is_assumed=is_assumed,
        layer=layer,
    )


def _layer(config: ConfigFile) -> int:
    before = config.need("hook_point_in", config.text("hook_point_in"))
    after = config.text("hook_point_out", before)
    if before != after:
        raise MicroEditError(
            f"{config.path} is a transcoder from {before} to {after}; edits need an SAE"
        )
    return layer_of(before)


def _threshold(config: ConfigFile, n: int) -> Tensor:
    """The same for every latent, [n]; of 0 or more, or the JumpReLU would pass negative values."""
    return torch.full((n,), config.number("jump_relu_threshold", above=-1e-30) or 0.0)


def _scales(config: ConfigFile, d: int, norm_scale: float | None) -> tuple[float, float, bool]:
    """What z is multiplied by, what ẑ is divided by, and whether that only stands for norms."""
    kind = config.text("norm_activation", "token-wise")
    if kind == "inference":
        return 1.0, 1.0, False
    if kind == "dataset-wise":
        norms = config.part("dataset_average_activation_norm")
        norm_in = norms.need("dataset_average_activation_norm", norms.number("in"))
        norm_out = norms.number("out") or norm_in
        return math.sqrt(d) / norm_in, math.sqrt(d) / norm_out, False
    if norm_scale is None or kind != "token-wise":
        raise MicroEditError(
            f"the SAE scales its input {kind}, which editing cannot represent; --norm-scale "
            "√d/NORM takes one scale for all in the place of token-wise ones (then run "
            "`microedit sae check`)"
        )
    return norm_scale, norm_scale, True
